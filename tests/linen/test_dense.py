"""QuantDense compared with nn.Dense, and under Linen's transforms."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb import QuantConfig, QuantDense

QUANT_TYPES = ["nf4", "fp4", "int8", "dynamic8"]


def normal(shape, dtype=jnp.float32, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x, dtype)


def check(y, x, matrix, bias=0.0):
    """A float32 sum is off by at most K + 2 roundings of 2^-24."""
    x, matrix, bias = (np.asarray(a, np.float64) for a in (x, matrix, bias))
    tolerance = (len(matrix) + 2) * 2**-24 * (np.abs(x) @ np.abs(matrix) + np.abs(bias))
    assert np.all(np.abs(np.asarray(y, np.float64) - (x @ matrix + bias)) <= tolerance)


def make(seed=0, **options):
    """Returns a layer and its variables, without compiling `init`."""
    layer = QuantDense(65, **options)
    dtype = options.get("param_dtype", jnp.float32)
    kernel = layer.config.quantize_kernel(normal((128, 65), dtype, seed, scale=1 / 11))
    variables = {"quantized": {"kernel": kernel}}
    if layer.use_bias:
        variables["params"] = {"bias": normal((65,), dtype, seed + 1)}
    return layer, variables


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "use_bias"),
    [(name, False, True) for name in QUANT_TYPES]
    + [("nf4", True, False), ("int8", True, True)],
)
def test_it_is_a_dense_layer_with_the_decoded_kernel(
    quant_type, double_quant, use_bias
):
    config = QuantConfig(quant_type, double_quant=double_quant)
    layer, variables = make(config=config, use_bias=use_bias)
    kernel = variables["quantized"]["kernel"]
    assert (kernel.shape, kernel.axis) == ((128, 65), -2)
    assert (kernel.quant_type, kernel.double_quant) == (quant_type, double_quant)
    assert ("params" in variables) == use_bias
    bias = variables["params"]["bias"] if use_bias else 0.0
    x = normal((2, 5, 128))
    y = layer.apply(variables, x)
    assert y.shape == (2, 5, 65)
    check(y, x, kernel.dequantize(), bias)


def test_init():
    """It draws the same values as nn.Dense for a key, and quantises them."""
    x, key = jnp.ones((1, 128)), jax.random.key(7)
    config = QuantConfig("nf4", double_quant=True)
    layer = QuantDense(65, config=config)
    got = layer.init(key, x)
    want = nn.Dense(65).init(key, x)["params"]
    kernel = config.quantize_kernel(want["kernel"])
    jax.tree.map(np.testing.assert_array_equal, got["quantized"]["kernel"], kernel)
    np.testing.assert_array_equal(got["params"]["bias"], want["bias"])
    assert got.keys() == {"params", "quantized"}
    # eval_shape and jit give the same shapes.
    abstract = jax.eval_shape(layer.init, key, x)
    assert jax.tree.structure(abstract) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.structure(jax.jit(layer.init)(key, x)) == jax.tree.structure(got)


def test_weights_of_ones_own():
    layer, variables = make()
    matrix = normal((128, 65), seed=3)
    kernel = layer.config.quantize_kernel(matrix)
    x = normal((5, 128))
    y = layer.apply({**variables, "quantized": {"kernel": kernel}}, x)
    check(y, x, kernel.dequantize(), variables["params"]["bias"])
    # Conversely, x does not fit a stored kernel with another size.
    with pytest.raises(ValueError, match="the last axis of x must be 128"):
        layer.apply(variables, normal((5, 64)))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(input_dtype, dtype):
    layer, variables = make(dtype=dtype)
    y = layer.apply(variables, normal((5, 128), input_dtype))
    assert y.dtype == (input_dtype if dtype is None else dtype)


def test_param_dtype_and_compute_dtype():
    config = QuantConfig("nf4", compute_dtype=jnp.bfloat16)
    layer, variables = make(config=config, param_dtype=jnp.bfloat16)
    assert variables["params"]["bias"].dtype == jnp.bfloat16
    kernel = variables["quantized"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    x = normal((5, 128))
    y = layer.apply(variables, x)
    assert y.dtype == jnp.float32
    # The operands are bfloat16, the sum float32, and the bias unchanged.
    check(
        y,
        x.astype(jnp.bfloat16).astype(jnp.float32),
        kernel.dequantize(jnp.float32).astype(jnp.bfloat16).astype(jnp.float32),
        variables["params"]["bias"].astype(jnp.float32),
    )


def test_gradients_are_of_parameters_and_inputs_only():
    layer, variables = make()
    params, rest = variables["params"], {"quantized": variables["quantized"]}
    x, dy = normal((5, 128)), normal((5, 65), seed=1)

    def loss(params, x):
        return jnp.sum(dy * layer.apply({"params": params, **rest}, x))

    grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert jax.tree.map(jnp.shape, grads) == {"bias": (65,)}
    np.testing.assert_allclose(grads["bias"], dy.sum(axis=0), rtol=0, atol=1e-5)
    check(dx, dy, rest["quantized"]["kernel"].dequantize().T)


class Network(nn.Module):
    """Two quantised layers and a plain one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(QuantDense(128, name="first")(x))
        x = nn.relu(QuantDense(128, name="second")(x))
        return nn.Dense(4, name="head")(x)


def test_an_optimizer_trains_what_is_a_parameter():
    network, x = Network(), normal((16, 128))
    variables = jax.jit(network.init)(jax.random.key(0), x)
    params, frozen = variables["params"], {"quantized": variables["quantized"]}
    assert jax.tree.map(jnp.shape, params) == {
        "first": {"bias": (128,)},
        "second": {"bias": (128,)},
        "head": {"kernel": (128, 4), "bias": (4,)},
    }
    tx = jaxbnb.adamw8bit(1e-2)

    @jax.jit
    def step(params, state, frozen):
        def loss(params):
            return jnp.mean((network.apply({"params": params, **frozen}, x) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, value = step(params, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1


def test_jit_and_vmap():
    layer, variables = make()
    x = normal((3, 5, 128))
    want = layer.apply(variables, x)
    for got in (
        jax.jit(layer.apply)(variables, x),
        jax.vmap(lambda x: layer.apply(variables, x))(x),
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_an_ensemble_by_nn_vmap():
    ensemble = nn.vmap(
        QuantDense,
        in_axes=None,
        axis_size=3,
        variable_axes={"params": 0, "quantized": 0},
        split_rngs={"params": True},
    )(65)
    x = normal((5, 128))
    variables = jax.jit(ensemble.init)(jax.random.key(0), x)
    assert variables["quantized"]["kernel"].shape == (3, 128, 65)
    y = ensemble.apply(variables, x)
    for i in range(3):
        check(y[i], x, variables["quantized"]["kernel"][i].dequantize())
    assert not np.array_equal(y[0], y[1])


def test_a_stack_by_nn_scan():
    """The backward pass recomputes each layer."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(QuantDense(128)(x)), None

    stack = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0, "quantized": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = normal((5, 128))
    variables = jax.jit(stack.init)(jax.random.key(0), x, None)
    params = variables["params"]["QuantDense_0"]
    kernel = variables["quantized"]["QuantDense_0"]["kernel"]
    assert (params["bias"].shape, kernel.shape) == ((3, 128), (3, 128, 128))

    def scanned(x):
        return jnp.sum(stack.apply(variables, x, None)[0] ** 2)

    def looped(x):
        for i in range(3):
            x = jnp.tanh(x @ kernel[i].dequantize() + params["bias"][i])
        return jnp.sum(x**2)

    values, gradients = zip(
        *(jax.jit(jax.value_and_grad(f))(x) for f in (scanned, looped)), strict=True
    )
    # Each way has three products of 128 terms with random signs.
    np.testing.assert_allclose(*values, rtol=1e-4)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_saved_as_bytes_and_restored():
    """flax.serialization restores codes into variables of another seed."""
    layer, variables = make(config=QuantConfig("nf4", double_quant=True))
    _, other = make(config=QuantConfig("nf4", double_quant=True), seed=1)
    leaves, treedef = jax.tree.flatten(variables)
    data = flax.serialization.msgpack_serialize([np.asarray(leaf) for leaf in leaves])
    assert jax.tree.structure(other) == treedef
    restored = treedef.unflatten(flax.serialization.msgpack_restore(data))
    x = normal((5, 128))
    np.testing.assert_array_equal(layer.apply(restored, x), layer.apply(variables, x))
    assert not np.array_equal(layer.apply(other, x), layer.apply(variables, x))


def test_without_its_kernel():
    layer, variables = make()
    with pytest.raises(Exception, match="quantized"):
        layer.apply({"params": variables["params"]}, normal((5, 128)))
