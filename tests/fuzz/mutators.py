"""Small damage to files: to bytes, to JSON, to what lies in an archive or a header.

Every function takes a ``random.Random`` and changes nothing in place.
"""

import copy
import io
import json
import math
import pickle
import struct
import zipfile

import numpy as np

# A text's characters of grammar, and digits.
_CHARACTERS = b'0123456789"{}[],:.-+ae \\u\n'
_INTEGERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
# What no one expects where something else was. JSON has no number of 5,000 digits that
# Python would write, so a text stands for it.
_HUGE = "@5000 digits@"
_ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e-320, 1e308, math.inf, math.nan),
    *(2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, _HUGE),
    *("", " ", "x", "0", "-1", "\0", "\ud800", "\u2581", "\U0001f600", "é" * 300),
    *("((", "(?i)a", "[a", "{{", "%s", "../x", "None", "float32", "x" * 5000),
    *([], {}, [[]], [None], [0], [1.5], ["x"], {"": None}, {"content": 5}),
    *([["a", "b"]], [0] * 1000, {"x": {"x": {"x": {}}}}),
)


def damage(name, data, rng):
    """The content of a file, with something wrong in it.

    Args:
        name: file name; its suffix decides which kinds of damage are possible.
        data: its bytes.
        rng: decides the rest.
    """
    kinds = _BY_SUFFIX.get(name.rpartition(".")[2], (damage_bytes,))
    return rng.choice(kinds)(data, rng)


def _few(rng):
    # Most often one: of several, the one that is refused hides the others.
    return rng.choice([1, 1, 1, 1, 2, 3])


def damage_bytes(data, rng):
    """Changes up to three places: bytes, integers, ranges, or the end is cut off."""
    data = bytearray(data)
    for _ in range(_few(rng)):
        at = rng.randrange(len(data) + 1)
        kind = rng.choice(["put", "put", "text", "insert", "integer", "range", "cut"])
        if kind == "put":
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == "text":
            data[at : at + 1] = bytes([rng.choice(_CHARACTERS)])
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.choice([1, 1, 8]))
        elif kind == "integer":
            size, code = rng.choice([(4, "<I"), (8, "<Q")])
            value = rng.choice(_INTEGERS) % 2 ** (8 * size)
            data[at : at + size] = struct.pack(code, value)
        elif kind == "range":
            other = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 16)] = data[
                other : other + rng.randint(0, 16)
            ]
        elif rng.random() < 0.5:
            del data[at:]
    return bytes(data)


def damage_text(data, rng):
    """Puts up to three characters of JSON's grammar in the place of others."""
    data = bytearray(data)
    for _ in range(_few(rng) if data else 0):
        data[rng.randrange(len(data))] = rng.choice(_CHARACTERS)
    return bytes(data)


def damage_json(data, rng):
    """Changes values, keys and types, so that it still is JSON."""
    return to_json(damage_value(json.loads(data), rng))


def to_json(value):
    """The bytes of a JSON text, with what `damage_value` may have put in."""
    text = json.dumps(value).replace(json.dumps(_HUGE), "9" * 5000)
    return text.encode()


def damage_value(value, rng):
    """A tree of dicts, lists, scalars and arrays, with up to three changes."""
    root = [copy.deepcopy(value)]
    for _ in range(_few(rng)):
        holder, key = _somewhere(root, rng)
        _change(holder, key, root, rng)
    return root[0] if root else None


def _somewhere(root, rng):
    """A container and a key of it; what lies high is met more often."""
    holder, key = root, 0
    while (
        isinstance(holder[key], (dict, list))
        and holder[key]
        and (holder is root or rng.random() < 0.7)
    ):
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = rng.choice(keys)
    return holder, key


def _change(holder, key, root, rng):
    value = holder[key]
    kind = rng.choice(["odd", "odd", "near", "near", "other", "drop", "twice", "wrap"])
    if kind == "odd":
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    elif kind == "near":
        holder[key] = _near(value, rng)
    elif kind == "other":
        other, place = _somewhere(root, rng)
        holder[key] = copy.deepcopy(other[place])
    elif kind == "drop" and holder is not root:
        del holder[key]
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif kind == "twice":
        holder[_near(key, rng) if isinstance(key, str) else (key, 1)] = value
    elif kind == "wrap":
        holder[key] = [value] if rng.random() < 0.5 else {"content": value}


def _near(value, rng):
    """Another value of the same type, that might have been meant."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            [
                value + 1,
                value - 1,
                -value,
                value * 2,
                value // 2,
                value * 2**20,
                # Python has no float of 400 digits.
                value * 1.0 if abs(value) < 10**300 else 1e300,
            ]
        )
    if isinstance(value, float):
        return rng.choice([-value, value * 2, value / 3, value * 1e30, 0.0, math.nan])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(["", "x", "\u2581", "."]) + value[at + 1 :]
    if isinstance(value, np.ndarray):
        return _near_array(value, rng)
    if isinstance(value, list):
        return rng.choice([value[::-1], value[:1], value + value])
    if isinstance(value, dict):
        return dict(list(value.items())[: len(value) // 2])
    return [value]


def _near_array(value, rng):
    flat = value.reshape(-1)
    kind = rng.choice(["shape", "short", "type", "value", "none"])
    if kind == "shape":
        return value[None] if rng.random() < 0.5 else flat
    if kind == "short":
        return flat[: flat.size // 2]
    if kind == "type":
        return value.astype(
            rng.choice([np.int32, np.uint8, np.float64, np.complex64, object])
        )
    if kind == "value" and flat.size:
        changed = flat.copy()
        odd = [0, 1, 255] if changed.dtype.kind in "iub" else [0, -1, np.inf, np.nan]
        changed[rng.randrange(flat.size)] = rng.choice(odd)
        return changed.reshape(value.shape)
    return np.zeros((0,), value.dtype)


# Formats.


def _damage_safetensors_bytes(data, rng):
    """Bytes of the header, its length among them, which are all but a few."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return damage_bytes(data[:end], rng) + data[end:]


def _damage_safetensors_header(data, rng):
    end = 8 + struct.unpack("<Q", data[:8])[0]
    text = damage_json(data[8:end], rng)
    return struct.pack("<Q", len(text)) + text + data[end:]


def _damage_safetensors_texts(data, rng):
    """The JSON that lies in tensors, as bitsandbytes' states do; the header is true."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, body, parts = json.loads(data[8:end]), data[end:], []
    metadata = {k: header.pop(k) for k in ("__metadata__",) if k in header}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        parts.append((name, entry, body[first:last]))
    texts = [i for i, (_, _, part) in enumerate(parts) if part[:1] == b"{"]
    if not texts:
        return _damage_safetensors_header(data, rng)
    name, entry, part = parts[rng.choice(texts)]
    changed = rng.choice([damage_json, damage_text])(part, rng)
    end, header = 0, {}
    for other, info, content in sorted(parts, key=lambda p: p[1]["data_offsets"]):
        if other == name:
            content, info = changed, info | {"shape": [len(changed)]}
        header[other] = info | {"data_offsets": [end, end + len(content)]}
        end += len(content)
    body = b"".join(
        changed if other == name else content
        for other, _, content in sorted(parts, key=lambda p: p[1]["data_offsets"])
    )
    text = json.dumps(metadata | header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _damage_pickle(data, rng):
    """A pickled tree of ours: its values, not the pickle."""
    return pickle.dumps(damage_value(pickle.loads(data), rng))


def _damage_zip(data, rng):
    """Damages one file of an archive, and corrects the checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        names = old.namelist()
        # The pickle says all the others are.
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = rng.choice(pickles * len(names) + names)
        for name in names:
            content = old.read(name)
            new.writestr(
                name, damage_bytes(content, rng) if name == chosen else content
            )
    return packed.getvalue()


_BY_SUFFIX = {
    "json": (damage_json, damage_json, damage_json, damage_text, damage_bytes),
    "safetensors": (
        *(_damage_safetensors_bytes, _damage_safetensors_header),
        *(_damage_safetensors_texts, damage_bytes),
    ),
    "pickle": (_damage_pickle,),
    "bin": (_damage_zip, damage_bytes),
}
