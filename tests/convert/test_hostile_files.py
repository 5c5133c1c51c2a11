"""Files that lie: our error, or exactly what they say; soon, in little memory.

Files that are damaged at random are tests/fuzz'.
"""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from jaxbnb import convert, models


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


VALID = {
    "__metadata__": {"format": "pt"},
    "a": entry("F32", (2, 3), (0, 24)),
    "b": entry("U8", (5,), (24, 29)),
    "e": entry("I16", (0, 4), (29, 29)),
}


def try_reading(path):
    """Reads it all; the peak of memory is that of a small file whatever it says."""
    tracemalloc.start()
    try:
        checkpoint = convert.open_checkpoint(path)
        return checkpoint, {name: checkpoint.read(name) for name in checkpoint.tensors}
    except convert.CheckpointError as error:
        return None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 2**20


# safetensors.


def test_the_valid_file_is_read(folder, build):
    data = build.safetensors(VALID, bytes(29))
    (folder / "model.safetensors").write_bytes(data)
    _, arrays = try_reading(folder)
    assert {name: array.shape for name, array in arrays.items()} == {
        "a": (2, 3),
        "b": (5,),
        "e": (0, 4),
    }


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(offsets=(0, 12))}, 12, r"8 bytes, but the header gives it 12"),
        ({"a": entry(offsets=(0, 8))}, 7, "describes 8 bytes of tensors, but 7 follow"),
        ({"a": entry(offsets=(0, 8))}, 9, "describes 8 bytes of tensors, but 9 follow"),
        ({"a": entry(offsets=(8, 16))}, 16, "'a' starts at byte 8 .* leaves a hole"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' starts .* overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(offsets=(8, 0))}, 8, "data_offsets must be"),
        ({"a": entry(offsets=(-8, 0))}, 8, "data_offsets must be"),
        ({"a": entry(offsets=(0, 8, 9))}, 8, "data_offsets must be"),
        ({"a": entry(offsets=(0, 8.0))}, 8, "data_offsets must be"),
        ({"a": entry(offsets=(0, 10**30))}, 8, "but the header gives it"),
        ({"a": entry(shape=(-2,))}, 8, "a shape has"),
        ({"a": entry(shape=(True, 2))}, 8, "a shape has"),
        ({"a": entry(shape=(10**30,))}, 8, "a shape has"),
        ({"a": entry(shape=(0, 2**60), offsets=(0, 0))}, 0, "a shape has"),
        ({"a": entry(shape=[1] * 65)}, 8, "a shape has"),
        ({"a": entry() | {"shape": "2"}}, 8, "a shape has"),
        ({"a": entry("F8_E4M3", (8,))}, 8, "'a' is in F8_E4M3, the codes of"),
        ({"a": entry("F8_E4M3")}, 8, "2 bytes, but the header gives it 8"),
        ({"a": entry("F8_E3M4")}, 8, "'a' is in F8_E3M4, the codes of"),
        ({"a": entry(dtype="F4")}, 8, "'a' is in F4, the codes of"),
        ({"a": entry(dtype="C64")}, 8, "dtype 'C64'; jaxbnb reads .*'BF16'"),
        ({"a": entry(dtype=["F32"])}, 8, r"dtype \['F32'\]"),
        ({"a": entry() | {"more": 1}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": 1}, 8, "exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ must map"),
        ({"__metadata__": []}, 0, "__metadata__ must map"),
        ({"\ud800": entry()}, 8, "a tensor's name is not valid Unicode"),
        (b'{"a": 1, "a": 1}', 0, r"come twice: \['a'\]"),
        (b'{"a": {"dtype": "F32", "dtype": "F64"}}', 8, r"come twice: \['dtype'\]"),
        (b'{"a": ', 8, "not valid JSON"),
        (b'{"a": "\xff"}', 8, "not valid JSON"),
        (b"[1, 2]", 8, r"starts with '\{', got b'\[1, 2\]"),
        (b'{"a":' * 50_000, 8, "not valid JSON"),
        (b"\x80\x02}q\x00.", 8, "starts with '{'"),
        (b"", 8, "starts with '{'"),
    ],
)
def test_headers_that_lie(folder, build, header, data, message):
    path = folder / "model.safetensors"
    path.write_bytes(build.safetensors(header, bytes(data)))
    with pytest.raises(convert.CheckpointError, match=message) as error:
        convert.open_checkpoint(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64", "F4", "X"])
def test_dtypes_that_we_do_not_read_are_not_implemented(folder, build, dtype):
    shape = (8,) if dtype[:2] == "F8" else (2,)
    data = build.safetensors({"a": entry(dtype, shape)}, bytes(8))
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(NotImplementedError, match=dtype):
        convert.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "names no method"),
        ({"quantization_config": {}}, "names no method"),
        ({"quantization_config": {"quant_method": "fp8"}}, "names the method 'fp8'"),
        ({"quantization_config": "fp8"}, "names no method"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_float8_is_refused_whatever_the_config_says(
    folder, build, fields, said, is_sharded
):
    """Codes are not weights without their scales; nothing loads or copies them."""
    name = "one.safetensors" if is_sharded else "model.safetensors"
    data = build.safetensors({"up_proj.weight": entry("F8_E4M3", (8,))}, bytes(8))
    (folder / name).write_bytes(data)
    if is_sharded:
        index = {"weight_map": {"up_proj.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | fields))
    message = (
        rf"{name}: tensor 'up_proj.weight' is in F8_E4M3, .* in bfloat16 .* {said}"
    )
    for read in (convert.open_checkpoint, models.load_pretrained):
        with pytest.raises(convert.UnsupportedCheckpointError, match=message):
            read(folder)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 100, 10**8 + 1])
def test_a_header_longer_than_the_file_costs_nothing(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    _, message = try_reading(folder)
    assert f"2 bytes and should begin with a header of {length:,}" in message.replace(
        "10 bytes", "2 bytes"
    )


def test_a_header_beyond_the_format(folder):
    # A sparse file: it takes no room on the disk.
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 * 10**8) + b"{}")
        file.truncate(3 * 10**8)
    _, message = try_reading(folder)
    assert "a header of 200,000,000 bytes; the format allows 100,000,000" in message


@pytest.mark.parametrize("size", range(0, 240, 7))
def test_a_truncated_safetensors_file(folder, build, size):
    data = build.safetensors(VALID, bytes(29))
    assert size < len(data)
    (folder / "model.safetensors").write_bytes(data[:size])
    _, message = try_reading(folder)
    assert "truncated" in message


# GGUF.


def test_a_truncated_gguf(tmp_path, build):
    whole = build.gguf(build.metadata(), build.tensors())
    header = whole.index(b"output_norm.weight") + 64
    path = tmp_path / "x.gguf"
    for size in [*range(0, header, 97), header, len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:size])
        checkpoint, message = try_reading(path)
        assert checkpoint is None
        assert "truncated" in message or "not a GGUF" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"starts with b''"),
        (b"GG", r"starts with b'GG'"),
        (b"PK\x03\x04 a zip", r"not a GGUF file: it starts with b'PK"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<I", 1), "version 1 of GGUF"),
        (b"GGUF" + struct.pack("<I", 4), "version 4 of GGUF"),
        (b"GGUF" + struct.pack(">I", 3), "a big-endian file of GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "announces 9,223.* tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "announces 1,099.* metadata"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40) + bytes(9), "takes 1,099"),
    ],
)
def test_ggufs_that_lie(tmp_path, data, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(convert.CheckpointError, match=message) as error:
        convert.open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IIQ", 9, 4, 2**60), "announces .* values in metadata 'k'"),
        (struct.pack("<IIQ", 9, 8, 2**60), "announces .* strings in metadata 'k'"),
        (struct.pack("<IIQ", 9, 9, 1) + bytes(20), "nested array"),
        (struct.pack("<IIQ", 9, 99, 1) + bytes(20), "unknown type 99"),
        (struct.pack("<I", 99) + bytes(20), "unknown type 99"),
        (struct.pack("<IQ", 8, 2**62) + bytes(20), "metadata 'k' takes"),
        (struct.pack("<IQ", 8, 2) + b"\xff\xff" + bytes(20), "not UTF-8"),
    ],
)
def test_metadata_that_lies(tmp_path, value, message):
    key = struct.pack("<Q", 1) + b"k"
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
    _, got = try_reading(path)
    assert message.partition(" .* ")[2] in got
    with pytest.raises(convert.CheckpointError, match=message):
        convert.open_checkpoint(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 33), "a multiple of 32, the block of Q4_1"),
        ((0, 64), "must be positive"),
        ((2**50, 32), "must be positive"),
        ((1, 1, 1, 1, 32), "5 axes"),
        ((64, 32), "starts at byte"),
        ((128, 64), "starts at byte"),
        ((32, 128), "has shape"),
    ],
)
def test_shapes_that_lie(tmp_path, build, shape, message):
    tensors = build.tensors()
    _, kind, raw = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = (shape, kind, raw)
    path = tmp_path / "x.gguf"
    path.write_bytes(build.gguf(build.metadata(), tensors))
    with pytest.raises(convert.CheckpointError, match=message):
        convert.open_checkpoint(path)


def test_names_and_keys_that_come_twice(tmp_path, build):
    path = tmp_path / "x.gguf"
    whole = build.gguf(build.metadata(), build.tensors())
    path.write_bytes(whole.replace(b"blk.1.attn_v", b"blk.1.attn_k"))
    with pytest.raises(convert.CheckpointError, match="the same name"):
        convert.open_checkpoint(path)
    path.write_bytes(whole.replace(b"ggml.bos_token", b"ggml.eos_token"))
    with pytest.raises(convert.CheckpointError, match="eos_token_id' comes twice"):
        convert.open_checkpoint(path)


def test_bytes_after_the_last_tensor(tmp_path, build):
    path = tmp_path / "x.gguf"
    whole = build.gguf(build.metadata(), build.tensors())
    path.write_bytes(whole + bytes(32))
    with pytest.raises(convert.CheckpointError, match="32 bytes follow the last"):
        convert.open_checkpoint(path)


def test_bfloat16_is_what_it_says(folder, build):
    data = build.safetensors({"a": entry("BF16", (4,))}, b"\x80\x3f" * 4)
    (folder / "model.safetensors").write_bytes(data)
    array = convert.open_checkpoint(folder).read("a")
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(np.float32).tolist() == [1.0] * 4
