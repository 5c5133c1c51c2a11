"""fit: it learns, says what it took, and leaves the model usable however it ends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.core import tree_nbytes
from jaxbnb.finetune import fit, next_token_loss, split_trainable, train_step


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def adapters(model):
    return jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))


def by_hand(model, tx, batches):
    """The adapters after each batch, and the loss before each."""
    graphdef, trainable, frozen = split_trainable(model)
    step, state = jax.jit(train_step(graphdef, tx)), tx.init(trainable)
    steps, losses = [], []
    for batch in batches:
        trainable, state, loss = step(trainable, state, frozen, jnp.asarray(batch))
        steps.append(trainable)
        losses.append(float(loss))
    return steps, losses


def assert_near(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@nnx.jit
def loss_of(model, tokens):
    return next_token_loss(model, tokens)


def usable(model, tokens):
    """Its arrays are its own: neither donated nor broken."""
    return math.isfinite(loss_of(model, jnp.asarray(tokens)))


@pytest.fixture(scope="module")
def batch(make):
    """Draws tokens 0 to 59; the vocabulary has one more."""
    return np.minimum(make.tokens(2, 9), 59)


@pytest.fixture(scope="module")
def steps(make, batch):
    """The adapters after each of four steps on `batch`, by SGD at a rate of 0.5."""
    return by_hand(make.bigrams(), optax.sgd(0.5), [batch] * 4)[0]


def test_qlora_on_a_llama(make):
    """It learns a text; the adapters alone have changed."""
    model = make.llama(quantized=True, adapters=["down_proj"])
    before = nnx.clone(model)
    text = make.tokens(2, 16)
    result = fit(model, jaxbnb.adamw8bit(3e-2), [text] * 40)
    assert len(result.losses) == 40
    assert result.losses[-1] < 0.8 * result.losses[0]
    (graphdef, new, rest), (old_graphdef, old, old_rest) = (
        nnx.split(m, nnx.LoRAParam, ...) for m in (model, before)
    )
    assert graphdef == old_graphdef
    assert_same(rest, old_rest)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.all(np.any(a != b, axis=(1, 2)))


def test_it_is_the_loop_of_its_step(make):
    batches = [make.tokens(2, 9, seed=i) for i in range(4)]
    tx = optax.sgd(0.5)
    steps, losses = by_hand(make.bigrams(), tx, batches)
    model = make.bigrams()
    result = fit(model, tx, iter(batches), remat=False)
    assert_near(nnx.state(model, nnx.LoRAParam), steps[-1])
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)


def test_what_it_says(make):
    model, tx = make.bigrams(), jaxbnb.adamw8bit(1e-2)
    seen = []
    result = fit(
        model, tx, [make.tokens(2, 9)] * 3, progress=lambda *args: seen.append(args)
    )
    state = nnx.state(model, nnx.LoRAParam)
    assert result.trainable_bytes == tree_nbytes(state) == 2 * 4 * 16 * 4
    assert result.optimizer_bytes == tree_nbytes(tx.init(state))
    assert result.peak_bytes > tree_nbytes(nnx.state(model))
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(3 * 18 / result.seconds)
    assert [number for number, _, _ in seen] == [1, 2, 3]
    assert [loss for _, loss, _ in seen] == result.losses
    assert seen[-1][2] == pytest.approx(result.tokens_per_second)


def test_more_than_adapters(make):
    """`wrt` says what is trained; here all of it, in its place."""
    model = make.bigrams(adapters=None)
    head = model.lm_head
    before = jax.tree.map(np.asarray, nnx.state(model))
    result = fit(model, optax.sgd(0.5), [make.tokens(2, 9)] * 3, wrt=nnx.Param)
    assert result.losses[-1] < result.losses[0]
    assert result.trainable_bytes == tree_nbytes(before)
    assert model.lm_head is head
    for a, b in zip(*map(jax.tree.leaves, (nnx.state(model), before)), strict=True):
        assert np.any(a != b)


def test_the_state_may_be_paged(make):
    batches = [make.tokens(2, 9, seed=i) for i in range(3)]
    model, paged = make.bigrams(), make.bigrams()
    want = fit(model, jaxbnb.adamw8bit(1e-2), batches)
    got = fit(paged, jaxbnb.paged_adamw8bit(1e-2), batches)
    # Two programs, in which XLA may fuse a product with a sum or not.
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    assert_near(adapters(paged), adapters(model))
    # Host memory is some device's; the model is as free as it was.
    assert not any(x.committed for x in jax.tree.leaves(nnx.state(paged)))
    device = jax.devices()[3]
    bound = make.bigrams()
    nnx.update(bound, jax.device_put(nnx.state(bound), device))
    got = fit(bound, jaxbnb.paged_adamw8bit(1e-2), batches)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    assert all(x.devices() == {device} for x in jax.tree.leaves(nnx.state(bound)))


def test_batches_of_all_kinds_and_shapes(make):
    """Each step is the mean over the targets of its own batch, whatever its size."""
    tokens, short = make.tokens(4, 9), make.tokens(3, 7, seed=1)
    mask = np.random.default_rng(0).random((4, 9)) < 0.5
    labels = np.where(mask, tokens, -100)
    padded = np.pad(short, ((0, 0), (2, 0)))
    given = [
        (tokens, mask),
        {"input_ids": tokens.tolist(), "labels": labels},
        jnp.asarray(short),
        {"input_ids": padded, "attention_mask": np.arange(9) >= np.full((3, 1), 2)},
    ]
    every = np.ones_like(short, bool)
    plain = [(tokens, mask), (tokens, mask), (short, every), (short, every)]

    model, tx = make.bigrams(), optax.sgd(0.5)
    graphdef, trainable, frozen = split_trainable(model)
    step, state, losses = jax.jit(train_step(graphdef, tx)), tx.init(trainable), []
    for tokens, mask in plain:
        trainable, state, loss = step(trainable, state, frozen, tokens, mask)
        losses.append(loss)
    result = fit(model, tx, given)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    assert_near(nnx.state(model, nnx.LoRAParam), trainable)
    assert result.tokens_per_second == pytest.approx(
        (36 + 36 + 21 + 27) / result.seconds
    )


def test_going_on(make, batch, steps):
    """Arrays are not shared with what was there before, nor lost to donation."""
    model = make.bigrams()
    state = nnx.state(model, nnx.LoRAParam)
    fit(model, optax.sgd(0.5), [batch] * 2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    # Nor are they bound to a device that the model was not bound to.
    assert not any(leaf.committed for leaf in jax.tree.leaves(nnx.state(model)))
    assert_near(nnx.state(model, nnx.LoRAParam), steps[1])
    fit(model, optax.sgd(0.5), [batch] * 2)
    assert usable(model, batch)
    assert_near(nnx.state(model, nnx.LoRAParam), steps[3])


# --- Runs that end early.


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which would end pytest."""


def test_an_interrupt_among_the_batches(make, batch, steps):
    model = make.bigrams()

    def batches():
        yield batch
        yield batch
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(model, optax.sgd(0.5), batches())
    assert_near(nnx.state(model, nnx.LoRAParam), steps[1])
    assert usable(model, batch)


def test_an_interrupt_while_reporting(make, batch, steps):
    model = make.bigrams()

    def progress(number, loss, speed):
        if number == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(model, optax.sgd(0.5), [batch] * 9, progress=progress)
    assert_near(nnx.state(model, nnx.LoRAParam), steps[2])
    assert usable(model, batch)


def test_a_batch_that_is_none(make, batch, steps):
    model = make.bigrams()
    with pytest.raises(TypeError, match="batch 2: its tokens are of type float32"):
        fit(model, optax.sgd(0.5), [batch, batch.astype(np.float32)])
    assert_near(nnx.state(model, nnx.LoRAParam), steps[0])
    assert usable(model, batch)


@pytest.mark.parametrize(
    ("token", "kind"),
    [(-1, np.asarray), (61, np.asarray), (-100, jnp.asarray), (61, jnp.asarray)],
)
def test_a_token_outside_the_vocabulary(make, batch, steps, token, kind):
    """A negative one too, which indexing takes from the end."""
    model, bad = make.bigrams(), batch.copy()
    bad[1, 4] = token
    with pytest.raises(
        ValueError,
        match=f"batch 2: token {token} of row 1, position 4, .* vocabulary, 0 to 60",
    ):
        fit(model, optax.sgd(0.5), [kind(batch), kind(bad)])
    assert_near(nnx.state(model, nnx.LoRAParam), steps[0])


def test_more_tokens_than_the_model_takes(make):
    model = make.llama(adapters=["q_proj"], max_position_embeddings=8)
    with pytest.raises(ValueError, match="this model takes 1 to 8") as info:
        fit(model, optax.sgd(0.5), [make.tokens(2, 9)])
    assert "batch 1 has the shape (2, 9)" in info.value.__notes__


def explode(at):
    """Makes an optimizer with an infinite update at step `at`."""
    return optax.chain(
        optax.sgd(0.1),
        optax.scale_by_schedule(lambda count: jnp.where(count == at - 1, jnp.inf, 1.0)),
    )


def test_a_loss_that_is_not_finite(make, batch):
    """Step 2 breaks the adapters, step 3 finds out."""
    model, seen = make.bigrams(), []
    with pytest.raises(
        FloatingPointError, match=r"the loss of step 3 is nan; lower the learning rate"
    ):
        fit(model, explode(2), [batch] * 9, progress=lambda n, *_: seen.append(n))
    assert seen == [1, 2]


def test_the_model_keeps_what_it_had_learned_by_then(make, batch, steps):
    """It learned until a token with a NaN embedding came."""
    model, bad = make.bigrams(), batch.copy()
    embedding = model.model.embed.embedding
    embedding[...] = embedding[...].at[60].set(np.nan)
    bad[0, 3] = 60
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        fit(model, optax.sgd(0.5), [batch, batch, bad, batch])
    assert_near(nnx.state(model, nnx.LoRAParam), steps[1])


def test_no_batches(make):
    model = make.bigrams()
    before = adapters(model)
    with pytest.raises(ValueError, match="there are no batches to train on"):
        fit(model, optax.sgd(0.1), [])
    assert_same(adapters(model), before)


def test_nothing_to_train(make):
    with pytest.raises(ValueError, match="no variables of"):
        fit(make.bigrams(adapters=None), optax.sgd(0.1), [make.tokens(2, 9)])


@pytest.mark.parametrize(
    "kind",
    [
        "uint8",
        "int64",
        *(
            pytest.param(kind, marks=pytest.mark.exhaustive)
            for kind in ("uint16", "uint32")
        ),
    ],
)
def test_tokens_of_any_integers(make, batch, steps, kind):
    """NumPy arrays, device arrays and lists, with and without 64 bits."""
    given = batch.astype(kind)
    with jax.enable_x64(True):
        batches = [given, jnp.asarray(given), (given.tolist(), None)]
    for x64 in (False, True):
        model = make.bigrams()
        with jax.enable_x64(x64):
            fit(model, optax.sgd(0.5), batches if x64 else batches[::2])
            if not x64:
                fit(model, optax.sgd(0.5), [jnp.asarray(given)])
        assert_near(adapters(model), steps[2])


def test_tokens_beyond_int32_do_not_become_others(make, batch):
    """2**32 + 1 would wrap to 1."""
    wide = batch.astype(np.int64) + 2**32
    for kind in ("int64", "uint64"):
        with (
            jax.enable_x64(True),
            pytest.raises(ValueError, match=r"batch 1: token 42949\d+ of row 0"),
        ):
            fit(make.bigrams(), optax.sgd(0.5), [jnp.asarray(wide, kind)])


def test_what_is_no_language_model_or_optimizer(make, batch):
    with pytest.raises(TypeError, match=r"must be a language model, .* got Linear"):
        fit(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.5), [batch])
    for tx in (optax.sgd, None, nnx.Optimizer):
        with pytest.raises(TypeError, match=r"tx must be an optax\.Gradient.* got "):
            fit(make.bigrams(), tx, [batch])
    with pytest.raises(TypeError, match=r"batches are an array of shape \(2, 9\)"):
        fit(make.bigrams(), optax.sgd(0.5), batch)


def in_16_bits(model, wrt):
    state = nnx.state(model, wrt)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    return model


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam], ids=["all", "adapters"])
def test_variables_of_16_bits_are_rounded_at_random(make, batch, wrt):
    """Ten steps of 2^-10 from 1, where the spacing is 2^-8, and half of it is lost.

    A variable goes down a spacing with a chance of 1/4 in each step, so the mean of n
    of them deviates by sqrt(10 x 3/16 / n) spacings. The test allows five.
    """
    adapters = ("proj",) if wrt is nnx.LoRAParam else None
    model = in_16_bits(make.bigrams(adapters=adapters), wrt)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, wrt))
    nnx.update(model, ones)

    def loss(model, batch):
        # With a gradient of one everywhere.
        leaves = jax.tree.leaves(nnx.state(model, wrt))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves), jnp.float32(1)

    rate = 2.0**-10
    with jax.numpy_dtype_promotion("standard"):  # For Flax's layers.
        fit(model, optax.sgd(rate), [batch] * 10, wrt=wrt, loss_fn=loss)
    values = np.concatenate(
        [
            np.asarray(x, np.float64).ravel()
            for x in jax.tree.leaves(nnx.state(model, wrt))
        ]
    )
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(nnx.state(model, wrt)))
    sigma = 2.0**-8 * np.sqrt(10 * 3 / 16 / values.size)
    assert abs(values.mean() - (1 - 10 * rate)) < 5 * sigma < 5 * rate
