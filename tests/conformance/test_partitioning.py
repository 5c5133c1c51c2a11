"""Names of axes in Linen and NNX, on every layer with a quantised weight.

The names that divide a weight over a mesh also divide its codes and absmax. These have
the weight's axes in their stored order, with the summed axis last.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.linen import QuantDenseGeneral, StateBits, quantize_params, use_quantized

# The summed axis of 128 has 8 blocks, and 64 bytes of codes.
CONFIG = QuantConfig("nf4", block_size=16, double_quant=True)
X = jax.ShapeDtypeStruct((1, 128), jnp.float32)


def mesh():
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=axis_types)


def init(key, shape, dtype):
    """Draws multiples of 1/8, so that the mean of absmax is exact in any order."""
    x = np.arange(np.prod(shape)) % 97 % 17 - 8
    return jnp.asarray(x.reshape(shape) / 8, dtype)


def boxed(*names):
    return nn.with_partitioning(init, names)


def logical(*names):
    return nn.with_logical_partitioning(init, names)


def with_bits(*names):
    return jaxbnb.linen.with_state_bits(boxed(*names))


def of_init(layer, x=X):
    return lambda: layer.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype))


def of_params(layer, **rules):
    """Makes a Flax layer with quantised variables."""

    def make():
        variables = of_init(layer)()
        return quantize_params(layer, variables, X, config=CONFIG, **rules)[0]

    return make


LINEN = {
    "QuantDense": of_init(
        jaxbnb.QuantDense(64, CONFIG, kernel_init=boxed("data", "model"))
    ),
    "logical": of_init(
        jaxbnb.QuantDense(64, CONFIG, kernel_init=logical("data", "model"))
    ),
    "StateBits": of_init(
        jaxbnb.QuantDense(64, CONFIG, kernel_init=with_bits("data", "model"))
    ),
    "QuantDenseGeneral": of_init(
        QuantDenseGeneral(
            (4, 16), config=CONFIG, kernel_init=boxed("data", "model", None)
        )
    ),
    "nn.Dense": of_params(nn.Dense(64, kernel_init=boxed("data", "model"))),
    "nn.DenseGeneral": of_params(
        nn.DenseGeneral((4, 16), kernel_init=logical("data", None, "model"))
    ),
    "nn.Einsum": of_params(
        nn.Einsum(
            (4, 128, 16), "bd,hdk->bhk", False, kernel_init=boxed("model", "data")
        )
    ),
}
EMBED = of_init(
    jaxbnb.linen.QuantEmbed(64, 128, CONFIG, embedding_init=boxed("model", "data")),
    jax.ShapeDtypeStruct((1,), jnp.int32),
)


def named(*names):
    return nnx.with_partitioning(init, names)


def quantized(layer):
    def make():
        model = nnx.Dict(layer=layer())
        jaxbnb.nnx.quantize_model(model, rules=[(["layer", "up"], CONFIG)])
        return model["layer"]

    return make


class Experts(nnx.Module):
    def __init__(self):
        kernel = init(None, (128, 64), jnp.float32)
        self.up = nnx.Param(kernel, out_sharding=("data", "model"))


NNX = {
    "QuantLinear": lambda: jaxbnb.nnx.QuantLinear(
        128, 64, config=CONFIG, kernel_init=named("data", "model"), rngs=nnx.Rngs(0)
    ),
    "QuantEmbed": lambda: jaxbnb.nnx.QuantEmbed(
        64, 128, config=CONFIG, embedding_init=named("model", "data"), rngs=nnx.Rngs(0)
    ),
    "nnx.Linear": quantized(
        lambda: nnx.Linear(
            128,
            64,
            kernel_init=init,
            kernel_metadata={"out_sharding": ("data", "model")},
            rngs=nnx.Rngs(0),
        )
    ),
    "nnx.LinearGeneral": quantized(
        lambda: nnx.LinearGeneral(
            128, (4, 16), kernel_init=named("data", "model", None), rngs=nnx.Rngs(0)
        )
    ),
    "nnx.Einsum": quantized(
        lambda: nnx.Einsum(
            "bd,hdk->bhk",
            (4, 128, 16),
            kernel_init=named("model", "data", None),
            rngs=nnx.Rngs(0),
        )
    ),
    "nnx.Embed": quantized(
        lambda: nnx.Embed(
            64, 128, embedding_init=named("model", "data"), rngs=nnx.Rngs(0)
        )
    ),
    "nnx.Param": quantized(Experts),
}


def make_all():
    linen = {name: make() for name, make in {**LINEN, "QuantEmbed": EMBED}.items()}
    return linen, {name: nnx.state(make()) for name, make in NNX.items()}


def is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def specs_of(shapes):
    linen, states = shapes
    return nn.get_partition_spec(linen), nnx.get_partition_spec(states)


@pytest.fixture(scope="module")
def shapes():
    """Traces every layer outside any mesh, and returns the shapes."""
    with nnx.use_eager_sharding(False):
        return jax.eval_shape(make_all)


def test_a_spec_for_each_part(shapes):
    weights = jax.tree.leaves(specs_of(shapes), is_leaf=is_quantized)
    weights = [leaf for leaf in weights if is_quantized(leaf)]
    assert len(weights) == len(LINEN) + 1 + len(NNX)
    for weight in weights:
        assert weight.codes == weight.absmax == PartitionSpec("model", "data")
        assert weight.nested_absmax == PartitionSpec(None)
        assert weight.offset == PartitionSpec()


def test_made_by_jit_in_these_shardings(shapes):
    """Each device holds its part, and together they equal one device's result."""
    kernel, rows, heads = (
        init(None, shape, jnp.float32) for shape in ((128, 64), (64, 128), (4, 128, 16))
    )
    heads = jnp.moveaxis(heads, 0, 1).reshape(128, 64)
    want = {"QuantEmbed": CONFIG.quantize_embedding(rows)}
    want |= {
        name: CONFIG.quantize_kernel(heads) for name in ("nn.Einsum", "nnx.Einsum")
    }
    want["nnx.Embed"] = want["QuantEmbed"]
    of_others = CONFIG.quantize_kernel(kernel)
    with nnx.use_eager_sharding(False):
        shardings = jax.tree.map(
            functools.partial(NamedSharding, mesh()), specs_of(shapes)
        )
        got = jax.jit(make_all, out_shardings=shardings)()
    for name, variables in [item for api in nn.unbox(got) for item in api.items()]:
        leaves = jax.tree.leaves(variables, is_leaf=is_quantized)
        (weight,) = filter(is_quantized, leaves)
        assert weight.codes.addressable_shards[0].data.shape == (16, 32)
        assert weight.absmax.addressable_shards[0].data.shape == (16, 4)
        parts = jax.tree.leaves(weight), jax.tree.leaves(want.get(name, of_others))
        for a, b in zip(*parts, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_mesh_that_is_known_divides_what_it_can():
    """Four devices cannot divide two blocks of 64, so NNX's specs leave out that axis.

    NNX makes specs while the mesh is known. Linen makes them from the boxes.
    """
    metadata = {"out_sharding": ("model", "data")}

    def make():
        rngs = nnx.Rngs(0)
        layer = nnx.Linear(
            128, 64, kernel_init=init, kernel_metadata=metadata, rngs=rngs
        )
        return jaxbnb.nnx.QuantLinear.from_linear(layer, "nf4")

    with jax.set_mesh(mesh()):
        state = jax.jit(lambda: nnx.state(make()))()
        abstract = nnx.eval_shape(make)
        specs = nnx.get_partition_spec(state)["kernel"].get_raw_value()
        back = abstract.to_linear()
    held = state["kernel"].get_raw_value()
    assert specs.codes == held.codes.sharding.spec == PartitionSpec("data", "model")
    assert specs.absmax == PartitionSpec("data", None)
    assert held.absmax.addressable_shards[0].data.shape == (32, 2)
    planned = abstract.kernel.get_raw_value()
    assert planned.codes.sharding.spec == PartitionSpec("data", "model")
    assert planned.absmax.sharding.spec == PartitionSpec("data", None)
    assert back.kernel.out_sharding == ("model", "data")


def test_flax_plans_with_them():
    """It does with ``as_abstract``, ``get_abstract_model``, a loop over variables."""

    def make():
        metadata = {"out_sharding": ("data", "model")}
        layer = nnx.Linear(128, 64, kernel_metadata=metadata, rngs=nnx.Rngs(0))
        model = nnx.Dict(layer=layer)
        jaxbnb.nnx.quantize_model(model, CONFIG)
        return model

    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(make)
        with jax.set_mesh(mesh()):
            named = nnx.as_abstract(abstract)["layer"].kernel.get_raw_value()
        _, state = nnx.get_abstract_model(make, mesh())
    assert "nf4            8192   4620" in jaxbnb.summary(abstract)
    for q in (named, state["layer"]["kernel"].get_raw_value()):
        assert q.absmax.sharding.spec == PartitionSpec("model", "data")
        assert (q.codes.shape, q.codes.dtype) == ((64, 64), jnp.uint8)


def test_stacks_of_layers():
    """`LayerStack` and a named nnx.vmap both stack layers."""

    def make(rngs):
        metadata = {"out_sharding": ("data", "model")}
        return nnx.Linear(128, 64, kernel_metadata=metadata, rngs=rngs)

    named = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})

    def both():
        layers = nnx.split_rngs(splits=3)(named)(nnx.Rngs(0))
        stack = jaxbnb.nnx.LayerStack(make, 3, rngs=nnx.Rngs(0))
        return nnx.Dict(layers=layers, stack=stack)

    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(both)
        assert len(jaxbnb.nnx.quantize_model(model, CONFIG)) == 2
        specs = nnx.get_partition_spec(nnx.state(model))
    for kernel, first in [
        (specs["layers"]["kernel"], "layers"),
        (specs["stack"]["layer"]["kernel"], None),
    ]:
        q = kernel.get_raw_value()
        assert q.codes == q.absmax == PartitionSpec(first, "model", "data")
        assert q.nested_absmax == PartitionSpec(first, None)
        assert q.offset == PartitionSpec(first)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral(
            (4, 16),
            kernel_init=logical("data", "model", None),
            bias_init=nn.with_partitioning(nn.initializers.ones, ("model", None)),
            name="heads",
        )
        out = nn.DenseGeneral(
            128, axis=(-2, -1), kernel_init=boxed("model", None, "data"), name="out"
        )
        return out(heads(x)) / 64, None


class Stacked(nn.Module):
    """Two layers by nn.scan, which adds an axis to every box and removes it."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return blocks()(x)[0]


def test_an_unchanged_model_with_boxes():
    model = Stacked()
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    planned, report = quantize_params(model, shapes, X, config=CONFIG)
    assert report == ["ScanBlock_0.heads", "ScanBlock_0.out"]
    specs = nn.get_partition_spec(planned)["params"]["ScanBlock_0"]
    assert specs["heads"]["kernel"].codes == PartitionSpec("layers", "model", "data")
    assert specs["out"]["kernel"].absmax == PartitionSpec("layers", "data", "model")
    assert specs["out"]["kernel"].nested_absmax == PartitionSpec("layers", None)
    back = jaxbnb.linen.dequantize_params(model, planned, X)
    assert jax.tree.structure(back) == jax.tree.structure(shapes)

    @jax.jit
    def run(variables, x):
        real, _ = quantize_params(model, variables, X, config=CONFIG)
        assert jax.tree.structure(real) == jax.tree.structure(planned)
        decoded = jaxbnb.linen.dequantize_params(model, real, X)
        with use_quantized():
            return model.apply(real, x), model.apply(decoded, x)

    variables = jax.tree.map(lambda x: init(None, x.shape, x.dtype), shapes)
    x = np.ones((1, 128), np.float32) / 8
    got, want = run(variables, x)
    assert float(jnp.abs(want).max()) < 64
    # Sums of 128 and of 64 products, twice, at most as large as the largest output.
    np.testing.assert_allclose(got, want, rtol=0, atol=384 * 2**-24 * 64)


def test_a_box_is_named_where_it_was_not_taken_off(shapes):
    params = shapes[0]["QuantDense"]["quantized"]
    with pytest.raises(TypeError, match=r"a Partitioned instead of its codes.*unbox"):
        params["kernel"].dequantize()
    assert nn.unbox(params)["kernel"].dequantize().shape == (128, 64)
    kept = shapes[0]["StateBits"]["quantized"]["kernel"].codes
    assert isinstance(kept, StateBits)
    with pytest.raises(TypeError, match=r"got Partitioned; take it out of its box"):
        jaxbnb.quantize(boxed("data")(None, (64,), jnp.float32), "nf4")
