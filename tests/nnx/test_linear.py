"""QuantLinear beside nnx.Linear, and under the transforms of NNX and JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.nnx import QuantLinear, QuantParam

QUANT_TYPES = ["nf4", "fp4", "int8", "dynamic8"]


def normal(shape, dtype=jnp.float32, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x, dtype)


def check(y, x, matrix, bias=0.0):
    """K + 2 roundings of 2^-24 is the most that a float32 sum can be off."""
    x, matrix, bias = (np.asarray(a, np.float64) for a in (x, matrix, bias))
    tolerance = (len(matrix) + 2) * 2**-24 * (np.abs(x) @ np.abs(matrix) + np.abs(bias))
    assert np.all(np.abs(np.asarray(y, np.float64) - (x @ matrix + bias)) <= tolerance)


def make(fan_in=128, fan_out=65, seed=0, **options):
    """A layer without its initializers, which take longer to compile than all else."""
    layer = nnx.eval_shape(
        lambda: QuantLinear(fan_in, fan_out, rngs=nnx.Rngs(0), **options)
    )
    dtype = options.get("param_dtype", jnp.float32)
    kernel = normal((fan_in, fan_out), dtype, seed, scale=1 / 11)
    layer.kernel = QuantParam(layer.config.quantize_kernel(kernel))
    if layer.bias is not None:
        layer.bias = nnx.Param(normal((fan_out,), dtype, seed + 1))
    return layer


def assert_same_variables(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "use_bias"),
    [(name, False, True) for name in QUANT_TYPES]
    + [("nf4", True, False), ("int8", True, True)],
)
def test_it_is_a_linear_layer_with_the_decoded_kernel(
    quant_type, double_quant, use_bias
):
    config = QuantConfig(quant_type, double_quant=double_quant)
    layer = make(config=config, use_bias=use_bias)
    kernel = layer.kernel[...]
    assert (kernel.shape, kernel.axis) == ((128, 65), -2)
    assert (kernel.quant_type, kernel.double_quant) == (quant_type, double_quant)
    assert (layer.bias is not None) == use_bias
    x = normal((2, 5, 128))
    y = layer(x)
    assert y.shape == (2, 5, 65)
    check(y, x, kernel.dequantize(), layer.bias[...] if use_bias else 0.0)


def test_the_kernel_is_nnx_linear_s_quantised():
    """It draws what nnx.Linear draws for the same seed."""
    config = QuantConfig("int8")
    layer = QuantLinear(128, 65, config=config, rngs=nnx.Rngs(7))
    linear = nnx.Linear(128, 65, rngs=nnx.Rngs(7))
    want = config.quantize_kernel(linear.kernel[...])
    assert_same_variables(layer.kernel[...], want)
    np.testing.assert_array_equal(layer.bias[...], linear.bias[...])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(input_dtype, dtype):
    y = make(dtype=dtype)(normal((5, 128), input_dtype))
    assert y.dtype == (input_dtype if dtype is None else dtype)


def test_param_dtype_and_compute_dtype():
    config = QuantConfig("nf4", compute_dtype=jnp.bfloat16)
    layer = make(config=config, param_dtype=jnp.bfloat16)
    assert layer.bias.dtype == layer.kernel.dtype == jnp.bfloat16
    x = normal((5, 128))
    y = layer(x)
    assert y.dtype == jnp.float32
    # bfloat16 operands, summed in float32; the bias as it is.
    check(
        y,
        x.astype(jnp.bfloat16).astype(jnp.float32),
        layer.kernel[...].dequantize(jnp.bfloat16).astype(jnp.float32),
        layer.bias[...].astype(jnp.float32),
    )


def test_an_input_that_does_not_fit():
    with pytest.raises(ValueError, match="the last axis of x must be 128"):
        make()(normal((5, 64)))


# --- What is trained, and what is not.


def paths(state):
    return [path for path, _ in nnx.to_flat_state(state)]


def test_the_kernel_is_no_parameter():
    layer = make()
    assert type(layer.kernel) is QuantParam
    assert not issubclass(QuantParam, nnx.Param)
    assert paths(nnx.state(layer, nnx.Param)) == [("bias",)]
    assert paths(nnx.state(layer, QuantParam)) == [("kernel",)]
    assert paths(nnx.state(make(use_bias=False), nnx.Param)) == []


def test_gradients_are_of_parameters_and_inputs_only():
    layer = make()
    x, dy = normal((5, 128)), normal((5, 65), seed=1)
    loss = lambda layer, x: jnp.sum(dy * layer(x))  # noqa: E731
    grads = nnx.grad(loss)(layer, x)
    assert paths(grads) == [("bias",)]
    np.testing.assert_allclose(grads["bias"][...], dy.sum(axis=0), rtol=0, atol=1e-5)
    check(nnx.grad(loss, argnums=1)(layer, x), dy, layer.kernel[...].dequantize().T)


def test_an_optimizer_moves_the_bias_only():
    layer = make()
    before = nnx.clone(layer)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    x = normal((5, 128))

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: jnp.mean(layer(x) ** 2))(layer))

    for _ in range(3):
        step(layer, optimizer)
    assert_same_variables(layer.kernel[...], before.kernel[...])
    assert np.all(layer.bias[...] != before.bias[...])
    assert isinstance(layer.kernel[...], jaxbnb.QuantizedArray)


# --- Transforms.


def test_jit_and_vmap_over_inputs():
    layer, x = make(), normal((3, 5, 128))
    want = layer(x)
    graphdef, state = nnx.split(layer)
    for got in (
        nnx.jit(lambda layer, x: layer(x))(layer, x),
        jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x),
        nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x),
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_an_ensemble_and_a_scan():
    """Made by nnx.vmap, used by it, and as the layers of nnx.scan."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make_layers(rngs):
        return QuantLinear(128, 128, rngs=rngs)

    layers = make_layers(nnx.Rngs(0))
    kernel = layers.kernel[...]
    assert kernel.shape == (3, 128, 128)
    x = normal((5, 128))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    for i in range(3):
        check(y[i], x, kernel[i].dequantize())

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    want = np.asarray(x, np.float64)
    for i in range(3):
        want = want @ np.asarray(kernel[i].dequantize(), np.float64)
    # Three products of 128 terms, of random signs.
    np.testing.assert_allclose(run(x, layers), want, rtol=1e-4, atol=1e-4)


def test_eval_shape():
    config = QuantConfig(double_quant=True)
    abstract, layer = nnx.eval_shape(lambda: make(config=config)), make(config=config)
    new = nnx.eval_shape(lambda: QuantLinear(128, 65, config=config, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(new) == nnx.graphdef(layer)
    assert nnx.graphdef(abstract) == nnx.graphdef(layer)
    got, want = (jax.tree.leaves(nnx.state(x)) for x in (abstract, layer))
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]
    assert jaxbnb.core.tree_nbytes(nnx.state(abstract)) == jaxbnb.core.tree_nbytes(
        nnx.state(layer)
    )


def test_saved_and_restored(tmp_path):
    """Needs arrays alone: nnx.split, a NumPy file and an abstract layer."""
    config = QuantConfig("nf4", double_quant=True)
    layer = make(config=config)
    leaves = jax.tree.leaves(nnx.state(layer))
    np.savez(tmp_path / "layer.npz", *map(np.asarray, leaves))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(config=config)))
    with np.load(tmp_path / "layer.npz") as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    restored = nnx.merge(graphdef, state)
    assert_same_variables(nnx.state(restored), nnx.state(layer))
    x = normal((5, 128))
    np.testing.assert_array_equal(restored(x), layer(x))


def test_updated_from_another_layer():
    layer, other = make(), make(seed=1)
    nnx.update(layer, nnx.state(other))
    x = normal((5, 128))
    np.testing.assert_array_equal(layer(x), other(x))


# --- From nnx.Linear.


@pytest.mark.parametrize("use_bias", [True, False])
def test_from_linear(use_bias):
    linear = nnx.Linear(
        128, 65, use_bias=use_bias, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    config = QuantConfig("fp4", block_size=32)
    layer = QuantLinear.from_linear(linear, config)
    want = jaxbnb.quantize(linear.kernel[...], "fp4", block_size=32, axis=-2)
    assert_same_variables(layer.kernel[...], want)
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (128, 65)
    assert (layer.config, layer.dtype) == (config, jnp.bfloat16)
    assert layer(normal((5, 128))).dtype == jnp.bfloat16
    abstract = nnx.eval_shape(lambda: QuantLinear.from_linear(linear, config))
    assert nnx.graphdef(abstract) == nnx.graphdef(layer)


def test_from_a_stack_of_linears():
    """Matrix by matrix: a slice of the stack is the layer of the slice."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make_linears(rngs):
        return nnx.Linear(128, 65, bias_init=nnx.initializers.normal(), rngs=rngs)

    linears = make_linears(nnx.Rngs(0))
    config = QuantConfig("nf4", double_quant=True)
    layers = QuantLinear.from_linear(linears, config)
    assert layers.kernel.shape == (3, 128, 65)
    for i in range(3):
        want = config.quantize_kernel(linears.kernel[i])
        assert_same_variables(layers.kernel[...][i], want)
    x = normal((5, 128))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    for i in range(3):
        check(y[i], x, layers.kernel[...][i].dequantize(), linears.bias[i])
