"""Unchanged Linen models on quantised variables, compared with decoded ones."""

import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig, QuantizedArray
from jaxbnb.linen import (
    dequantize_params,
    merge_quantized,
    outlier_columns,
    quantize_params,
    split_quantized,
    use_quantized,
)

INT8 = QuantConfig("int8", block_size=16)


def normal(shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x / 4, dtype)


def fill(model, *args, **kwargs):
    """Returns normal variables, so that biases are not zero.

    Compiling the initializers would take longer than everything else.
    """
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map(lambda x: normal(x.shape, x.size, x.dtype), variables)


class Block(nn.Module):
    """Attention and a feed-forward, with residual branches."""

    @nn.compact
    def __call__(self, x, deterministic):
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        x = x + attention(x, deterministic=deterministic)
        x = x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))
        return x, None


class Model(nn.Module):
    """Every layer that can be quantised, under every transform."""

    def setup(self):
        blocks = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        self.embed = nn.Embed(24, 32)
        self.blocks = blocks()
        self.experts = experts(32)
        self.einsum = nn.Einsum((2, 32, 16), "btd,hdk->bthk")
        self.merge = nn.DenseGeneral(32, axis=(-2, -1))
        self.batched = nn.DenseGeneral((2, 16), batch_dims=(0,))
        self.lm_head = nn.Dense(24)

    def __call__(self, ids, deterministic=True):
        if not isinstance(deterministic, bool):
            raise TypeError("a flag must stay a flag")
        x, _ = self.blocks(self.embed(ids), deterministic)
        x = x + jnp.sum(self.experts(x), axis=0)
        x = x + self.merge(self.einsum(x))
        x = x + self.batched(x).reshape(x.shape)
        return self.embed.attend(x) + self.lm_head(x)


IDS = jnp.arange(6).reshape(2, 3)
LAYERS = [
    "blocks.attention.query",
    "blocks.attention.key",
    "blocks.attention.value",
    "blocks.attention.out",
    "blocks.up",
    "blocks.down",
    "experts",
    "einsum",
    "merge",
    "batched",
]


@functools.cache
def model_variables():
    return fill(Model(), IDS)


@functools.cache
def quantized():
    """Quantises everything, with rules for the embedding and the head."""
    rules = [(["embed", "lm_head"], INT8), (r"blocks\.(up|down)", QuantConfig("fp4"))]
    return quantize_params(Model(), model_variables(), IDS, config=INT8, rules=rules)


def test_each_kernel_is_quantised_along_what_it_sums_over():
    variables, report = quantized()
    assert sorted(report) == sorted([*LAYERS, "embed", "lm_head"])
    assert report.left_alone == {}
    before, after = model_variables()["params"], variables["params"]
    attention = after["blocks"]["attention"]
    assert attention["query"]["kernel"].shape == (3, 32, 32)
    assert after["blocks"]["up"]["kernel"].quant_type == "fp4"
    assert after["experts"]["kernel"].shape == (2, 32, 32)
    # The kernel (heads, features, head size) of "btd,hdk->bthk", as (features, ...).
    want = INT8.quantize_kernel(
        jnp.moveaxis(before["einsum"]["kernel"], 1, 0).reshape(32, 32)
    )
    jax.tree.map(np.testing.assert_array_equal, after["einsum"]["kernel"], want)
    want = INT8.quantize_embedding(before["embed"]["embedding"])
    jax.tree.map(np.testing.assert_array_equal, after["embed"]["embedding"], want)
    np.testing.assert_array_equal(
        attention["out"]["bias"], before["blocks"]["attention"]["out"]["bias"]
    )


def test_the_model_computes_with_the_decoded_weights():
    """Outputs agree, and so do gradients of the trained variables, biases here."""
    variables, _ = quantized()
    decoded = dequantize_params(Model(), variables, IDS)
    shapes = jax.tree.map(jnp.shape, decoded)
    assert shapes == jax.tree.map(jnp.shape, model_variables())
    trained, frozen = split_quantized(variables["params"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trained))

    @jax.jit
    def ours(trained, frozen):
        def loss(trained):
            with use_quantized():
                params = merge_quantized(trained, frozen)
                y = Model().apply({"params": params}, IDS)
            return jnp.mean(y**2), y

        return jax.value_and_grad(loss, has_aux=True)(trained)

    @jax.jit
    def theirs(params):
        def loss(params):
            y = Model().apply({"params": params}, IDS)
            return jnp.mean(y**2), y

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, y), gradient = ours(trained, frozen)
    (_, want), gradients = theirs(decoded["params"])
    scale = float(jnp.abs(want).max())
    # There are a dozen products of at most 64 terms each, with random signs.
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * scale)
    assert np.abs(y - Model().apply(model_variables(), IDS)).max() > 1e-3 * scale
    # The scale is the largest gradient: that of the keys' bias is zero up to rounding.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        other = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * scale)


def test_by_default_the_embedding_and_the_head_stay():
    wide = nn.Sequential([nn.Embed(128, 64), nn.Dense(64), nn.Conv(64, (3,))])

    def quantize():
        variables, report = quantize_params(wide, fill(wide, IDS), IDS)
        assert report == ["layers_1"]
        assert report.left_alone == {
            "layers_0.embedding": (128, 64),
            "layers_2.kernel": (3, 64, 64),
        }
        return variables

    jax.eval_shape(quantize)
    # Abstract variables and inputs work too, as for loading a checkpoint.
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    paths = []
    jax.eval_shape(
        lambda variables: paths.extend(quantize_params(Model(), variables, ids)[1]),
        model_variables(),
    )
    assert sorted(paths) == sorted(LAYERS)


@pytest.mark.parametrize("name", ["nf4", "llm_int8"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes_and_options_are_the_layers_own(name, dtype):
    """A bfloat16 input with float32 weights computes in float32, by default."""
    layer = nn.Dense(32, dtype=dtype)
    x = normal((4, 64), dtype=jnp.bfloat16).at[:, 3].set(20)
    with jax.numpy_dtype_promotion("standard"):
        variables, _ = quantize_params(
            layer, fill(layer, x), x, config=QuantConfig(name)
        )
        plain = dequantize_params(layer, variables, x)
        want = layer.apply(plain, x)
        with use_quantized(compute_dtype=jnp.bfloat16, outlier_threshold=0.0):
            coarse = layer.apply(variables, x)
        with use_quantized():
            got = layer.apply(variables, x)
    assert got.dtype == want.dtype == (dtype or jnp.float32)
    assert not np.array_equal(got, coarse) or dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
    # LLM.int8 loses half of 1/127 in rows below 6, bfloat16 2^-8 of a sum below 40.
    assert error <= 40 * 2**-8


def test_fp8_by_fp8():
    """It applies to fp8 weights only; int8 ones are multiplied as usual."""
    model, x = nn.Sequential([nn.Dense(32), nn.Dense(16)]), normal((4, 64))
    config = QuantConfig("fp8_e4m3", act_quant_type="fp8_e4m3")
    variables, _ = quantize_params(
        model, fill(model, x), x, config=config, rules=[(["layers_1"], INT8)]
    )
    with use_quantized(act_quant_type="fp8_e4m3"):
        got = model.apply(variables, x)
    first, last = (variables["params"][f"layers_{i}"] for i in range(2))
    x = jaxbnb.matmul(x, first["kernel"], act_quant_type="fp8_e4m3") + first["bias"]
    want = jaxbnb.matmul(x, last["kernel"]) + last["bias"]
    np.testing.assert_array_equal(got, want)


def test_outside_of_the_context_it_is_an_error():
    layer, x = nn.Dense(64), normal((2, 64))
    variables, _ = quantize_params(layer, fill(layer, x), x)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        layer.apply(variables, x)
    # For a square int8 kernel, the codes have the kernel's shape.
    variables, _ = quantize_params(layer, fill(layer, x), x, config=INT8)
    with pytest.raises(TypeError, match=r"inside jaxbnb\.linen\.use_quantized"):
        layer.apply(variables, x)

    def loss(params):
        with use_quantized():
            return jnp.sum(layer.apply({"params": params}, x))

    with pytest.raises(TypeError, match="grad requires real- or complex-valued"):
        jax.grad(loss)(variables["params"])


@pytest.mark.parametrize("config", ["nf4", QuantConfig("int8")])
def test_a_format_by_position(config):
    model, x = nn.Dense(32), jnp.ones((1, 64))
    message = r"by keyword: config=('nf4'|QuantConfig\()"
    with pytest.raises(TypeError, match=message):
        quantize_params(model, fill(model, x), x, config)
    with pytest.raises(TypeError) as info:
        quantize_params(model, fill(model, x), x, 3)
    assert "by keyword" not in str(info.value)


def test_layers_that_inherit():
    """A subclass that calls nn.Dense is quantised; one with its own product is not."""

    class Scaled(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Other(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", self.kernel_init, (64, self.features))

    model, x = nn.Sequential([Scaled(64), Other(64)]), normal((2, 64))
    variables, report = quantize_params(model, fill(model, x), x, config=INT8)
    assert (report, report.left_alone) == (["layers_0"], {"layers_1.kernel": (64, 64)})
    with use_quantized():
        y = model.apply(variables, x)
    want = model.apply(dequantize_params(model, variables, x), x)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_partitioned_kernels_are_taken_out_of_their_box():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer, x = nn.Dense(32, kernel_init=init), normal((2, 64))
    variables, _ = quantize_params(layer, fill(layer, x), x)
    assert isinstance(variables["params"]["kernel"], QuantizedArray)
    with use_quantized():
        assert layer.apply(variables, x).shape == (2, 32)


def test_what_is_refused():
    x = normal((2, 64))

    def quantize(model, *args, **options):
        jax.eval_shape(
            lambda: quantize_params(model, fill(model, *args), *args, **options)[0]
        )

    dense = nn.Sequential([nn.Dense(64)])
    with pytest.raises(ValueError, match=r"no layer of Sequential: .*'up'.*layers_0"):
        quantize(dense, x, rules=[(["up"], INT8)])
    with pytest.raises(
        TypeError, match=r"^rules are \(layers, config\) pairs in a list"
    ):
        quantize(dense, x, rules={"Dense_0": "int8"})
    with pytest.raises(ValueError, match=r"nothing to quantise in LayerNorm"):
        quantize(nn.LayerNorm(), x)
    own = nn.Sequential([nn.Dense(64, dot_general=lambda *args, **_: args[0])])
    with pytest.raises(NotImplementedError, match=r"layers_0: Dense has a dot_general"):
        quantize(own, x)
    with pytest.raises(ValueError, match=r"each axis must be in at least two"):
        quantize(nn.Einsum((64, 3), "bi,ij->b", use_bias=False), x)
    other_axis = nn.vmap(
        nn.Dense,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )
    stacked = nn.Sequential([other_axis(8)])
    with pytest.raises(ValueError, match=r"layers_0: a kernel of shape \(64, 8\)"):
        quantize(stacked, x)
    variables, _ = quantize_params(dense, fill(dense, x), x)
    with pytest.raises(ValueError, match=r"quantised already: {'nf4': \['layers_0"):
        quantize_params(dense, variables, x)
    own = jaxbnb.QuantDense(8, use_bias=False)
    with pytest.raises(ValueError, match="QuantDense is quantised already"):
        quantize_params(own, fill(own, x), x)
    with pytest.raises(ValueError, match="Sequential has no quantised parameters"):
        dequantize_params(dense, dequantize_params(dense, variables, x), x)
    with pytest.raises(ValueError, match=r"both have \['a'\]"):
        merge_quantized({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("function", "twin"),
    [
        (quantize_params, "quantize_model"),
        (dequantize_params, "dequantize_model"),
        (outlier_columns, "outlier_columns"),
    ],
)
def test_what_is_no_model_of_linen(function, twin):
    x = jnp.ones((1, 64))
    model = nnx.Dict(up=nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=rf"the NNX model Dict.*jaxbnb\.nnx\.{twin}\("):
        function(model, x)
    with pytest.raises(TypeError, match="takes a Linen module"):
        function({"params": {}}, x)
    with pytest.raises(TypeError, match="compute_dtype must be a dtype, got 'nf4'"):
        use_quantized("nf4").__enter__()
    for variables in ({"Dense_0": {}}, x):
        with pytest.raises(ValueError, match=r"give {'params': params}"):
            function(nn.Dense(8), variables, x)
