"""next_token_loss beside the loss of all logits at once; perplexity."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbnb.finetune import _cross_entropy, _loss, next_token_loss, perplexity
from jaxbnb.models import Llama, LlamaConfig


def plain_loss(model, tokens, mask=None):
    """The definition: optax's cross-entropy of every position's logits."""
    logits = model.logits(model.model(tokens))[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    weights = (
        jnp.ones_like(losses) if mask is None else mask[:, 1:].astype(losses.dtype)
    )
    return jnp.sum(losses * weights) / jnp.sum(weights)


def value_and_grad(loss, model, tokens, *args, wrt=nnx.Param, **options):
    graphdef, params, rest = nnx.split(model, wrt, ...)

    def run(params, tokens, *args):
        return loss(nnx.merge(graphdef, params, rest), tokens, *args, **options)

    return jax.jit(jax.value_and_grad(run))(params, jnp.asarray(tokens), *args)


def value(loss, model, tokens, **options):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state: loss(nnx.merge(graphdef, state), tokens, **options))
    return run(state)


def assert_close(got, want):
    """Sums of hundreds of terms in another order: 2^-24 each, and a few at a time."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 + 1e-5 * np.abs(b).max())


# Positions: two, a whole chunk, one and a bit, several.
@pytest.mark.parametrize("shape", [(1, 2), (1, 256), (1, 257), (3, 200)], ids=str)
def test_it_is_the_loss_of_all_logits(make, shape):
    model, tokens = make.bigrams(adapters=None), make.tokens(*shape)
    got = value_and_grad(next_token_loss, model, tokens)
    assert got[0].shape == ()
    assert got[0].dtype == jnp.float32
    assert_close(got, value_and_grad(plain_loss, model, tokens))


def test_whatever_the_chunk(make, monkeypatch):
    model, tokens = make.bigrams(adapters=None), jnp.asarray(make.tokens(3, 5))
    want = value(plain_loss, model, tokens)
    for chunk in (1, 5, 12, 100):
        monkeypatch.setattr(_cross_entropy, "CHUNK", chunk)
        assert_close(value(next_token_loss, model, tokens), want)


def test_devices_that_divide_the_batch_compute_their_own(make, monkeypatch):
    """Nothing but sums goes from one to another: of losses, and of gradients."""
    monkeypatch.setattr(_cross_entropy, "CHUNK", 32)
    model, tokens = make.bigrams(adapters=None), make.tokens(8, 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, of_rows = (NamedSharding(mesh, P(*spec)) for spec in ((), ("data",)))
    graphdef, params = nnx.split(model)

    def loss(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(whole, of_rows),
        out_shardings=whole,
    )
    compiled = step.lower(params, tokens).compile()
    collectives = r" (all-\w+|collective-\w+|reduce-scatter)\("
    assert set(re.findall(collectives, compiled.as_text())) == {"all-reduce"}
    got = compiled(*jax.device_put((params, tokens), (whole, of_rows)))
    assert_close(got, value_and_grad(plain_loss, model, tokens))


def test_the_loss_of_what_is_no_target_may_be_infinite(make):
    """The first token of a row is not a target, though it follows the last position."""
    model, tokens = make.bigrams(adapters=None), jnp.asarray([[3, 1, 2, 1]])
    logits = model.logits
    model.logits = lambda hidden: logits(hidden).at[..., 3].set(-jnp.inf)
    assert_close(next_token_loss(model, tokens), plain_loss(model, tokens))


def test_of_a_quantised_llama(make):
    """Recomputing layers in the backward pass does not change the loss."""
    model, tokens = make.llama(quantized=True), jnp.asarray(make.tokens(2, 9))
    want = value(plain_loss, model, tokens)
    assert_close(value(next_token_loss, model, tokens, remat=True), want)


def test_mask(make):
    model, tokens = make.bigrams(adapters=None), make.tokens(2, 150)
    mask = jnp.asarray(np.random.default_rng(1).random((2, 150)) < 0.3)

    def loss(model, tokens, mask):
        return next_token_loss(model, tokens, mask=mask)

    got = value_and_grad(loss, model, tokens, mask)
    assert_close(got, value_and_grad(plain_loss, model, tokens, mask))
    # A mask of ones is none; the first token of a row is never a target.
    ones = jnp.ones((2, 150), jnp.bool_).at[:, 0].set(False)
    assert_close(
        value(next_token_loss, model, jnp.asarray(tokens), mask=ones),
        value(next_token_loss, model, jnp.asarray(tokens)),
    )


def test_one_target(make):
    model, tokens = make.bigrams(adapters=None), jnp.asarray(make.tokens(2, 9))
    mask = jnp.zeros((2, 9), jnp.bool_).at[1, 4].set(True)
    got = value(next_token_loss, model, tokens, mask=mask)
    log_p = jax.nn.log_softmax(model.logits(model.model(tokens))[1, 3])
    np.testing.assert_allclose(got, -log_p[tokens[1, 4]], rtol=1e-5)


def test_no_targets(make):
    model, tokens = make.bigrams(adapters=None), jnp.asarray(make.tokens(2, 9))
    mask = jnp.zeros((2, 9), jnp.bool_)
    assert math.isnan(value(next_token_loss, model, tokens, mask=mask))


def test_rows_of_one_token(make):
    """They have no targets either."""
    model = make.bigrams(adapters=None)
    assert math.isnan(next_token_loss(model, jnp.zeros((2, 1), jnp.int32)))


def test_all_logits_never_exist():
    """2,047 x 8,192 float32 are 64 MiB; of a gradient, there would be two of them."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def loss(hidden, state, tokens):
        model = nnx.merge(graphdef, state)
        # The body as a constant: activations would take more than the logits.
        model.model.layers = lambda apply, carry, remat: (hidden, None)
        model.model.layers.remat = False
        return next_token_loss(model, tokens)

    hidden = jax.ShapeDtypeStruct((1, 2048, 32), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(hidden, state, tokens).compile()
    # Two pieces of logits, 16 MiB each, and what is small.
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * 2**20


# --- perplexity.


def test_perplexity_is_exp_of_the_mean_loss(make):
    model, windows = make.bigrams(), make.tokens(3, 40)
    losses = [float(value(plain_loss, model, w[None])) for w in jnp.asarray(windows)]
    seen = []
    got = perplexity(model, windows, progress=lambda n, value: seen.append((n, value)))
    assert isinstance(got, float)
    assert got == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert [n for n, _ in seen] == [1, 2, 3]
    assert seen[0][1] == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert seen[-1][1] == got


def test_perplexity_of_what_is_known_exactly(make):
    """One model gives all tokens the same probability; another knows the token."""
    model = make.bigrams()
    model.lm_head.kernel[...] = jnp.zeros_like(model.lm_head.kernel[...])
    model.lm_head.bias[...] = jnp.zeros(61)
    assert perplexity(model, make.tokens(2, 9)) == pytest.approx(61, rel=1e-6)
    model.lm_head.bias[...] = jnp.zeros(61).at[7].set(100.0)
    assert perplexity(model, np.full((2, 9), 7)) == pytest.approx(1.0)


def test_perplexity_compiles_once(make, monkeypatch):
    model, traced = make.bigrams(), []

    def note(*args):
        traced.append(args)
        return next_token_loss(*args)

    monkeypatch.setattr(_loss, "next_token_loss", note)
    perplexity(model, make.tokens(2, 18))
    perplexity(model, make.tokens(5, 18, seed=1))
    assert len(traced) == 1


def test_a_loss_that_is_not_finite(make):
    model = make.bigrams()
    embedding = model.model.embed.embedding
    embedding[...] = embedding[...].at[7].set(np.nan)
    windows = np.full((3, 5), 3, np.int32)
    windows[1, 2] = 7
    seen = []
    with pytest.raises(FloatingPointError, match="window 1 has a loss of nan"):
        perplexity(model, windows, progress=lambda n, _: seen.append(n))
    assert seen == [1]


def test_no_windows(make):
    with pytest.raises(ValueError, match="window"):
        perplexity(make.bigrams(), np.zeros((0, 5), np.int32))


def test_perplexity_of_any_integers(make):
    model, windows = make.bigrams(), make.tokens(1, 8)
    want = perplexity(model, windows)
    assert perplexity(model, windows.astype(np.uint8)) == want
    with pytest.raises(ValueError, match="window 0: token 42949"):
        perplexity(model, windows.astype(np.int64) + 2**32)
    with pytest.raises(TypeError, match=r"must be a language model, .* got Linear"):
        perplexity(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), windows)


def test_the_loss_of_uint8_under_a_vocabulary_that_it_cannot_count(make):
    model, tokens = make.llama(vocab_size=300), make.tokens(1, 8)
    got = value(next_token_loss, model, jnp.asarray(tokens, jnp.uint8))
    assert got == value(next_token_loss, model, jnp.asarray(tokens))
