"""Every layer with a quantised kernel, in every format, through every transform.

A layer is a pure function here, ``apply(variables, x)``, so that one table serves
Linen, NNX and adapters. Every kernel is (64, 32). One column of x has an outlier for
LLM.int8 in each row, so any subset of rows has the same outliers. The results of
transforms differ from the plain one only in how 64 products are summed.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.core import QuantConfig, QuantizedArray, formats

pytestmark = pytest.mark.matrix

FAN_IN, FAN_OUT = 64, 32
BLOCK = 32

FORMATS = {
    name: QuantConfig(name, BLOCK)
    for name in ("nf4", "fp4", "int4", "int8", "dynamic8", "fp8_e4m3", "fp8_e5m2")
}
FORMATS |= {name: QuantConfig(name) for name in formats.SCALED}
FORMATS["nf4_double"] = QuantConfig("nf4", BLOCK, double_quant=True)
FORMATS["llm_int8"] = QuantConfig("llm_int8")
FORMATS["fp8_by_fp8"] = QuantConfig("fp8_e4m3", act_quant_type="fp8_e4m3")


def normal(shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x)


def linen(config):
    layer = jaxbnb.QuantDense(FAN_OUT, config=config)
    kernel = config.quantize_kernel(normal((FAN_IN, FAN_OUT), 1, 1 / 8))
    bias = normal((FAN_OUT,), 2)
    return layer.apply, {"quantized": {"kernel": kernel}, "params": {"bias": bias}}


def split(module):
    graphdef, state = nnx.split(module)
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def quant_linear(config):
    plain = nnx.Linear(FAN_IN, FAN_OUT, rngs=nnx.Rngs(0))
    plain.bias[...] = normal((FAN_OUT,), 2)
    return jaxbnb.nnx.QuantLinear.from_linear(plain, config)


def adapted(config):
    config_of = jaxbnb.lora.LoraConfig(r=2)
    layer = jaxbnb.lora.LoraLinear(quant_linear(config), config_of, rngs=nnx.Rngs(1))
    layer.adapters["default"].lora_b[...] = normal((2, FAN_OUT), 3, 1 / 8)
    return layer


HEADS = (4, FAN_OUT // 4)


def flat(apply):
    """Joins the heads of the result."""
    return lambda variables, x: apply(variables, x).reshape(*x.shape[:-1], FAN_OUT)


def of_heads(plain):
    """Makes an NNX layer of heads, with the same bias as the other layers."""

    def make(config):
        model = nnx.Dict(layer=plain())
        model["layer"].bias[...] = normal((FAN_OUT,), 2).reshape(HEADS)
        jaxbnb.nnx.quantize_model(model, config)
        apply, state = split(model["layer"])
        return flat(apply), state

    return make


def general():
    return nnx.LinearGeneral(FAN_IN, HEADS, rngs=nnx.Rngs(0))


def einsum():
    shape = (HEADS[0], FAN_IN, HEADS[1])
    return nnx.Einsum("...d,hdk->...hk", shape, HEADS, rngs=nnx.Rngs(0))


def dense_general(config):
    layer = jaxbnb.linen.QuantDenseGeneral(HEADS, config=config)
    _, variables = linen(config)
    variables["params"]["bias"] = variables["params"]["bias"].reshape(HEADS)
    return flat(layer.apply), variables


def intercepted(config):
    """Makes an nn.DenseGeneral that `use_quantized` intercepts."""
    layer = nn.DenseGeneral(HEADS)
    params = {
        "kernel": normal((FAN_IN, *HEADS), 1, 1 / 8),
        "bias": normal((FAN_OUT,), 2).reshape(HEADS),
    }
    x = jax.ShapeDtypeStruct((1, FAN_IN), jnp.float32)
    variables, _ = jaxbnb.linen.quantize_params(
        layer, {"params": params}, x, config=config
    )

    def apply(variables, x):
        # With weights in float32, it would otherwise compute in float32.
        own = layer.copy(dtype=x.dtype)
        with jaxbnb.linen.use_quantized():
            return own.apply(variables, x)

    return flat(apply), variables


def tied_head(config):
    """Makes a head from QuantEmbed's rows, with the other layers' bias."""
    rows = config.quantize_embedding(normal((FAN_OUT, FAN_IN), 1, 1 / 8))
    layer = jaxbnb.linen.QuantEmbed(FAN_OUT, FAN_IN, config=config)

    def apply(variables, x):
        y = layer.apply(variables, x, method="attend")
        return y + normal((FAN_OUT,), 2).astype(y.dtype)

    return apply, {"quantized": {"embedding": rows}}


LAYERS = {
    "QuantDense": linen,
    "QuantLinear": lambda config: split(quant_linear(config)),
    "LoraLinear": lambda config: split(adapted(config)),
    "QuantDenseGeneral": dense_general,
    "QuantLinearGeneral": of_heads(general),
    "QuantEinsum": of_heads(einsum),
    "QuantEmbed": tied_head,
    "nn.DenseGeneral": intercepted,
}
ALONE = ("QuantDense", "QuantLinear", "LoraLinear")
# All other layers multiply by the same function as these, so they go through the table
# together, in one program per format.
TOGETHER = tuple(layer for layer in LAYERS if layer not in ALONE)
CASES = [(layer, name) for layer in ALONE for name in FORMATS]


@functools.cache
def make(layer, name):
    return LAYERS[layer](FORMATS[name])


def kernel_of(variables):
    leaves = jax.tree.leaves(
        variables, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
    )
    (kernel,) = (leaf for leaf in leaves if isinstance(leaf, QuantizedArray))
    # A tied head stores rows; its kernel is their transpose.
    return kernel if kernel.axis == -2 else kernel.mT


def inputs(dtype=jnp.float32):
    x = np.clip(np.asarray(normal((4, FAN_IN))), -5, 5)
    x[:, 5] = [8.0, -9.0, 6.0, 7.0]
    return jnp.asarray(x, dtype)


@functools.cache
def plain(layer, name):
    apply, variables = make(layer, name)
    return np.asarray(jax.jit(apply)(variables, inputs()))


def terms(x=None):
    """Returns the sum of |x| times 5 / 8, the largest weight."""
    x = np.asarray(inputs() if x is None else x, np.float32)
    return np.sum(np.abs(x), axis=-1, keepdims=True) * 5 / 8


def tolerance(x):
    """Returns the most that 64 + 4 roundings can add up to.

    It is doubled, because an adapter's own matrix is as large.
    """
    return 2 * (FAN_IN + 4) * 2**-24 * terms(x)


def rounding_of_inputs(name):
    """Each input, at most 5, is off by half a level, times its weight; in fp8 by half a
    step, 2^-4 of the input.
    """
    rounding = {"llm_int8": 5 / 254 * FAN_IN * 5 / 8, "fp8_by_fp8": terms() / 16}
    return rounding.get(name, 0)


def bfloat16_bound(name):
    """x, the kernel and two results are rounded, to 2^-9 of each. Inputs that move by
    as much may get other codes: in LLM.int8 half a level apart, in fp8 the next one,
    2^-3 of the input apart.
    """
    return (4 * 2**-8 + (2**-3 if name == "fp8_by_fp8" else 0)) * terms()


def check(y, layer, name, dtype=np.float32):
    want = plain(layer, name)
    assert (y.shape, y.dtype) == (want.shape, dtype)
    assert np.all(np.abs(np.asarray(y) - want) <= tolerance(inputs()))


def gradient(apply, variables, x, dy):
    return jax.grad(lambda x: jnp.sum(dy * apply(variables, x)))(x)


@functools.cache
def compiled_gradient(layer, name):
    apply, _ = make(layer, name)
    return jax.jit(functools.partial(gradient, apply))


# --- The table of behaviours: each takes a layer and a format.


def eager(layer, name):
    """It is the product with the decoded kernel, up to the rounding of inputs."""
    apply, variables = make(layer, name)
    y = apply(variables, inputs())
    check(y, layer, name)
    if layer != "LoraLinear":
        want = inputs() @ kernel_of(variables).dequantize() + normal((FAN_OUT,), 2)
        bound = tolerance(inputs()) + rounding_of_inputs(name)
        assert np.all(np.abs(y - want) <= bound)


def grad(layer, name):
    _, variables = make(layer, name)
    dy = normal((4, FAN_OUT), 4)
    dx = compiled_gradient(layer, name)(variables, inputs(), dy)
    matrix = kernel_of(variables).dequantize()
    if layer == "LoraLinear":
        # The adapter's scale is 8 / 2.
        adapter = variables["adapters"]["default"]
        a, b = (adapter[name].get_value() for name in ("lora_a", "lora_b"))
        matrix = matrix + 4 * (a @ b)
    np.testing.assert_allclose(
        dx, dy @ matrix.T, rtol=0, atol=float(tolerance(dy).max())
    )


def remat(layer, name):
    apply, variables = make(layer, name)
    dy = normal((4, FAN_OUT), 4)
    want = compiled_gradient(layer, name)(variables, inputs(), dy)
    remat = jax.jit(functools.partial(gradient, jax.checkpoint(apply)))
    np.testing.assert_array_equal(remat(variables, inputs(), dy), want)


def vmap(layer, name):
    apply, variables = make(layer, name)
    y = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(variables, inputs())
    check(y, layer, name)


def stack(variables):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)


def vmap_of_a_stack(layer, name):
    apply, variables = make(layer, name)
    y = jax.jit(jax.vmap(apply, in_axes=(0, None)))(stack(variables), inputs())
    for i in range(2):
        check(y[i], layer, name)


def scan(layer, name):
    apply, variables = make(layer, name)

    @jax.jit
    def run(stacked, x):
        return jax.lax.scan(lambda x, v: (x, apply(v, x)), x, stacked)[1]

    y = run(stack(variables), inputs())
    for i in range(2):
        check(y[i], layer, name)


def eval_shape(layer, name):
    apply, variables = make(layer, name)
    shape = jax.eval_shape(apply, variables, inputs(jnp.bfloat16))
    assert (shape.shape, shape.dtype) == ((4, FAN_OUT), jnp.bfloat16)
    abstract = jax.eval_shape(lambda: LAYERS[layer](FORMATS[name])[1])
    assert jax.tree.structure(abstract) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(variables), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def bfloat16(layer, name):
    apply, variables = make(layer, name)
    y = jax.jit(apply)(variables, inputs(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(y, np.float32) - plain(layer, name))
    assert np.all(difference <= bfloat16_bound(name))


def residual(layer, name):
    """The backward pass keeps only the stored form of the kernel."""
    apply, variables = make(layer, name)
    kept = jax.eval_shape(
        lambda v, x: jax.tree.leaves(jax.vjp(lambda x: apply(v, x), x)[1]),
        variables,
        inputs(),
    )
    kernel = kernel_of(variables)
    assert kernel.codes.shape in {leaf.shape for leaf in kept}
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.size < kernel.size for leaf in floats)


def put(kernel, leaf):
    """Divides rows of codes and absmax, and puts everything else on both devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    is_rows = leaf.shape in (kernel.codes.shape, kernel.absmax.shape)
    spec = PartitionSpec("model") if is_rows else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def sharded(layer, name):
    """Rows of the codes, which are outputs, are divided between two devices."""
    apply, variables = make(layer, name)
    placed = jax.tree.map(functools.partial(put, kernel_of(variables)), variables)
    assert len(kernel_of(placed).codes.addressable_shards) == 2
    x = put(kernel_of(variables), inputs())
    check(jax.jit(apply)(placed, x), layer, name)


BEHAVIOURS = [
    eager,
    grad,
    remat,
    vmap,
    vmap_of_a_stack,
    scan,
    eval_shape,
    bfloat16,
    residual,
    sharded,
]


@pytest.mark.parametrize(("layer", "name"), CASES)
@pytest.mark.parametrize("check_behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
def test_conformance(check_behaviour, layer, name):
    check_behaviour(layer, name)


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_saved_by_orbax_and_restored(layer, name, tmp_path):
    apply, variables = make(layer, name)
    leaves, treedef = jax.tree.flatten(variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", leaves)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", leaves)
    y = jax.jit(apply)(treedef.unflatten(restored), inputs())
    np.testing.assert_array_equal(y, plain(layer, name))


def transformed(apply, variables, x, dy):
    """Returns the result of every transform that compiles a layer."""
    many = stack(variables)
    return {
        "plain": apply(variables, x),
        "bfloat16": apply(variables, x.astype(jnp.bfloat16)),
        "vmap": jax.vmap(apply, in_axes=(None, 0))(variables, x),
        "vmap_of_a_stack": jax.vmap(apply, in_axes=(0, None))(many, x)[1],
        "scan": jax.lax.scan(lambda x, v: (x, apply(v, x)), x, many)[1][1],
        "grad": gradient(apply, variables, x, dy),
        "remat": gradient(jax.checkpoint(apply), variables, x, dy),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_the_other_layers(name, tmp_path):
    x, dy = inputs(), normal((4, FAN_OUT), 4)
    applies = {layer: make(layer, name)[0] for layer in TOGETHER}
    variables = {layer: make(layer, name)[1] for layer in TOGETHER}

    @jax.jit
    def run(variables, x):
        return {k: transformed(f, variables[k], x, dy) for k, f in applies.items()}

    results = run(variables, x)
    for layer, got in results.items():
        # The behaviour of the same name above says what each must be.
        matrix = kernel_of(variables[layer]).dequantize()
        want = np.asarray(x @ matrix + normal((FAN_OUT,), 2))
        plain = np.asarray(got["plain"])
        assert np.all(
            np.abs(plain - want) <= tolerance(x) + rounding_of_inputs(name)
        ), layer
        for kind in ("vmap", "vmap_of_a_stack", "scan"):
            assert np.all(np.abs(got[kind] - plain) <= tolerance(x)), (layer, kind)
        assert got["bfloat16"].dtype == jnp.bfloat16
        difference = np.abs(np.asarray(got["bfloat16"], np.float32) - plain)
        assert np.all(difference <= bfloat16_bound(name)), layer
        np.testing.assert_allclose(
            got["grad"], dy @ matrix.T, rtol=0, atol=float(tolerance(dy).max())
        )
        np.testing.assert_array_equal(got["grad"], got["remat"])
        eval_shape(layer, name)
        residual(layer, name)

    placed = {
        layer: jax.tree.map(functools.partial(put, kernel_of(v)), v)
        for layer, v in variables.items()
    }
    run = jax.jit(lambda v, x: {k: f(v[k], x) for k, f in applies.items()})
    for layer, y in run(placed, x).items():
        assert len(kernel_of(placed[layer]).codes.addressable_shards) == 2
        assert np.all(np.abs(y - results[layer]["plain"]) <= tolerance(x)), layer

    leaves = jax.tree.leaves(variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", leaves)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", leaves)
    for before, after in zip(leaves, restored, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


# --- A tree after arithmetic on its codes.

DAMAGE = {
    "cast": lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree),
    "absmax cast": lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree
    ),
    "averaged": lambda tree: optax.incremental_update(tree, tree, 0.5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_codes_that_were_computed_with(damage):
    """Every layer raises an explanation at its first use, not before."""
    found = r"has (codes|absmax) in (float32|bfloat16), not .*cast_floating\(tree"
    for layer in LAYERS:
        apply, variables = make(layer, "int8")
        with jax.numpy_dtype_promotion("standard"):
            variables = DAMAGE[damage](variables)
        with pytest.raises(TypeError, match=found):
            jax.eval_shape(apply, variables, inputs())


@pytest.mark.parametrize("layer", LAYERS)
def test_cast_floating(layer):
    """The kernel has the same codes, and decodes to the new dtype."""
    apply, variables = make(layer, "nf4_double")
    cast = jaxbnb.core.cast_floating(variables, jnp.bfloat16)
    assert kernel_of(cast).dtype == jnp.bfloat16
    before, after = jax.tree.leaves(kernel_of(variables)), kernel_of(cast)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(after), strict=True))
    # An adapter's scale is cast too, although it multiplies in float32.
    with jax.numpy_dtype_promotion("standard"):
        y = jax.eval_shape(apply, cast, inputs(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    abstract = jax.eval_shape(lambda: variables)
    planned = jaxbnb.core.cast_floating(abstract, jnp.bfloat16)
    assert jax.tree.structure(planned) == jax.tree.structure(cast)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(cast), strict=True):
        assert a.dtype == b.dtype


def test_cast_floating_takes_a_floating_dtype():
    with pytest.raises(TypeError, match="casts to a floating dtype, got"):
        jaxbnb.core.cast_floating({}, jnp.int8)
    q = jax.tree.map(lambda x: x / 2, QuantConfig("nf4").quantize_kernel(ROW.T))
    with pytest.raises(TypeError, match="codes in float32"):
        jaxbnb.core.cast_floating({"kernel": q}, jnp.bfloat16)


# --- A format's name is accepted wherever a config is.


def of_nnx(make):
    """Returns the variables of the model from ``make(format)``."""
    return lambda format: nnx.state(make(format))


def with_adapter(format):
    model = nnx.Dict(layer=nnx.Linear(FAN_IN, FAN_OUT, rngs=nnx.Rngs(0)))
    config = jaxbnb.lora.LoraConfig(r=2)
    jaxbnb.lora.add_adapter(model, config, quant=format, rngs=nnx.Rngs(1))
    return model


def by_rule(format):
    model = nnx.Dict(layer=nnx.Linear(FAN_IN, FAN_OUT, rngs=nnx.Rngs(0)))
    jaxbnb.nnx.quantize_model(model, rules=[(["layer"], format)])
    return model


def of_linen(layer, x):
    return lambda format: layer(format).init(jax.random.key(0), x)


def quantized_params(format):
    layer, x = nn.Dense(FAN_OUT), jnp.ones((1, FAN_IN))
    params = {"kernel": normal((FAN_IN, FAN_OUT)), "bias": normal((FAN_OUT,))}
    return jaxbnb.linen.quantize_params(layer, {"params": params}, x, config=format)[0]


ROW = jnp.ones((1, FAN_IN))
TAKES_A_FORMAT = {
    "QuantLinear": of_nnx(
        lambda f: jaxbnb.nnx.QuantLinear(FAN_IN, FAN_OUT, config=f, rngs=nnx.Rngs(0))
    ),
    "from_linear": of_nnx(quant_linear),
    "QuantLinearGeneral": of_nnx(
        lambda f: jaxbnb.nnx.QuantLinearGeneral(
            FAN_IN, HEADS, config=f, rngs=nnx.Rngs(0)
        )
    ),
    "from_linear_general": of_nnx(
        lambda f: jaxbnb.nnx.QuantLinearGeneral.from_linear_general(general(), f)
    ),
    "QuantEinsum": of_nnx(
        lambda f: jaxbnb.nnx.QuantEinsum(
            "...d,df->...f", (FAN_IN, FAN_OUT), config=f, rngs=nnx.Rngs(0)
        )
    ),
    "from_einsum": of_nnx(lambda f: jaxbnb.nnx.QuantEinsum.from_einsum(einsum(), f)),
    "nnx.QuantEmbed": of_nnx(
        lambda f: jaxbnb.nnx.QuantEmbed(FAN_OUT, FAN_IN, config=f, rngs=nnx.Rngs(0))
    ),
    "from_embed": of_nnx(
        lambda f: jaxbnb.nnx.QuantEmbed.from_embed(
            nnx.Embed(FAN_OUT, FAN_IN, rngs=nnx.Rngs(0)), f
        )
    ),
    "quantize_model": lambda f: of_heads(general)(f)[1],
    "a rule": of_nnx(by_rule),
    "add_adapter": of_nnx(with_adapter),
    "QuantDense": of_linen(lambda f: jaxbnb.QuantDense(FAN_OUT, config=f), ROW),
    "QuantDenseGeneral": of_linen(
        lambda f: jaxbnb.linen.QuantDenseGeneral(HEADS, config=f), ROW
    ),
    "linen.QuantEmbed": of_linen(
        lambda f: jaxbnb.linen.QuantEmbed(FAN_OUT, FAN_IN, config=f), ROW.astype(int)
    ),
    "quantize_params": quantized_params,
}


@pytest.mark.parametrize("taker", TAKES_A_FORMAT)
def test_a_name_is_the_config_of_that_format(taker):
    take = TAKES_A_FORMAT[taker]
    by_name, by_config = (
        jax.eval_shape(functools.partial(take, format))
        for format in ("fp4", QuantConfig("fp4"))
    )
    assert jax.tree.structure(by_name) == jax.tree.structure(by_config)
    kernel_of(by_name)
    with pytest.raises(TypeError, match=r"a format is a jaxbnb\.QuantConfig, or a"):
        take(4)
    with pytest.raises(ValueError, match="quant_type 'nf5' is not known"):
        take("nf5")
    with pytest.raises(ValueError, match=r"no negative levels.* give 'dynamic8'"):
        take(formats.UNSIGNED)


def test_every_format_is_here():
    """The table has every format except the one for values that are not negative."""
    here = {config.quant_type for config in FORMATS.values()}
    assert here == formats.CODEBOOKS.keys() - {"dynamic8_unsigned"}
