"""Tables of plain text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], num_right: int) -> str:
    """Aligns columns two spaces apart, the last ``num_right`` of them to the right.

    Example:
        >>> print(format_table([("name", "bytes"), ("kernel", "64"), ("bias", "8")], 1))
        name    bytes
        kernel     64
        bias        8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    num_left = len(widths) - num_right
    lines = []
    for row in rows:
        cells = [text.ljust(w) for text, w in zip(row[:num_left], widths, strict=False)]
        right = zip(row[num_left:], widths[num_left:], strict=True)
        cells += [text.rjust(w) for text, w in right]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
