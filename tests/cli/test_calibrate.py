"""`jaxbnb calibrate`: from files to a folder that loads."""

import json

import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig, cli
from jaxbnb.convert import convert_checkpoint, load_tokenizer
from jaxbnb.models import CausalLM, DecoderConfig, load_pretrained
from jaxbnb.models.tensors import collect_quantized
from jaxbnb.nnx import QuantLinear

tokenizers = pytest.importorskip("tokenizers")
save_file = pytest.importorskip("safetensors.numpy").save_file

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
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {
                c: i
                for i, c in enumerate(
                    sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
                )
            },
            [],
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "text.txt").write_text("It is hard to measure what is not there. " * 10)
    return folder


def run(*arguments):
    return cli.main(["calibrate", *map(str, arguments)])


def test_a_folder_that_loads(source, tmp_path, capsys):
    options = "--data", source / "text.txt", "--samples", 8, "--seq", 32
    assert run(source, tmp_path / "guided", *options, "--double-quant") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    up = next(line for line in lines if line[0] == "model.layers.layer.mlp.up_proj")
    assert up[1:3] == ["guided", "2"]
    assert "down_proj" not in out
    assert "on 4 windows of the data that were held out: perplexity" in out
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


def test_too_little_text(source, tmp_path, capsys):
    arguments = "--data", source / "text.txt", "--samples", 100, "--seq", 32
    assert run(source, tmp_path / "out", *arguments) == 1
    assert (
        "14 windows of 32 tokens; --samples 100 and 12 more" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_no_text_and_a_folder_that_exists(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out")
    assert "needs --data: files with about 32,768 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(source, tmp_path / "out", "--samples", "0")
    assert "--samples must be at least 1" in capsys.readouterr().err
    assert run(source, source, "--method", "mse") == 1
    assert "exists; choose another name" in capsys.readouterr().err
