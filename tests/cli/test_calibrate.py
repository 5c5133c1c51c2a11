"""`jaxbnb calibrate`: from files to a folder that loads."""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig, calibration, cli
from jaxbnb.calibration import _matrix, search_scales
from jaxbnb.cli import _calibrate
from jaxbnb.convert import convert_checkpoint, load_tokenizer, open_checkpoint
from jaxbnb.core import files
from jaxbnb.lora import LoraConfig, add_adapter, load_adapter, merge, save_adapter
from jaxbnb.models import CausalLM, DecoderConfig, load_pretrained
from jaxbnb.models.tensors import collect_quantized
from jaxbnb.nnx import QuantLinear, dequantize_model

tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")
load_file, save_file = safetensors.load_file, safetensors.save_file

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,  # Not a multiple of 64: down_proj is not quantised.
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model of bytes, and a text."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(
        lambda: CausalLM(DecoderConfig(**SIZES), rngs=nnx.Rngs(0))
    )
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        name = ".".join(path[:-1]).replace(".layer.", ".{}.") + ".weight"
        shape = variable.shape[1:] if "layers" in path else variable.shape
        for number in range(2 if "layers" in path else 1):
            value = rng.standard_normal(shape[::-1]).astype(np.float32)
            tensors[name.format(number)] = value / (8 if value.ndim > 1 else 1)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.ascontiguousarray(embedding.T)
    save_file(tensors, folder / "model.safetensors")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    fields = {"model_type": "llama", "rope_parameters": rope, **SIZES}
    (folder / "config.json").write_text(json.dumps(fields))
    # One byte makes room for a merge.
    *tokens, _ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*tokens, "Ġi"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("Ġ", "i")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "text.txt").write_text("It is hard to measure what is not there. " * 10)
    return folder


def run(*arguments):
    return cli.main(["calibrate", *map(str, arguments)])


def test_a_folder_that_loads(source, tmp_path, capsys, monkeypatch):
    def tune(model, reference, batches, *, steps, seed, progress):
        """Compiling the real one would take as long as everything else."""
        assert isinstance(model.model.layers.layer.mlp.up_proj, QuantLinear)
        assert not isinstance(reference.model.layers.layer.mlp.up_proj, QuantLinear)
        assert (len(batches), seed) == (1, 0)
        return np.linspace(1, 0, steps).tolist()

    compared = []

    def compare_and_note(model, reference, batches):
        compared.append(model)
        return calibration.compare(model, reference, batches)

    monkeypatch.setattr(_calibrate, "tune", tune)
    monkeypatch.setattr(_calibrate, "compare", compare_and_note)
    options = "--data", source / "text.txt", "--samples", 8, "--seq", 32
    assert (
        run(source, tmp_path / "guided", *options, "--double-quant", "--tune", 4) == 0
    )
    out, err = capsys.readouterr()
    # Not on a terminal: a line for each tenth, of batches, matrices and steps.
    assert "100% of 1  gradients\n" in err
    assert len(re.findall(r" of 12  model\.layers\.", err)) == 11
    lines = [line.split() for line in out.splitlines()]
    up = next(line for line in lines if line[0] == "model.layers.layer.mlp.up_proj")
    assert up[1:3] == ["guided", "2"]
    assert "down_proj" not in out
    assert "4 steps of tuning: KL divergence on the data 1.0000 in the first" in out
    before, after, worst = (float(x.rstrip("%")) for x in up[3:6])
    assert after <= worst < before
    assert int(up[-1].replace(",", "")) > 50  # A process with JAX holds more.
    assert "on 4 windows of the data that were held out:\ncodes by" in out
    ((was, zero), plain, ours) = (
        [float(x) for x in line[-2:]] for line in lines[-4:-1]
    )
    labels = [line[:-2] for line in lines[-4:-1]]
    assert labels == [["not", "quantised"], ["absmax"], ["guided,", "tuned"]]
    assert zero == 0 < ours[1] < plain[1]
    assert plain[0] != was != ours[0]
    # The models that were compared have the codes that the lines name.
    compared = [collect_quantized(model) for model in compared]
    model = load_pretrained(tmp_path / "guided")
    assert isinstance(model.model.layers.layer.mlp.up_proj, QuantLinear)
    assert load_tokenizer(tmp_path / "guided").encode("a")
    # No method's codes are another's.
    assert run(source, tmp_path / "mse", "--method", "mse", "--double-quant") == 0
    convert_checkpoint(
        source, tmp_path / "absmax", quant=QuantConfig(double_quant=True)
    )
    kernels = [
        collect_quantized(load_pretrained(tmp_path / name))
        for name in ("guided", "mse", "absmax")
    ]
    assert len(kernels[0]) == 2 * 6
    for name in kernels[0]:
        guided, mse, absmax = (np.asarray(group[name].codes) for group in kernels)
        assert (guided != mse).any()
        assert (mse != absmax).any()
        for got, want in zip(compared, (guided, absmax), strict=True):
            np.testing.assert_array_equal(got[name].codes, want)


def test_on_a_terminal(source, tmp_path, capsys, monkeypatch):
    """One line is redrawn; --report has a line for each matrix."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = "--method", "mse", "--no-random-tokens", "--report"
    assert run(source, tmp_path / "out", *options) == 0
    out, err = capsys.readouterr()
    assert "\r  8% of 12  model.layers.layer.mlp.gate_proj\x1b[K" in err
    assert err.endswith("\r100% of 12  model.layers.layer.self_attn.v_proj\x1b[K\n")
    assert out.count("\nmodel.layers.") == 12
    assert re.search(r"\nmodel\.layers\.layer\.mlp\.up_proj, 1 +mse +1?\d\.\d", out)


def read(source, **options):
    args = {"data": [source / "text.txt"], "model": str(source), "samples": 3}
    args |= {"seq": 32, "seed": 0, **options}
    parts = _calibrate._read_data(argparse.Namespace(**args))
    return [np.concatenate([x.tokens for x in part], 1)[0] for part in parts]


def test_windows(source):
    """Those that are held out are others; the seed decides which."""
    train, held_out = read(source)
    assert len(train) == 3
    assert len(held_out) == 4
    windows = {row.tobytes() for row in (*train, *held_out)}
    assert len(windows) == 7
    again, other = read(source), read(source, seed=1)
    np.testing.assert_array_equal(again[0], train)
    assert (other[0] != train).any()


def test_the_same_seed_gives_the_same_bytes(source, tmp_path):
    options = "--data", source / "text.txt", "--samples", 3, "--seq", 32
    for name, seed in ("first", 0), ("again", 0), ("other", 1):
        assert run(source, tmp_path / name, *options, "--seed", seed) == 0
    assert content(tmp_path / "first") == content(tmp_path / "again")
    assert content(tmp_path / "first") != content(tmp_path / "other")


@pytest.mark.peers
def test_a_gguf_file(source, tmp_path, monkeypatch, capsys):
    """Also one with a tokenizer that could not be written in the end."""
    converted = shutil.copytree(source, tmp_path / "source")
    for merges in [["Ġ", "i"]], []:
        fields = json.loads((converted / "tokenizer.json").read_text())
        fields["model"]["merges"] = merges
        (converted / "tokenizer.json").write_text(json.dumps(fields))
        gguf = tmp_path / f"{len(merges)}.gguf"
        assert cli.main(["convert", str(converted), str(gguf)]) == 0
    assert run(tmp_path / "1.gguf", tmp_path / "out", "--method", "mse") == 0
    ours = load_pretrained(tmp_path / "out").model.layers.layer.mlp.up_proj
    assert isinstance(ours, QuantLinear)

    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(_calibrate, "load_pretrained", load)
    assert run(tmp_path / "0.gguf", tmp_path / "no", "--method", "mse") == 1
    assert "lacks tokenizer.ggml.merges" in capsys.readouterr().err


def test_weights_that_are_not_finite(source, tmp_path, capsys):
    broken = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.nan
    save_file(tensors, broken / "model.safetensors")
    for options in (), ("--no-random-tokens",):
        assert run(broken, tmp_path / "out", "--method", "mse", *options) == 1
        error = "error: model.layers.layer.self_attn.q_proj, layer 1: its weights are"
        assert f"{error} not finite\n" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_interrupted_comparison(source, tmp_path, monkeypatch, capsys):
    """Nothing is written before it, so that the same command continues."""
    options = "--data", source / "text.txt", "--samples", 3, "--seq", 32

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_calibrate, "compare", stop)
        assert run(source, tmp_path / "out", *options) == 130
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", *options) == 0
    assert "held out" in capsys.readouterr().out


def test_more_tokens_than_the_model_takes(source, tmp_path, capsys):
    options = "--data", source / "text.txt", "--samples", 1, "--seq", 65
    assert run(source, tmp_path / "out", *options) == 1
    assert "--seq 65 is more than the model takes: 64" in capsys.readouterr().err


def test_formats_of_our_own(source, tmp_path, capsys):
    options = "--quant", "int4", "--block-size", 32, "--double-quant"
    with pytest.raises(SystemExit):
        run(source, tmp_path / "int4", "--method", "mse", *options)
    message = "write int4 in blocks of 32: --to compressed-tensors or flax"
    assert message in capsys.readouterr().err
    # By the weights alone: their error is what is measured.
    options = *options, "--to", "flax", "--dtype", "bfloat16", "--no-random-tokens"
    assert run(source, tmp_path / "int4", "--method", "mse", *options) == 0
    model = load_pretrained(tmp_path / "int4")
    kernel = model.model.layers.layer.mlp.down_proj.kernel.get_raw_value()
    assert (kernel.quant_type, kernel.block_size, kernel.double_quant) == (
        *("int4", 32, True),
    )
    assert kernel.dtype == model.model.norm.scale.dtype == "bfloat16"
    plain = load_pretrained(source, dtype="bfloat16").model.layers.layer.mlp
    plain = np.asarray(plain.down_proj.kernel[...], np.float32)
    error = np.mean((kernel.dequantize("float32") - plain) ** 2) * 64
    # Levels are sevenths of the largest of 32 normal values, 2.1 on average.
    assert 0.5 < error / ((2.1 / 7) ** 2 / 12) < 1.2
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_codes_for_compressed_tensors(source, tmp_path, capsys):
    options = "--block-size", "32", "--to", "compressed-tensors"
    options = *options, "--method", "mse", "--no-random-tokens"
    arguments = ["calibrate", str(source), str(tmp_path / "out"), *options]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "compressed-tensors does not have nf4" in capsys.readouterr().err
    assert cli.main([*arguments, "--quant", "int4"]) == 0
    name = "model.layers.1.mlp.down_proj.weight"
    got = open_checkpoint(tmp_path / "out").read(name)
    weight = open_checkpoint(source).read(name)
    want = search_scales(weight.T, QuantConfig("int4", 32)).dequantize().T
    # Levels k / 7 times an absmax, or k times a seventh: three roundings apart.
    np.testing.assert_allclose(got, want, rtol=3 * 2**-23)


def test_adapters_are_merged_first(source, tmp_path, capsys):
    base = load_pretrained(source, quant=QuantConfig("nf4", double_quant=True))
    add_adapter(base, LoraConfig(r=2, init_lora_weights=False), rngs=nnx.Rngs(0))
    save_adapter(base, tmp_path / "adapter")
    options = "--method", "mse", "--quant", "int8", "--to", "compressed-tensors"
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", *options, "--adapter-quant", "nf4")
    assert "--adapter-quant needs an --adapter" in capsys.readouterr().err
    options = *options, "--adapter", tmp_path / "adapter"
    names = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    dequantize_model(base)
    merge(base)
    for folder, quant in (("decoded", "nf4"), ("original", None)):
        more = ("--adapter-quant", quant) if quant else ()
        assert run(source, tmp_path / folder, *options, *more) == 0
        shares = re.search(
            r"layers keep ([\d.]+)% of the .* ([\d.]+)%, in model\.layers",
            capsys.readouterr().out,
        )
        # Rounding to 127 levels moves a weight by much less than these updates.
        assert 90 < float(shares[2]) <= float(shares[1]) < 110
        got = open_checkpoint(tmp_path / folder)
        if quant is None:
            base = load_pretrained(source)
            load_adapter(base, tmp_path / "adapter")
            merge(base)
        for name in names:
            _, _, number, _, kind, _ = name.split(".")
            kernel = getattr(base.model.layers.layer.mlp, kind).kernel[...][int(number)]
            # Absmax's error is at most half a step in each weight. The squared error of
            # a search is not above absmax's, but it may cut off a single weight.
            error = np.sqrt(np.mean((got.read(name) - kernel.T) ** 2))
            assert error <= float(np.abs(kernel).max()) / 254
    # down_proj has rows of 96, which blocks of 64 do not divide.
    assert {*got.quantized} & {*names} == {names[0]}


def test_a_wrong_adapter_is_found_before_the_model_is_loaded(
    source, tmp_path, monkeypatch, capsys
):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(_calibrate, "load_pretrained", load)
    monkeypatch.setattr(jaxbnb, "load_pretrained", load)
    for command in (
        ("calibrate", source, tmp_path / "out", "--method", "mse"),
        ("generate", source, "--prompt", "a"),
    ):
        folder = tmp_path / command[0]
        folder.mkdir()
        arguments = *map(str, command), "--adapter", str(folder)
        assert cli.main(arguments) == 1
        assert f"{folder} has no adapter_config.json" in capsys.readouterr().err
        (folder / "adapter_config.json").write_text('{"r": 2}')
        assert cli.main(arguments) == 1
        assert "has no adapter_model.safetensors" in capsys.readouterr().err


def test_an_interrupt(source, tmp_path, monkeypatch, capsys):
    """The same command continues; no finished matrix is computed again."""
    monkeypatch.setattr(files, "_sync", lambda path: None)
    search, count = _matrix.search_scales, 0

    def search_five(*problem):
        nonlocal count
        if count == 5:
            raise KeyboardInterrupt
        count += 1
        return search(*problem)

    monkeypatch.setattr(_matrix, "search_scales", search_five)
    options = "--method", "mse", "--no-random-tokens"
    assert run(source, tmp_path / "out", *options) == 130
    assert "the same command continues" in capsys.readouterr().err
    count = 5 - 7  # Seven of the twelve matrices are left.
    assert run(source, tmp_path / "out", *options) == 0
    assert run(source, tmp_path / "whole", *options) == 130
    count = 0
    monkeypatch.setattr(_matrix, "search_scales", search)
    assert run(source, tmp_path / "whole", *options) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHILD = """
import sys
from jaxbnb import cli
import jaxbnb.cli._calibrate
print("ready", flush=True)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_kills_at_random_moments(source, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CHILD, "calibrate", source]
    options = "--data", source / "text.txt", "--samples", "8", "--seq", "32"
    subprocess.run([*command, tmp_path / "whole", *options], check=True)
    rng, seconds, kills = random.Random(0), 4.0, 0
    while not (tmp_path / "out").exists():
        with subprocess.Popen(
            [*command, tmp_path / "out", *options], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"ready\n"
            try:
                assert child.wait(timeout=rng.uniform(0, seconds)) == 0
            except subprocess.TimeoutExpired:
                child.kill()
                kills += 1
                # A run that is killed while it compiles keeps nothing.
                seconds *= 1.5
    assert kills > 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_too_little_text(source, tmp_path, capsys):
    arguments = "--data", source / "text.txt", "--samples", 100, "--seq", 32
    assert run(source, tmp_path / "out", *arguments) == 1
    assert "13 of the 112 windows of 32 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "kronecker", "mse"])
def test_random_tokens(source, tmp_path, capsys, method):
    """Codes are those of the same tokens in Python; nothing is held out."""
    options = "--method", method, "--random-tokens", "--samples", 8, "--seq", 32
    assert run(source, tmp_path / "out", *options, "--seed", 1) == 0
    assert "held out" not in capsys.readouterr().out
    tokens = np.random.default_rng(1).integers(SIZES["vocab_size"], size=(8, 32))
    model = load_pretrained(source)
    skip = ("lm_head", "down_proj")
    jaxbnb.calibrate(model, [tokens], "nf4", method=method, skip=skip, seed=1)
    expected = model.model.layers.layer.mlp.up_proj.kernel.get_raw_value().codes
    ours = load_pretrained(tmp_path / "out").model.layers.layer.mlp.up_proj.kernel
    np.testing.assert_array_equal(ours.get_raw_value().codes, expected)
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--data", source / "text.txt", "--random-tokens")
    assert "--random-tokens takes the place" in capsys.readouterr().err


def test_mse_without_data(source, tmp_path):
    """It draws 16 windows of random tokens, unless it is told not to."""
    skip = ("lm_head", "down_proj")
    for options, size in (("--seq", "16"), 16), ((), 64), (("--no-random-tokens",), 0):
        out = tmp_path / f"out{size}"
        assert run(source, out, "--method", "mse", *options) == 0
        model = load_pretrained(source)
        tokens = np.random.default_rng(0).integers(
            SIZES["vocab_size"], size=(16, size or 1)
        )
        # The model takes 64 tokens.
        batches = [tokens] if size else None
        jaxbnb.calibrate(model, batches, "nf4", method="mse", skip=skip)
        expected = model.model.layers.layer.mlp.up_proj.kernel.get_raw_value().codes
        ours = load_pretrained(out).model.layers.layer.mlp.up_proj.kernel
        np.testing.assert_array_equal(ours.get_raw_value().codes, expected)


def test_no_text_and_a_folder_that_exists(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out")
    # 64 windows of 512 tokens, and 8 that are held out.
    assert "needs --data: files with about 36,864 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--random-tokens", "--tune", "4")
    assert "--tune needs --data; it does not use random" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--samples", "0")
    assert "--samples must be at least 1" in capsys.readouterr().err
    assert run(source, source, "--method", "mse") == 1
    assert "exists; choose another name" in capsys.readouterr().err
