"""train over weights in the format that their checkpoint stores them in."""

import dataclasses

import numpy as np
import pytest

from jaxbnb import QuantConfig, convert, lora, models
from jaxbnb.core import tree_nbytes
from jaxbnb.finetune import ConfigError, TrainConfig, train
from jaxbnb.planning import plan
from tests.finetune import toy

pytest.importorskip("gguf")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

ROWS = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy.write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """A GGUF file with blocks in all linear layers except for down_proj's.

    Rows of that have 48 elements, which blocks of 32 do not divide.
    """
    path = tmp_path_factory.mktemp("gguf") / "q8_0.gguf"
    models.convert_to_gguf(folder, path, quant="q8_0")
    return path


@pytest.fixture
def make_config(folder, tmp_path):
    def make_config(model, **changes):
        fields = {
            "model": str(model),
            "tokenizer": str(folder),
            "out": str(tmp_path / "run"),
            "steps": 4,
            "accumulate": 1,
            "quant": "stored",
        }
        return TrainConfig(**{**toy.RUN, **fields, **changes})

    return make_config


def read_losses(config):
    return [line["loss"] for line in toy.read_lines(config)]


def test_a_gguf_file_stays_packed(make_config, file, tmp_path, capsys):
    """The losses are those over the decoded weights, also after an interruption."""
    config = make_config(file)
    with pytest.raises(toy.StopError):
        train(config, data=ROWS, loggers=[toy.StopAfter(3)])
    stored = train(dataclasses.replace(config, resume=True), data=ROWS)
    said = capsys.readouterr().err
    assert "adapters of rank 4 over int8_scaled" in said
    assert f"--adapter {tmp_path}/run/adapter --quant stored --dtype float32" in said
    other = make_config(file, quant=None, out=str(tmp_path / "decoded"))
    decoded = train(other, data=ROWS)
    assert stored.weight_bytes < decoded.weight_bytes
    # Products are summed in another order, which four steps amplify little.
    np.testing.assert_allclose(read_losses(config), read_losses(other), rtol=1e-5)
    model = models.load_pretrained(file, quant="stored")
    assert lora.load_adapter(model, tmp_path / "run/adapter")


@pytest.mark.parametrize("kind", ["compressed-tensors", "flax"])
def test_folders(make_config, folder, tmp_path, kind):
    path = tmp_path / "packed"
    if kind == "flax":
        models.convert_to_flax(folder, path, quant="int8")
    else:
        blocks = QuantConfig("uint8", block_size=16)
        convert.convert_checkpoint(folder, path, quant=blocks, to=kind)
    result = train(make_config(path, steps=2), data=ROWS)
    assert result.is_complete


@pytest.fixture
def unreadable(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("jaxbnb.finetune._train.load_pretrained", refuse)


@pytest.mark.usefixtures("unreadable")
def test_what_cannot_be_kept(make_config, folder, file, tmp_path):
    with pytest.raises(ConfigError, match="stores no weight quantised"):
        train(make_config(folder), data=ROWS)
    other = tmp_path / "q5_1.gguf"
    models.convert_to_gguf(folder, other, quant="q5_1")
    with pytest.raises(ConfigError, match=r"stores Q5_1 .*no linear layer that can"):
        train(make_config(other), data=ROWS)
    with pytest.raises(ConfigError, match="quant='stored' freezes the linear layers"):
        make_config(file, full=True)


@pytest.mark.usefixtures("unreadable")
def test_what_is_quantised_is_not_quantised_again(make_config, folder, tmp_path):
    path = tmp_path / "flax"
    models.convert_to_flax(folder, path, quant="int8", dtype="float32")
    with pytest.raises(ConfigError, match="quantised already, as int8: give quant='st"):
        train(make_config(path, quant="nf4"), data=ROWS)
    with pytest.raises(ConfigError, match="stores as int8 stay frozen: give the"):
        train(make_config(path, quant=None, full=True), data=ROWS)
    with pytest.raises(ConfigError, match="'stored' and 'float32'"):
        train(make_config(path, dtype="bfloat16"), data=ROWS)


@pytest.mark.usefixtures("unreadable")
def test_adapters_that_do_not_fit(make_config, file):
    """They are found before the weights are read."""
    for changes, message in (
        ({"target_modules": ("q",)}, "names none of the linear layers"),
        ({"trainable_tokens": (260,)}, "has the id 260"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(make_config(file, **changes), data=ROWS)


def test_a_plan(folder, file):
    made = plan(file, "t4", quant="stored", seq=32, dtype="float32", compile=False)
    model = models.load_pretrained(file, quant="stored", dtype="float32")
    # The plan also counts the adapters' random streams.
    assert 0 <= made.weight_bytes - tree_nbytes(model) < 100
    assert not any("quant" in change.option for change in made.changes)
    with pytest.raises(ValueError, match="stores no weight quantised"):
        plan(folder, "t4", quant="stored", seq=32, compile=False)
    with pytest.raises(ValueError, match="give a folder or a GGUF file as the model"):
        plan(folder / "config.json", "t4", quant="stored", seq=32, compile=False)
