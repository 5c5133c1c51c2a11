"""Durations and sizes for people."""


def format_seconds(seconds: float) -> str:
    """Formats a duration.

    Example:
        >>> format_seconds(8), format_seconds(125), format_seconds(7322)
        ('8 s', '2:05 min', '2:02 h')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def format_bytes(count: float) -> str:
    """Formats a number of bytes.

    Example:
        >>> format_bytes(512), format_bytes(3 << 20), format_bytes(5.25 * 2**30)
        ('512 B', '3.0 MiB', '5.25 GiB')
    """
    if count < 1 << 20:
        return f"{count:,.0f} B" if count < 1 << 10 else f"{count / 2**10:.1f} KiB"
    if count < 1 << 30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"
