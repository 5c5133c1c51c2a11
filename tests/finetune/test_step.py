"""split_trainable, train_step, compile_train_step and peak_bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.core import tree_nbytes
from jaxbnb.finetune import (
    advance_rngs,
    compile_train_step,
    find_optimizer,
    fit,
    next_token_loss,
    peak_bytes,
    perplexity,
    split_trainable,
    train_step,
)
from jaxbnb.finetune._step import make_loss, measured_step
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.optim import fused_step


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_split_trainable(make):
    model = make.bigrams()
    graphdef, trainable, frozen = split_trainable(model)
    paths = [path for path, _ in nnx.to_flat_state(trainable)]
    adapter = ("model", "proj", "adapters", "default")
    assert paths == [(*adapter, "lora_a"), (*adapter, "lora_b")]
    assert not nnx.to_flat_state(nnx.filter_state(frozen, nnx.LoRAParam))
    merged = nnx.merge(graphdef, trainable, frozen)
    assert_same(nnx.state(merged), nnx.state(model))
    _, everything, nothing = split_trainable(model, nnx.Param)
    assert len(jax.tree.leaves(everything)) == 7
    assert [path[-1] for path, _ in nnx.to_flat_state(nothing)] == ["scale"]


def test_nothing_to_train(make):
    with pytest.raises(
        ValueError, match=r"no variables of .*LoRAParam.*add_adapter adds"
    ):
        split_trainable(make.bigrams(adapters=None))


def test_a_step_is_gradient_and_update(make):
    model, tokens = make.bigrams(), jnp.asarray(make.tokens(2, 9))
    graphdef, trainable, frozen = split_trainable(model)
    tx = optax.sgd(0.1)
    step = jax.jit(train_step(graphdef, tx))
    got, _, loss = step(trainable, tx.init(trainable), frozen, tokens)

    def loss_fn(trainable):
        return next_token_loss(nnx.merge(graphdef, trainable, frozen), tokens)

    want_loss, grads = jax.jit(jax.value_and_grad(loss_fn))(trainable)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for a, p, g in zip(*map(jax.tree.leaves, (got, trainable, grads)), strict=True):
        np.testing.assert_allclose(a, p - 0.1 * g, rtol=0, atol=1e-6)
    # Pure: the model is as it was.
    assert_same(trainable, nnx.state(model, nnx.LoRAParam))


def test_compiled_for_shapes_alone(make):
    """A step of an abstract quantised Llama compiles, and reports its memory."""

    def build():
        return make.llama(quantized=True, adapters=["q_proj"])

    graphdef, trainable, frozen = split_trainable(nnx.eval_shape(build))
    tx = jaxbnb.adamw8bit(1e-3)
    opt_state = jax.eval_shape(tx.init, trainable)
    compiled = compile_train_step(
        train_step(graphdef, tx), trainable, opt_state, frozen, (2, 9)
    )
    held = tree_nbytes((trainable, opt_state, frozen))
    peak = peak_bytes(compiled)
    # What is updated in place is counted once; activations come on top.
    assert held < peak < held + 2**20
    # And it runs, on what there is now.
    graphdef, trainable, frozen = split_trainable(build())
    trainable = jax.tree.map(jnp.copy, trainable)
    opt_state = tx.init(trainable)
    new, new_state, loss = compiled(
        trainable, opt_state, frozen, jnp.asarray(make.tokens(2, 9))
    )
    assert jnp.isfinite(loss)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, tx.init(new))


def compile_with(fn, *args, **options):
    return jax.jit(fn, **options).lower(*args).compile()


def test_peak_bytes():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    one = 2**20
    assert peak_bytes(compile_with(lambda x: x + 1, x)) == 2 * one
    # Shared memory counts once.
    assert peak_bytes(compile_with(lambda x: x + 1, x, donate_argnums=0)) == one
    # So do arguments: all of them, and all results.
    assert peak_bytes(compile_with(lambda x, y: (x + y, x - y), x, x)) <= 4 * one + 64
    # A temporary as large as the argument, since sorting is not in place.
    temporary = compile_with(lambda x: jnp.sum(jnp.sort(x.reshape(-1))[::1000]), x)
    assert 2 * one <= peak_bytes(temporary) <= 3 * one


def test_peak_bytes_counts_the_host():
    """Paged state moves bytes to the host, and does not save all of them."""
    params = jnp.ones((64, 1024))

    def compiled(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        return compile_with(step, params, state, params, donate_argnums=(0, 1))

    plain = peak_bytes(compiled(jaxbnb.adamw8bit(1e-3)))
    paged = peak_bytes(compiled(jaxbnb.paged_adamw8bit(1e-3)))
    assert paged >= plain


def test_dropout(make):
    """A stack of recomputed layers drops out, whatever mode the model was in."""
    model = make.llama(num_hidden_layers=2)
    config = LoraConfig(
        r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"]
    )
    add_adapter(model, config, rngs=nnx.Rngs(1))
    model.eval()
    graphdef, trainable, frozen = split_trainable(model)
    step = jax.jit(train_step(graphdef, optax.sgd(0.0)))
    tokens = make.tokens(1, 9)
    losses = [
        float(step(trainable, optax.sgd(0.0).init(trainable), state, tokens)[2])
        for state in (frozen, frozen, advance_rngs(frozen))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_fit_drops_out_anew_and_perplexity_nothing(make):
    model = make.bigrams(adapters=None)
    config = LoraConfig(
        r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["proj"]
    )
    add_adapter(model, config, rngs=nnx.Rngs(1))
    tokens = make.tokens(1, 9)
    assert perplexity(model, tokens) == perplexity(model, tokens)
    result = fit(model, optax.sgd(0.0), [tokens] * 3)
    assert len(set(result.losses)) == 3


def test_accumulated_batches_are_one(make):
    """Unequal numbers of targets: the mean is over all of them, not of the means."""
    model, tokens = make.bigrams(), jnp.asarray(make.tokens(3, 2, 9))
    lengths = jnp.asarray([[9, 2], [4, 4], [3, 0]])
    mask = jnp.arange(9) < lengths[..., None]
    graphdef, trainable, frozen = split_trainable(model)
    tx = optax.sgd(0.1)
    step = jax.jit(train_step(graphdef, tx))
    state = tx.init(trainable)
    got, _, loss = step(trainable, state, frozen, tokens, mask)
    rows = (x.reshape(6, 9) for x in (tokens, mask))
    want, _, want_loss = step(trainable, state, frozen, *rows)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want
    )


@pytest.mark.parametrize(
    ("broken", "tx"),
    [
        ("loss", jaxbnb.adamw8bit(0.1)),
        ("gradient", jaxbnb.paged_adamw8bit(0.1)),
        ("gradient", optax.chain(optax.clip(1.0), jaxbnb.paged_adamw8bit(0.1))),
    ],
    ids=["loss", "gradient, paged", "gradient, paged in a chain"],
)
def test_a_step_that_is_not_finite_is_not_taken(make, broken, tx):
    model, tokens = make.bigrams(), jnp.asarray(make.tokens(2, 9))
    graphdef, trainable, frozen = split_trainable(model)

    def loss_fn(model, batch):
        total = jnp.sum(jnp.square(model.model(batch.tokens)))
        bad = jnp.sum(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))[0] * 0)
        # The square root of zero is finite, and its derivative is not.
        return total + (jnp.log(bad) if broken == "loss" else jnp.sqrt(bad)), 1.0

    state = tx.init(trainable)
    step = jax.jit(measured_step(graphdef, tx, loss_fn))
    got, new_state, metrics = step(trainable, state, frozen, tokens)
    assert bool(jnp.isfinite(metrics.loss)) == (broken == "gradient")
    assert not jnp.isfinite(metrics.grad_norm)
    assert_same(got, trainable)
    assert_same(new_state, state)


def test_gradients_are_scaled_down(make):
    model, tokens = make.bigrams(), jnp.asarray(make.tokens(2, 9))
    graphdef, trainable, frozen = split_trainable(model)
    moved = {}
    for limit in (None, 1e-3):
        step = measured_step(
            graphdef, optax.sgd(1.0), make_loss(True), max_grad_norm=limit
        )
        state = optax.sgd(1.0).init(trainable)
        got, _, metrics = jax.jit(step)(trainable, state, frozen, tokens)
        difference = jax.tree.map(jnp.subtract, got, trainable)
        moved[limit] = float(optax.tree.norm(difference))
        assert float(metrics.grad_norm) > 2e-3
    np.testing.assert_allclose(moved[None], metrics.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(moved[1e-3], 1e-3, rtol=2e-3)


def test_adamw_has_float32_moments_and_the_steps_of_optax():
    """Near 1, each of three steps rounds by 2^-24 in either. bfloat16 never falls."""
    params = {"w": jnp.linspace(-1, 1, 8192).reshape(64, 128), "scale": jnp.ones(128)}
    grads = jax.tree.map(lambda p: p - 0.1, params)
    options = {"weight_decay": 0.1, "mask": {"w": True, "scale": False}}
    tx, twin = find_optimizer("adamw")(1e-3, **options), optax.adamw(1e-3, **options)
    got, want = params, params
    state, twin_state = tx.init(params), twin.init(params)
    with jax.numpy_dtype_promotion("standard"):  # Optax's.
        for _ in range(3):
            got, state = jax.jit(fused_step(tx))(grads, state, got)
            want, twin_state = jax.jit(fused_step(twin))(grads, twin_state, want)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3 * 2.0**-23)
    narrow = tx.init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    dtypes = {x.dtype.name for x in jax.tree.leaves(narrow)}
    assert dtypes == {"int32", "float32"}
