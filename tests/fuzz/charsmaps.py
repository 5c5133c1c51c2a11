"""SentencePiece's maps of characters, as its own files and tokenizer.json have them."""

import base64
import struct


def charsmap(texts):
    """Writes a map: a double-array trie of the keys, and what stands for each.

    A node has 256 units of its own, which wastes them, and is right.

    Args:
        texts: what stands for what, both of them strings.
    """
    values = {key.encode(): text.encode() for key, text in texts.items()}
    prefixes = sorted({key[:end] for key in values for end in range(len(key) + 1)})
    place = {prefix: 256 * (i + 1) for i, prefix in enumerate(prefixes)}
    units = [place[b""] << 10] + [0] * (256 * (len(prefixes) + 1) - 1)
    heap = b""
    for prefix in prefixes[1:]:
        unit = place[prefix[:-1]] ^ prefix[-1]
        # The label, whether a key ends here, and the way to the node.
        units[unit] = prefix[-1] | (prefix in values) << 8
        units[unit] |= (unit ^ place[prefix]) << 10
        if prefix in values:
            units[place[prefix]] = 1 << 31 | len(heap)
            heap += values[prefix] + b"\0"
    table = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(table)) + table + heap


def encode(data):
    return base64.b64encode(data).decode()
