import json
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxbnb import convert
from jaxbnb.convert import safetensors_files

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def arrays():
    """Every dtype that we read, and a scalar, and an empty tensor."""
    found = {
        f"of_{dtype}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES
    }
    found["of_bf16"] = np.arange(-3, 3).astype(ml_dtypes.bfloat16)
    found["scalar"] = np.array(2.5, np.float32)
    found["empty"] = np.zeros((0, 5), np.float16)
    found["ünïcode \n 名"] = np.ones(3, np.uint8)
    return found


def infos(found):
    return {
        name: convert.TensorInfo(array.shape, array.dtype)
        for name, array in found.items()
    }


def assert_holds(checkpoint, found):
    assert set(checkpoint.tensors) == set(found)
    for name, array in found.items():
        info, got = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.shape, info.dtype) == (array.shape, array.dtype)
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        assert info.nbytes == got.nbytes
        np.testing.assert_array_equal(got, array)
        mapped = checkpoint.map(name)
        assert (mapped.shape, mapped.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(mapped, array)


def test_what_the_library_writes_we_read(folder):
    save_file(arrays(), folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = convert.open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "toy"}
    assert_holds(checkpoint, arrays())


def test_what_we_write_the_library_reads(tmp_path):
    path, found = tmp_path / "model.safetensors", arrays()
    start, starts = safetensors_files.layout(infos(found))
    with path.open("wb", buffering=0) as file:
        safetensors_files.write_bytes(file, start)
        for name, array in found.items():
            file.seek(starts[name])
            assert safetensors_files.write_bytes(file, array) == array.nbytes
    loaded = load_file(path)
    assert set(loaded) == set(found)
    for name, array in loaded.items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(array, found[name])


def test_our_file_is_aligned_and_says_format_pt(tmp_path):
    found = arrays()
    start, starts = safetensors_files.layout(infos(found))
    length = int.from_bytes(start[:8], "little")
    assert length == len(start) - 8
    header = json.loads(start[8:])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % found[name].dtype.itemsize == 0
        assert starts[name] == len(start) + entry["data_offsets"][0]


def write_shards(folder, found, **index):
    names = list(found)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: found[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map | index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder):
    write_shards(folder, arrays())
    assert_holds(convert.open_checkpoint(folder), arrays())


def test_one_file_is_preferred_to_shards(folder):
    write_shards(folder, arrays())
    save_file({"only": np.ones(2)}, folder / "model.safetensors")
    assert list(convert.open_checkpoint(folder).tensors) == ["only"]


def test_shards_may_be_symbolic_links(folder, tmp_path):
    # So lies a snapshot in Hugging Face's cache.
    write_shards(folder, arrays())
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert_holds(convert.open_checkpoint(folder), arrays())


@pytest.mark.parametrize(
    "shard",
    [
        *("../b.safetensors", "/etc/passwd", "..", ".", "", "sub/b.safetensors"),
        *("a\\b", "a\0", "ä.safetensors", "a" * 300, 7, None, ["b.safetensors"]),
    ],
)
def test_an_index_reaches_no_other_folder(folder, shard):
    (folder.parent / "b.safetensors").write_bytes(b"secret")
    write_shards(folder, arrays(), of_f4=shard)
    with pytest.raises(convert.CheckpointError, match="plain name of a file") as error:
        convert.open_checkpoint(folder)
    assert "of_f4" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_shard_that_is_not_there(folder):
    write_shards(folder, arrays())
    (folder / "b.safetensors").unlink()
    with pytest.raises(convert.CheckpointError, match=r"1 shards .* 'b\.safetensors'"):
        convert.open_checkpoint(folder)


def test_a_shard_without_its_tensor(folder):
    write_shards(folder, arrays(), more="b.safetensors")
    with pytest.raises(convert.MissingTensorError, match=r"'more' in 'b\.safetensors'"):
        convert.open_checkpoint(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "{", '{"a": 1'])
def test_a_corrupt_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(convert.CheckpointError, match=r"index\.json"):
        convert.open_checkpoint(folder)


def test_a_folder_without_config_lists_what_it_holds(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(convert.CheckpointError, match=r"no config\.json.*weights\.bin"):
        convert.open_checkpoint(tmp_path)
    (tmp_path / "llama.gguf").touch()
    with pytest.raises(convert.CheckpointError, match=r"open the file.*llama\.gguf"):
        convert.open_checkpoint(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(convert.CheckpointError, match="it is empty"):
        convert.open_checkpoint(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "flax_model.msgpack").touch()
    message = r"pytorch_model\.bin.*flax_model\.msgpack.*Save it"
    with pytest.raises(convert.CheckpointError, match=message):
        convert.open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_corrupt_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(convert.CheckpointError, match=r"config\.json"):
        convert.open_checkpoint(folder)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the name of a model"):
        convert.open_checkpoint(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")


def test_a_bare_file(folder):
    found = arrays()
    save_file(found, folder / "weights.safetensors")
    checkpoint = convert.open_checkpoint(folder / "weights.safetensors")
    assert checkpoint.config == {}
    assert set(checkpoint.tensors) == set(found)
    name = next(iter(found))
    np.testing.assert_array_equal(checkpoint.read(name), found[name])
    with pytest.raises(convert.CheckpointError, match="open its folder"):
        convert.open_checkpoint(folder / "config.json")


def test_a_missing_tensor_gets_the_nearest_names(folder):
    save_file(arrays(), folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    with pytest.raises(convert.MissingTensorError, match=r"'of_f5'.*\['of_f") as error:
        checkpoint.read("of_f5")
    assert isinstance(error.value, convert.CheckpointError)
    with pytest.raises(convert.MissingTensorError, match=r"among its 16$"):
        checkpoint.read("nothing like it")


def test_a_file_that_changed_since_it_was_opened(folder):
    save_file({"w": np.ones(2)}, folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    save_file({"w": np.ones(3)}, folder / "model.safetensors")
    with pytest.raises(convert.CheckpointError, match=r"float64\[3\] now; open it"):
        checkpoint.read("w")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(convert.CheckpointError, match="'w'"):
        checkpoint.read("w")


def test_the_repr_is_short(folder):
    save_file(arrays(), folder / "model.safetensors")
    text = repr(convert.open_checkpoint(folder))
    assert text.endswith("'toy', 16 tensors, 0.0 MB)")


def test_without_safetensors_the_message_says_what_to_install(folder, monkeypatch):
    save_file(arrays(), folder / "model.safetensors")
    checkpoint = convert.open_checkpoint(folder)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    expected = r"^jaxbnb\.convert needs safetensors: pip install '\.\[convert\]' in"
    with pytest.raises(ImportError, match=expected):
        checkpoint.read("scalar")


def test_float8_is_read_as_it_is_stored(tmp_path):
    tensors = {
        "codes": np.arange(6, dtype=np.uint8)
        .reshape(2, 3)
        .view(ml_dtypes.float8_e4m3fn),
        "scales": np.full((2, 1), 127, np.uint8).view(ml_dtypes.float8_e8m0fnu),
        "bias": np.ones(3, np.float32),
    }
    path = tmp_path / "model.safetensors"
    header, starts = safetensors_files.layout(infos(tensors))
    with path.open("wb", buffering=0) as file:
        safetensors_files.write_bytes(file, header)
        for name in starts:
            safetensors_files.write_bytes(file, tensors[name])
    assert safetensors_files.read_header(path) == infos(tensors)
    read = safetensors_files.read_tensors(path, list(tensors))
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert read[name].tobytes() == x.tobytes()
