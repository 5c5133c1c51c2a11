"""Encoder-decoders beside transformers, bitsandbytes and PEFT."""

import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb.models import _pairs, load_pretrained, save_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_encoder_decoder.py")))
# Rows of 64, which bitsandbytes quantises in whole blocks.
WIDE = {"d_model": 64, "d_kv": 16, "d_ff": 128}
AUDIO = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
for _family, _wide in (("t5", WIDE), ("flan", WIDE), ("whisper", AUDIO)):
    _kind, _options, _has_head = made.FAMILIES[_family]
    made.FAMILIES[_family] = _kind, {**_options, **_wide}, _has_head


def theirs(folder, **options):
    config = transformers.AutoConfig.from_pretrained(folder)
    (kind,) = config.architectures
    return getattr(transformers, kind).from_pretrained(folder, **options).eval()


def torch_logits(model):
    source = {
        "input_ids": torch.tensor(made.SOURCE),
        "attention_mask": torch.tensor(made.MASK.astype(np.int64)),
    }
    if model.config.model_type == "whisper":
        source = {"input_features": torch.tensor(made.FEATURES)}
    with torch.no_grad():
        logits = model(**source, decoder_input_ids=torch.tensor(made.TARGET)).logits
    return logits.float().numpy()


@jax.jit(static_argnums=0)
def run(graphdef, state):
    model = nnx.merge(graphdef, state)
    source, target = (jnp.asarray(x, jnp.int32) for x in (made.SOURCE, made.TARGET))
    if model.config.num_mel_bins:
        return model(jnp.asarray(made.FEATURES), target)
    return model(source, target, attention_mask=made.MASK)


def logits(model):
    return np.asarray(run(*nnx.split(model)))


def test_buckets_of_all_distances():
    """In both directions, with the sizes of published models."""
    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = np.arange(-300, 301)
    for causal in (False, True):
        want = attention._relative_position_bucket(torch.tensor(distance), not causal)
        table = jnp.arange(32.0)[:, None]
        bias = _pairs.make_bias(table, 128, is_causal=causal)
        got = bias(jnp.array([300]), jnp.arange(601))[0, 0]
        np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize(("family", "query"), [("flan", ".q"), ("whisper", "q_proj")])
def test_nf4_beside_bitsandbytes(toys, tmp_path, family, query):
    """transformers loads what we convert; the logits agree on the same codes."""
    out = tmp_path / "nf4"
    jaxbnb.convert.convert_checkpoint(toys(family), out, quant="nf4")
    model = theirs(out)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith(query)}
    assert kinds == {"Linear4bit"}
    # Its product on some CPUs rounds to bfloat16, so bitsandbytes decodes first.
    model = model.dequantize()
    ours = load_pretrained(out)
    assert ours.model.decoder.layers.layer.cross_attn.k_proj.kernel.quant_type == "nf4"
    got, want = logits(ours), torch_logits(model)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    plain = torch_logits(theirs(toys(family)))
    assert np.abs(want - plain).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("family", ["t5", "flan", "whisper"])
def test_peft_both_ways(toys, tmp_path, family):
    """An adapter of ours in PEFT, and PEFT's own here, on all linear layers."""
    peft = pytest.importorskip("peft")
    folder = toys(family)
    ours = load_pretrained(folder)
    # The head, too: if it is the embedding, it sees scaled hidden states.
    targets = ["q_proj", "v_proj", "up_proj", "lm_head"]
    config = jaxbnb.lora.LoraConfig(r=2, target_modules=targets)
    jaxbnb.lora.add_adapter(ours, config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(ours, nnx.LoRAParam)
    for _, parameter in nnx.to_flat_state(state):
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(jnp.asarray(noise, jnp.float32))
    nnx.update(ours, state)
    jaxbnb.lora.save_adapter(ours, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours").eval()
    got, want = logits(ours), torch_logits(model)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - torch_logits(theirs(folder))).max() > 0.05

    task = None if family == "whisper" else "SEQ_2_SEQ_LM"
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type=task)
    model = peft.get_peft_model(theirs(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.tensor(0.1 * rng.standard_normal(parameter.shape))
                )
    model.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(folder)
    jaxbnb.lora.load_adapter(ours, tmp_path / "theirs")
    got, want = logits(ours), torch_logits(model)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    # Merged and saved, transformers computes it without PEFT.
    jaxbnb.lora.merge(ours)
    save_pretrained(ours, tmp_path / "merged", source=folder)
    merged = torch_logits(theirs(tmp_path / "merged"))
    np.testing.assert_allclose(merged, want, rtol=0, atol=1e-4 * np.abs(want).max())
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(folder / "model.safetensors").keys()
