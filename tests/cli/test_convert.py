import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxbnb import cli
from jaxbnb.convert import safetensors_files


def run(*arguments, verb="convert"):
    return cli.main([verb, *map(str, arguments)])


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
    assert "lowest SQNR " in out
    assert run(tmp_path / "out", verb="inspect") == 0
    out = capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "model.safetensors")
    total = sum(array.nbytes for array in stored.values())
    assert f"a.weight [4, 64] nf4, double {total}" in " ".join(out.split())


@pytest.mark.parametrize("terminal", [False, True])
def test_an_interrupted_one_goes_on(source, tmp_path, capsys, monkeypatch, terminal):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((4, 64), np.float32) for name in "abcd"}
    save_file(tensors, source / "model.safetensors")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    read, reader = [], safetensors_files.read_tensor

    def interrupted(*arguments):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(1)
        return reader(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "read_tensor", interrupted)
        assert run(source, tmp_path / "out") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "interrupted: the same command continues from here"
    assert terminal or err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        safetensors_files, "read_tensor", lambda *a: read.append(1) or reader(*a)
    )
    assert run(source, tmp_path / "out") == 0
    assert len(read) == 4
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_inspect_what_cannot_be_read(tmp_path, capsys):
    assert run(tmp_path, "--summary", verb="inspect") == 1
    assert "it is empty" in capsys.readouterr().err


def test_a_format_that_only_flax_has_is_named_briefly(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--quant", "int8") == 1
    err = capsys.readouterr().err
    assert "it cannot read int8 in blocks of 64. To write a Flax model in it: " in err
    assert "--to flax" in err
    assert "QuantConfig(" not in err


def test_the_source_stays_as_it_is(source, capsys):
    (source.parent / "link").symlink_to(source)
    assert run(source.parent / "link", source / "sub") == 1
    assert "is inside the source" in capsys.readouterr().err
    assert sorted(p.name for p in source.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_an_adapter_is_not_a_model(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    for arguments, verb in [([], "inspect"), ([tmp_path / "out"], "convert")]:
        assert run(tmp_path, *arguments, verb=verb) == 1
        assert "jaxbnb.lora.load_adapter(model, folder)" in capsys.readouterr().err


def test_a_file_without_a_config(source, capsys):
    assert run(source / "model.safetensors", verb="inspect") == 0
    out = capsys.readouterr().out
    assert f"give the folder that holds both, e.g. {source}\n" in out


@pytest.mark.parametrize("option", ["--dry-run", "--to=bitsandbytes"])
def test_what_is_left_unquantised_is_said(source, tmp_path, capsys, option):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (4, 64), "b.weight": (4, 48), "lm_head.weight": (9, 48)}
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    assert run(source, tmp_path / "out", "--quant", "nf4", option) == 0
    line = "not quantised: 1 of 2 linear layers, 0.0 MB, e.g. b.weight"
    out = capsys.readouterr().out
    assert f"{line} (rows of 48, not a multiple of 64)\n" in out


def test_compressed_tensors(source, tmp_path, capsys):
    tensors = {"a.weight": np.ones((8, 96), np.float32)}
    save_file(tensors, source / "model.safetensors")
    to = ["--to", "compressed-tensors"]
    for quant, dtype in (("int4", "int32"), ("fp8_e4m3", "float8_e4m3fn")):
        block = ["--block-size", "32"] if quant == "int4" else []
        assert run(source, tmp_path / quant, *to, "--quant", quant, *block) == 0
        infos = safetensors_files.read_header(tmp_path / quant / "model.safetensors")
        assert dtype in {info.dtype.name for info in infos.values()}
    assert run(source, tmp_path / "out", *to, "--quant", "nf4") == 1
    assert "compressed-tensors cannot store nf4. It has int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--to", "compressed-tensors"], "needs a --quant"),
        (["out", "--block-size", "32"], "--block-size needs a format"),
        (["out.gguf", "--quant", "nf4"], "--quant nf4: --to gguf takes one of q8_0"),
        (["out", "--quant", "q8_0"], "--quant q8_0: --to safetensors takes one of nf4"),
        (["out.gguf", "--quant", "q8_0", "--block-size", "32"], "has its own blocks"),
    ],
)
def test_arguments_that_contradict_each_other(source, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(source, *arguments)
    assert message in capsys.readouterr().err
