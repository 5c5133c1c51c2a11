"""pytorch_model.bin: whole, in shards, and with more in it than tensors."""

import json
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxbnb import convert

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.peers

FOUND = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.arange(4).to(torch.bfloat16),
    "turned": torch.arange(6).reshape(2, 3).T,
    "part": torch.arange(8, dtype=torch.int8)[2:5],
    "scalar": torch.tensor(1.5, dtype=torch.float16),
}
FOUND["tied"] = FOUND["a"]


def check(checkpoint):
    assert list(checkpoint.tensors) == list(FOUND)
    for name, tensor in FOUND.items():
        array = checkpoint.read(name)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.flags.owndata or array.base.flags.owndata
        np.testing.assert_array_equal(
            array.astype(np.float64), tensor.to(torch.float64).numpy()
        )
    assert checkpoint.tensors["half"].dtype == ml_dtypes.bfloat16


def test_whole_and_bare(folder):
    torch.save(FOUND, folder / "pytorch_model.bin")
    check(convert.open_checkpoint(folder))
    check(convert.open_checkpoint(folder / "pytorch_model.bin"))


def test_shards(folder):
    names = list(FOUND)
    for file, held in (("a.bin", names[:3]), ("b.bin", names[3:])):
        torch.save({name: FOUND[name] for name in held}, folder / file)
    weight_map = {name: "a.bin" if name in names[:3] else "b.bin" for name in names}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(convert.open_checkpoint(folder))
    for shard, message in (
        ("../a.bin", "must be the plain name"),
        ("a.safetensors", "which is not a .bin file"),
        ("c.bin", "1 shards that are not in the folder"),
        ("b.bin", "which does not have it"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {"a": shard}}))
        with pytest.raises(convert.CheckpointError, match=message):
            convert.open_checkpoint(folder)


def test_it_becomes_safetensors(folder, tmp_path):
    torch.save(FOUND, folder / "pytorch_model.bin")
    checkpoint = convert.convert_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    np.testing.assert_array_equal(checkpoint.read("turned"), FOUND["turned"].numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ["w", "w\ud800"])
def test_code_is_not_run(folder, tmp_path, key):
    path = folder / "pytorch_model.bin"
    torch.save({key: Evil(str(tmp_path / "ran"))}, path)
    with pytest.raises(convert.CheckpointError, match="do not use this checkpoint"):
        convert.open_checkpoint(folder)
    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "ran")), protocol=2))
    with pytest.raises(convert.CheckpointError, match="may contain code"):
        convert.open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"w": {"x": torch.ones(2)}}, r"\['w'\] are not named tensors"),
        ({1: torch.ones(2)}, r"\[1\] are not named tensors"),
        ([torch.ones(2)], "contains a list instead of a state_dict"),
        ({"w": torch.ones(1).expand(2**40)}, "more elements than the file stores"),
        ({"w": torch.ones(2).to_sparse()}, "dense tensors of"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "dense tensors of"),
        (
            {"w": torch.ones(2).to(torch.float8_e4m3fn)},
            "'w' is in torch.float8_e4m3fn, the codes of a .* names no method",
        ),
        ({"w": torch.ones(2, device="meta")}, "dense tensors of"),
    ],
)
def test_what_is_no_plain_state_dict(folder, found, message):
    torch.save(found, folder / "pytorch_model.bin")
    with pytest.raises(convert.CheckpointError, match=message):
        convert.open_checkpoint(folder)


def test_a_module_is_not_its_weights(folder):
    """What is said is all ours: one advice, in whole words and without colours."""
    path = folder / "full.bin"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(convert.CheckpointError) as raised:
        convert.open_checkpoint(path)
    assert str(raised.value) == (
        f"{path} contains more than tensors and asks for "
        "torch.nn.modules.container.Sequential, which could run code, so it is not "
        "read. If it is your file, save model.state_dict() instead, or safetensors. If "
        "it is a stranger's, do not use this checkpoint"
    )


def test_compressed(folder):
    torch.save(FOUND, folder / "plain.bin")
    with (
        zipfile.ZipFile(folder / "plain.bin") as plain,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", 8) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(convert.CheckpointError, match="is compressed"):
        convert.open_checkpoint(folder)


def test_without_torch(folder, monkeypatch):
    torch.save(FOUND, folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = r"reading pytorch_model\.bin needs torch: pip install torch$"
    with pytest.raises(ImportError, match=message):
        convert.open_checkpoint(folder)
