"""LayerStack beside a Python loop over its layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.finetune import next_token_loss
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.nnx import LayerStack, Remat, keep_product, quantize_model


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, bias_init=nnx.initializers.normal(), rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@functools.cache
def _make(num_layers, quantized):
    make_stack = nnx.jit(lambda: LayerStack(Block, num_layers, rngs=nnx.Rngs(0)))
    stack = make_stack()
    if quantized:
        quantize_model(stack, QuantConfig("int8", block_size=16))
    return stack


def make(num_layers=3, quantized=False):
    return nnx.clone(_make(num_layers, quantized))


def apply(layer, carry, index):
    return layer(carry) + 0.1 * index.astype(jnp.float32)


def loop(state, graphdef, carry, num_layers):
    for i in range(num_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        carry = apply(layer, carry, jnp.int32(i))
    return carry


def test_layers_differ_and_are_what_make_layer_makes():
    stack = make()
    assert stack.num_layers == 3
    assert stack.layer.up.kernel.shape == (3, 16, 32)
    assert stack.layer.up.bias.shape == (3, 32)
    kernels = np.asarray(stack.layer.up.kernel[...])
    assert not np.array_equal(kernels[0], kernels[1])
    # lecun_normal of its own fan-in, not of the stack's.
    assert abs(kernels.std() * 4 - 1) < 0.1


@pytest.mark.parametrize(
    ("quantized", "remat"),
    [(False, False), (True, True)],
    ids=["plain", "quantised and recomputed"],
)
def test_it_is_a_loop(quantized, remat):
    stack, x = make(3, quantized), normal((5, 16))
    graphdef, params, frozen = nnx.split(stack.layer, nnx.Param, ...)
    stack_graphdef, stack_params, stack_frozen = nnx.split(stack, nnx.Param, ...)

    def looped(params, x):
        state = nnx.merge_state(params, frozen)
        return jnp.sum(loop(state, graphdef, x, 3) ** 2)

    def stacked(params, x):
        model = nnx.merge(stack_graphdef, params, stack_frozen)
        return jnp.sum(model(apply, x, remat=remat) ** 2)

    want = jax.jit(jax.value_and_grad(looped, argnums=(0, 1)))(params, x)
    got = jax.jit(jax.value_and_grad(stacked, argnums=(0, 1)))(stack_params, x)
    # Sums of up to 96 products, of random signs, in an order of XLA's own.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if not quantized:
        assert len(jax.tree.leaves(got)) == 6


@pytest.mark.parametrize("remat", [Remat(every=2), Remat(every=4, offload=True)])
def test_groups_of_layers_are_a_loop_too(remat):
    """And the gradients of each layer are in its place."""
    stack, x = make(4), normal((5, 16))
    graphdef, params = nnx.split(stack)

    def loss(params, remat):
        return jnp.sum(nnx.merge(graphdef, params)(apply, x, remat=remat) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = gradient(params, remat), gradient(params, False)
    # The same operations, compiled in other groups.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_groups_keep_fewer_inputs():
    """Those of 2 layers instead of 8, of 64 KiB each; or none on the device."""
    stack, x = make(8), jax.ShapeDtypeStruct((1024, 16), jnp.float32)
    graphdef, params = nnx.split(stack)

    def held(remat):
        def loss(x):
            return jnp.sum(nnx.merge(graphdef, params)(apply, x, remat=remat) ** 2)

        return jax.make_jaxpr(jax.grad(loss))(x)

    def stacks(remat):
        """The numbers of inputs that a loop over layers returns for later."""
        found = set()
        for equation in held(remat).eqns:
            if equation.primitive.name == "scan":
                shapes = [v.aval.shape for v in equation.outvars]
                found |= {shape[0] for shape in shapes if shape[1:] == (1024, 16)}
        return found

    assert stacks(True) == {8}
    assert stacks(Remat(every=4)) == {2}
    assert "host" in str(held(Remat(offload=True)))
    assert "host" not in str(held(True))


def keep_and_apply(layer, x, index):
    y = keep_product(layer.up(x))
    return x + keep_product(layer.down(jnp.sin(y)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("every", [1, 2])
def test_products_are_kept(dtype, every):
    """The backward pass computes none again, and gives the same gradients."""
    stack = make(4)
    graphdef, params = nnx.split(stack)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    x = normal((5, 16)).astype(dtype)

    def loss(params, remat):
        y = nnx.merge(graphdef, params)(keep_and_apply, x, remat=remat)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    kept, again = Remat(every, products=True), Remat(every)
    programs = [
        str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, how))
        for how in (kept, again)
    ]
    # The first of two products is needed to differentiate what follows it.
    counts = [program.count("dot_general") for program in programs]
    assert counts[0] == counts[1] - 1
    # Values of 16 bits are stored as integers, one from each layer.
    is_narrow = dtype == jnp.bfloat16
    assert (f"u16[{every if every > 1 else 4},5,32]" in programs[0]) == is_narrow
    got, want = (jax.grad(loss)(params, how) for how in (kept, again))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_remat_takes():
    x = normal((5, 16))
    with pytest.raises(ValueError, match="every must be a positive int, got 0"):
        Remat(every=0)
    with pytest.raises(ValueError, match="every=2 must divide the number of layers, 3"):
        make(3)(apply, x, remat=Remat(every=2))
    with pytest.raises(
        TypeError, match=r"True, False or a jaxbnb\.nnx\.Remat; got int"
    ):
        make(3)(apply, x, remat=2)
    stack = make(3)
    stack.remat = jax.checkpoint_policies.everything_saveable
    for how in (Remat(offload=True), Remat(products=True)):
        with pytest.raises(ValueError, match="are a policy of their own"):
            stack(apply, x, remat=how)


def test_one_layer():
    stack, x = make(1), normal((5, 16))
    got = nnx.jit(lambda stack, x: stack(apply, x))(stack, x)
    np.testing.assert_allclose(
        got, loop(nnx.state(stack.layer), nnx.graphdef(stack.layer), x, 1), atol=1e-5
    )


def test_the_layer_is_traced_once():
    traced = []

    def apply(layer, carry, index):
        traced.append(index.shape)
        return layer(carry)

    make()(apply, normal((2, 16)))
    assert traced == [()]


def test_any_carry():
    stack, x = make(), normal((5, 16))

    def apply(layer, carry, index):
        x, total, seen = carry
        return layer(x), total + jnp.sum(x), seen.at[index].set(True)

    y, total, seen = stack(apply, (x, jnp.float32(0), jnp.zeros(3, jnp.bool_)))
    assert y.shape == x.shape
    assert total.shape == ()
    assert seen.tolist() == [True] * 3


def test_what_a_layer_assigns_is_dropped():
    stack = LayerStack(lambda rngs: nnx.BatchNorm(16, rngs=rngs), 2, rngs=nnx.Rngs(0))
    before = np.asarray(stack.layer.mean[...])
    stack(lambda layer, x, _: layer(x, use_running_average=False), normal((5, 16)))
    np.testing.assert_array_equal(stack.layer.mean[...], before)


def test_dropout_draws_for_each_layer_its_own():
    stack = LayerStack(
        lambda rngs: nnx.Dropout(0.5, rngs=rngs), 2, rngs=nnx.Rngs(0, dropout=1)
    )

    def apply(layer, carry, index):
        return carry.at[index].set(layer(jnp.ones(64)))

    dropped = stack(apply, jnp.zeros((2, 64))) == 0
    assert np.all(np.abs(dropped.mean(axis=1) - 0.5) < 0.3)
    assert not np.array_equal(dropped[0], dropped[1])


def test_split_merge_and_eval_shape():
    stack, x = make(quantized=True), normal((5, 16))
    want = stack(apply, x)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(stack))(apply, x), want)
    np.testing.assert_allclose(
        nnx.jit(lambda stack, x: stack(apply, x))(stack, x), want, rtol=0, atol=1e-5
    )
    abstract = nnx.eval_shape(lambda: make(quantized=True))
    assert nnx.graphdef(abstract) == nnx.graphdef(stack)


@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_keeps_codes_not_matrices(remat):
    """8 layers of 1024 x 1024 at float32: a decoded stack alone would take 32 MiB.

    The test compiles for shapes, without arrays. Each layer keeps one x of 128 KiB, and
    the product decodes one matrix of 4 MiB, or its transpose, at a time.
    """

    def make():
        stack = LayerStack(
            lambda rngs: nnx.Linear(1024, 1024, rngs=rngs), 8, rngs=nnx.Rngs(0)
        )
        quantize_model(stack, QuantConfig("nf4"))
        return stack

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def loss(x, state):
        stack = nnx.merge(graphdef, state)
        return jnp.sum(stack(lambda layer, x, _: jnp.tanh(layer(x)), x, remat=remat))

    x = jax.ShapeDtypeStruct((32, 1024), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 20 * 2**20


def test_there_is_no_second_derivative_in_16_bits():
    stack, x = make(2), normal((5, 16)).astype(jnp.bfloat16)
    graphdef, params = nnx.split(stack)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss(x, remat):
        y = nnx.merge(graphdef, params)(keep_and_apply, x, remat=remat)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def slope(x, remat):
        return jnp.sum(jax.grad(loss)(x, remat).astype(jnp.float32))

    assert jnp.any(jax.grad(loss)(x, Remat(products=True)) != 0)
    assert jnp.any(jax.grad(slope)(x, True) != 0)
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.grad(slope)(x, Remat(products=True))


def test_a_decoder_keeps_its_products():
    """But those of experts it does not: there would be as many as experts."""
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    tokens = jnp.arange(8)[None]

    def count(config, remat):
        model = CausalLM(config, rngs=nnx.Rngs(0))
        add_adapter(model, LoraConfig(r=2), rngs=nnx.Rngs(1))
        graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(adapters):
            model = nnx.merge(graphdef, adapters, rest)
            return next_token_loss(model, tokens, remat=remat)

        return str(jax.make_jaxpr(jax.grad(loss))(adapters)).count("dot_general")

    kept = Remat(products=True)
    # The last of seven linear layers is not computed again in any case, except for the
    # inner product of its adapter.
    assert count(config, True) - count(config, kept) == 6 * 3 + 1
    experts = dataclasses.replace(config, num_experts=4, num_experts_per_tok=2)
    assert count(experts, True) - count(experts, kept) == 4 * 3
