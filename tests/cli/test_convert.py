import argparse
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxbnb.cli import _convert, _inspect


def run(*arguments):
    parser = argparse.ArgumentParser()
    _convert.add_arguments(parser)
    return _convert.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    save_file({"w": np.ones((250, 1000), np.float32)}, folder / "model.safetensors")
    return folder


def test_it_converts_and_says_what(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["w"].dtype == "bfloat16"
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out'}: 1 tensors, 0.5 MB, ")
    assert out.endswith(" s\n")
    assert err == ""


def test_on_a_terminal_one_line_is_redrawn(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(source, tmp_path / "out") == 0
    assert capsys.readouterr().err == "\r100% of 1.0 MB, 0 s left  w\x1b[K\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert run(tmp_path, tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip().startswith(f"error: {tmp_path} has no config.json; it is empty")


def test_errors_of_the_file_system(source, tmp_path, capsys):
    assert run(source, source) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "choose another name" in err
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "no such file" in capsys.readouterr().err


def test_an_unknown_dtype(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--dtype", "int4")
    assert "bfloat16" in capsys.readouterr().err


def test_quantised_with_a_report(source, tmp_path, capsys):
    options = ("--quant", "nf4", "--double-quant")
    save_file({"a.weight": np.ones((4, 64), np.float32)}, source / "model.safetensors")
    assert run(source, tmp_path / "out", *options, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert not (tmp_path / "out").exists()
    assert "a.weight (4, 64) float32 nf4" in " ".join(out.split())
    assert "does not load it: model_type 'toy'" in out
    assert err == ""
    assert run(source, tmp_path / "out", *options, "--report") == 0
    out = capsys.readouterr().out
    assert "1 quantised" in out
    assert "SQNR from " in out
    assert _inspect.run(argparse.Namespace(path=tmp_path / "out", summary=False)) == 0
    out = capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    total = sum(array.nbytes for array in stored.values())
    assert f"a.weight [4, 64] nf4, double {total}" in " ".join(out.split())


@pytest.mark.parametrize(
    "options",
    [["--double-quant"], ["--to", "bitsandbytes"], ["--quant", "nf5"]],
)
def test_options_that_do_not_fit(source, tmp_path, capsys, options):
    assert run(source, tmp_path / "out", *options) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_inspect_what_cannot_be_read(tmp_path, capsys):
    assert _inspect.run(argparse.Namespace(path=tmp_path, summary=True)) == 1
    assert "it is empty" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dry-run", "--to=bitsandbytes"])
def test_what_is_left_unquantised_is_said(source, tmp_path, capsys, option):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (4, 64), "b.weight": (4, 48), "lm_head.weight": (9, 48)}
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    assert run(source, tmp_path / "out", "--quant", "nf4", option) == 0
    line = "not quantised: 1 of 2 linear layers, 0.0 MB, as b.weight"
    out = capsys.readouterr().out
    assert f"{line} (rows of 48, no multiple of 64)\n" in out
