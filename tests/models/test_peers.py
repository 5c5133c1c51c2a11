"""Against transformers: its models, saved by itself, with random weights."""

import pathlib
import runpy
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.models import generate, load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
families = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))


SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save(folder, *, dtype=None, **options):
    """A small random Llama of transformers, in ``folder``."""
    changes = {k: options.pop(k) for k in list(options) if k != "max_shard_size"}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | changes)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too, which are ones and zeros at first.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, **options)
    return model


def tokens(batch=2, seq=24):
    return np.random.default_rng(0).integers(0, 97, (batch, seq)).astype(np.int32)


def logits(model, ids, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        got = model(torch.tensor(ids).long(), attention_mask=mask).logits
    return got.float().numpy()


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"max_shard_size": "60KB"},
    ],
)
def test_logits(tmp_path, toy, changes):
    theirs = save(tmp_path, **changes)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == ("max_shard_size" in changes)
    ours = load_pretrained(tmp_path)
    want = logits(theirs, tokens())
    assert error(toy.run(ours, jnp.asarray(tokens())), want) < 1e-4


def test_a_bfloat16_file(tmp_path, toy):
    save(tmp_path, dtype=torch.bfloat16)
    # Read anew, for .to(bfloat16) has rounded its rope frequencies as well.
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    ours = load_pretrained(tmp_path, dtype=jnp.float32)
    want = logits(theirs, tokens())
    assert error(toy.run(ours, jnp.asarray(tokens())), want) < 1e-4
    # Computed in bfloat16, the two round at different places.
    half = load_pretrained(tmp_path)
    assert half.model.norm.scale.dtype == jnp.bfloat16
    assert error(toy.run(half, jnp.asarray(tokens())), want) < 0.03


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "opt", "phi3"])
def test_other_families_continue_a_padded_prompt(tmp_path, family):
    theirs, _ = families.toy(family, tmp_path)
    ours = load_pretrained(tmp_path)
    ids = families.TOKENS.astype(np.int32)
    continued = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(families.MASK.astype(np.int64)),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    got = generate(ours, ids, 8, attention_mask=families.MASK)
    np.testing.assert_array_equal(got, continued[:, 10:].numpy())


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_goes_by_the_length(tmp_path, kind):
    """Within one generation, short factors, and then long ones or others each step.

    transformers reads a Phi-3's text again where its factors change, and keeps what a
    dynamic base has rotated.
    """
    if kind == "longrope":
        config = transformers.Phi3Config(
            **SIZES,
            pad_token_id=0,
            original_max_position_embeddings=28,
            rope_parameters=LONGROPE,
        )
        theirs = transformers.Phi3ForCausalLM(config)
    else:
        changes = {"max_position_embeddings": 28, "rope_parameters": DYNAMIC}
        config = transformers.LlamaConfig(**SIZES | changes)
        theirs = transformers.LlamaForCausalLM(config)
    theirs = theirs.eval()
    theirs.generation_config.eos_token_id = None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.25)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    mask = np.arange(24) >= np.array([[0], [7]])
    ids = np.where(mask, tokens(), 0).astype(np.int32)
    continued = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )
    got = generate(ours, ids, 24, attention_mask=mask)
    np.testing.assert_array_equal(got, continued[:, 24:].numpy())
    assert len(np.unique(got)) > 12


def test_left_padding_and_greedy_continuation(tmp_path, toy):
    theirs = save(tmp_path)
    ours = load_pretrained(tmp_path)
    mask = np.arange(24) >= np.array([[0], [7]])
    ids = np.where(mask, tokens(), 0).astype(np.int32)
    got = toy.run(ours, jnp.asarray(ids), attention_mask=jnp.asarray(mask))
    want = logits(theirs, ids, mask.astype(np.int64))
    assert error(np.asarray(got)[mask], want[mask]) < 1e-4
    continued = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    got = generate(ours, ids, 12, attention_mask=mask)
    np.testing.assert_array_equal(got, continued[:, 24:].numpy())
