"""Against transformers: its models, saved by itself, with random weights."""

import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxbnb.models import _blocks, attention, generate, load_pretrained

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


@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "gpt2", "mixtral", "opt", "phi3"),
        *("gpt_neo", "bloom", "falcon_rw", "codegen", "gpt_bigcode", "xglm"),
    ],
)
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


BLOCK = 8


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(attention, "DENSE_SLOTS", 0)
    monkeypatch.setattr(_blocks, "BLOCKS", {"default": BLOCK})


# Grouped heads and windows of 4; with a scale, a cap, and windows in every other layer.
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_attention_in_blocks(tmp_path, small_blocks, family):
    """Logits and the gradients of all weights, with padding on either side."""
    theirs, _ = families.toy(family, tmp_path / "model")
    # Its other implementations leave out the cap.
    theirs.set_attn_implementation("eager")
    graphdef, state = nnx.split(load_pretrained(tmp_path / "model"))

    @jax.jit
    def run(state, ids, mask, weights):
        def weigh(state):
            got = nnx.merge(graphdef, state)(ids, attention_mask=mask)
            return jnp.vdot(got, weights), got

        return jax.grad(weigh, has_aux=True)(state)

    rng = np.random.default_rng(0)
    for seq in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3):
        ids = rng.integers(0, 41, (2, seq)).astype(np.int32)
        count, column = np.array([[0], [seq // 3]]), np.arange(seq)
        for side, mask in (("left", column >= count), ("right", column < seq - count)):
            weights = rng.standard_normal((2, seq, 41)) * mask[..., None]
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            want = theirs(
                torch.tensor(ids).long(),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=torch.tensor(positions),
            ).logits
            theirs.zero_grad()
            (want * torch.tensor(weights, dtype=torch.float32)).sum().backward()
            grads, got = run(state, ids, mask, jnp.float32(weights))
            assert error(got[mask], want.detach().numpy()[mask]) < 1e-4, (seq, side)
            folder = tmp_path / f"{side} {seq}"
            save_gradients(theirs, tmp_path / "model", folder)
            expected = nnx.to_flat_state(nnx.state(load_pretrained(folder)))
            for (path, grad), (_, wanted) in zip(
                nnx.to_flat_state(grads), expected, strict=True
            ):
                # Sums of up to 38 products of order 1, even where they cancel.
                scale = max(1.0, np.abs(wanted[...]).max())
                difference = np.abs(grad[...] - wanted[...]).max()
                assert difference < 1e-5 * scale, (seq, side, path)


def save_gradients(model, source, folder):
    """Writes the gradients of transformers' model in the form of its weights."""
    folder.mkdir()
    config = (source / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config)
    tensors = load_file(source / "model.safetensors")
    named = dict(model.named_parameters())
    grads = {name: named[name].grad.numpy() for name in tensors}
    save_file(grads, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_tokens_in_blocks(tmp_path, small_blocks, family):
    """Greedy tokens, with a cache that ends before, at and after a block does."""
    theirs, _ = families.toy(family, tmp_path)
    theirs.set_attn_implementation("eager")
    ours = load_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    for seq in (1, BLOCK - 1, BLOCK + 1):
        ids = rng.integers(0, 41, (2, seq)).astype(np.int32)
        mask = np.arange(seq) >= np.array([[0], [seq // 3]])
        continued = theirs.generate(
            torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            max_new_tokens=BLOCK + 3,
            do_sample=False,
            pad_token_id=0,
        )
        got = generate(ours, ids, BLOCK + 3, attention_mask=mask)
        np.testing.assert_array_equal(got, continued[:, seq:].numpy())


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
