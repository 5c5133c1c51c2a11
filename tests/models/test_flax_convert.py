import os
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

from jaxbnb import convert, models
from jaxbnb.cli import main
from jaxbnb.convert import CheckpointError, open_checkpoint, safetensors_files
from jaxbnb.core import QuantConfig
from jaxbnb.models import flax_folder

QUANT = QuantConfig("int8", block_size=32, double_quant=True)
MIDDLE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(toy, tmp_path_factory):
    def change(tensors):
        tensors["model.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    folder = tmp_path_factory.mktemp("in") / "toy"
    return toy.save(toy.model(tie_word_embeddings=True), folder, change=change)


@pytest.fixture(scope="module")
def want(source):
    return values(models.load_pretrained(source, quant=QUANT))


def values(model):
    return {
        path: jax.tree.map(np.asarray, variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def assert_complete(folder, want):
    """It loads as the model, and nothing else lies there."""
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "flax.json",
        "state",
    ]
    got = values(models.load_pretrained(folder))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_tensor_is_reported(source, want, tmp_path):
    reports, calls = [], []
    nbytes = models.convert_to_flax(
        source,
        tmp_path / "out",
        quant=QUANT,
        progress=lambda *call: calls.append(call),
        report=reports.append,
    )
    assert_complete(tmp_path / "out", want)
    assert nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(want))
    assert calls[-1][:2] == (nbytes, nbytes)
    assert sum(report.nbytes for report in reports) == nbytes
    found = {report.name: report for report in reports}
    assert set(found) == set(convert.open_checkpoint(source).tensors)
    middle = found[MIDDLE]
    assert middle.result == "int8"
    assert middle.place == "model.layers.layer.mlp.up_proj.kernel[1] (transposed)"
    # Uniform noise of absmax / 254 beside normal values: some 40 dB and more.
    weight = convert.open_checkpoint(source).read(MIDDLE).T
    kernel = want["model", "layers", "layer", "mlp", "up_proj", "kernel"]
    error = weight - np.asarray(jax.tree.map(jax.numpy.asarray, kernel)[1].dequantize())
    sqnr = 10 * np.log10((weight**2).sum() / (error**2).sum())
    np.testing.assert_allclose(middle.sqnr, sqnr, rtol=1e-5)
    redundant = found["model.rotary_emb.inv_freq"]
    assert (redundant.result, redundant.nbytes) == ("left out", 0)
    plan = models.plan_to_flax(source, quant=QUANT)
    assert [(r.name, r.nbytes, r.place) for r in plan] == [
        (r.name, r.nbytes, r.place) for r in reports
    ]


def test_a_kill_while_encoding(source, want, tmp_path, monkeypatch):
    code = """
import os, signal, sys
from jaxbnb import QuantConfig, models
def kill(done, total, name):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
quant = QuantConfig("int8", block_size=32, double_quant=True)
models.convert_to_flax(sys.argv[1], sys.argv[2], quant=quant, progress=kill)
"""
    command = [sys.executable, "-c", code, source, tmp_path / "out", MIDDLE]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert left(tmp_path) == [".out.resume.partial"]
    read, reader = [], safetensors_files.read_tensor
    monkeypatch.setattr(
        safetensors_files, "read_tensor", lambda *args: read.append(1) or reader(*args)
    )
    calls = []
    models.convert_to_flax(
        source, tmp_path / "out", quant=QUANT, progress=lambda *c: calls.append(c)
    )
    names = [name for _, _, name in calls]
    # What was encoded is not read again, but the tensor that was being written is.
    assert len(read) == len(convert.open_checkpoint(source).tensors) - 1 - names.index(
        MIDDLE
    )
    assert_complete(tmp_path / "out", want)


def test_an_interrupt_while_orbax_writes(source, want, tmp_path, monkeypatch):
    real = flax_folder._checkpointer

    class Interrupted(orbax.checkpoint.StandardCheckpointer):
        def save(self, path, state):
            super().save(path, dict(list(state.items())[:3]))
            self.wait_until_finished()
            # As of a kill meanwhile.
            (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
            raise KeyboardInterrupt

    monkeypatch.setattr(flax_folder, "_checkpointer", lambda alone: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        models.convert_to_flax(source, tmp_path / "out", quant=QUANT)
    assert left(tmp_path) == [".out.resume.partial"]
    monkeypatch.setattr(flax_folder, "_checkpointer", real)

    def never(*arguments):
        raise AssertionError("a tensor was read again")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "read_tensor", never)
        models.convert_to_flax(source, tmp_path / "out", quant=QUANT)
    assert_complete(tmp_path / "out", want)


def test_an_error_leaves_nothing(source, tmp_path):
    with pytest.raises(OSError, match="quota"):
        models.convert_to_flax(source, tmp_path / "out", progress=_fail)
    assert left(tmp_path) == []


def _fail(done, total, name):
    raise OSError("quota")


def test_on_the_command_line(source, tmp_path, capsys):
    out = tmp_path / "out"
    options = [os.fspath(source), os.fspath(out), "--to", "flax", "--quant", "int8"]
    assert main(["convert", *options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "in the model" in printed
    assert "left out" in printed
    assert not out.exists()
    assert main(["convert", *options, "--report"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.layer.mlp.up_proj.kernel[1] (transposed)" in printed
    assert "lowest SQNR " in printed
    # Both kinds of conversion count the tensors of the source.
    count = len(open_checkpoint(source).tensors)
    assert f"{out}: {count} tensors, " in printed
    assert main(["convert", os.fspath(source), f"{out}-nf4", "--quant", "nf4"]) == 0
    assert f"{out}-nf4: {count} tensors, " in capsys.readouterr().out
    assert main(["convert", os.fspath(out), f"{out}-back"]) == 1
    assert "cannot be converted back; load it with" in capsys.readouterr().err


def test_no_config_says_which_model(source):
    with pytest.raises(CheckpointError, match=f"give the folder .* {source}$"):
        models.load_pretrained(source / "model.safetensors")


def test_the_source_stays_as_it_is(source):
    before = left(source)
    with pytest.raises(ValueError, match="is inside the source"):
        models.convert_to_flax(source, source / "a" / "b")
    assert left(source) == before
