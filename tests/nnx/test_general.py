"""QuantLinearGeneral, QuantEinsum and QuantDenseGeneral beside Flax's own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.nnx import (
    LayerStack,
    QuantEinsum,
    QuantLinearGeneral,
    QuantParam,
    dequantize_model,
    quantize_model,
)

INT8 = QuantConfig("int8", block_size=16)


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x)


def general(*args, **options):
    return nnx.LinearGeneral(*args, **options, rngs=nnx.Rngs(0))


def einsum(*args):
    return nnx.Einsum(*args, rngs=nnx.Rngs(0))


def fill(make):
    """A module without its initializers, which take longer to compile than all else."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map(lambda x: normal(x.shape, x.size), state))


# By name: the layer, its input, and the shape that its kernel is held in.
CASES = {
    "heads": (lambda: general(32, (2, 8)), (3, 32), (32, 16)),
    "heads merged": (
        lambda: general((2, 16), (8,), axis=(-2, -1)),
        (3, 5, 2, 16),
        (32, 8),
    ),
    "axes apart": (
        lambda: general((2, 16), (3, 4), axis=(1, -1)),
        (3, 2, 5, 16),
        (32, 12),
    ),
    "experts": (
        lambda: general(16, (2, 8), batch_axis={0: 3}),
        (3, 2, 5, 16),
        (3, 16, 16),
    ),
    "einsum of heads": (
        lambda: einsum("...td,hdk->...thk", (2, 16, 8), (2, 8)),
        (3, 5, 16),
        (16, 16),
    ),
    "einsum of experts": (
        lambda: einsum("gecd,edf->gecf", (3, 16, 8), (3, 8)),
        (2, 3, 5, 16),
        (3, 16, 8),
    ),
    "einsum transposed": (
        lambda: einsum("bthk,dhk->bdt", (6, 2, 16), (6,)),
        (2, 5, 2, 16),
        (32, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_flaxs_layer_with_the_decoded_kernel(name):
    make, shape, held = CASES[name]
    model, x = fill(lambda: nnx.Dict(layer=make())), normal(shape)
    before = nnx.clone(model)
    assert quantize_model(model, INT8) == ["layer"]
    assert model["layer"].kernel[...].shape == held
    # What models read sizes from.
    assert model["layer"].kernel.shape == before["layer"].kernel.shape
    kinds = [type(variable) for _, variable in nnx.to_flat_state(nnx.state(model))]
    assert kinds == [nnx.Param, QuantParam]
    decoded = nnx.clone(model)
    assert dequantize_model(decoded) == ["layer"]
    kernels = (m["layer"].kernel[...] for m in (before, decoded))
    # Half a level of the largest of some thousand normal draws.
    np.testing.assert_allclose(*kernels, rtol=0, atol=4.5 / 254)
    assert nnx.graphdef(decoded) == nnx.graphdef(before)
    (y, dx), (want, dwant) = (outputs_and_gradient(m, x) for m in (model, decoded))
    # Sums of at most 32 products, each below 20, and of 16 times 100.
    np.testing.assert_allclose(y, want, rtol=0, atol=34 * 2**-24 * 20)
    np.testing.assert_allclose(dx, dwant, rtol=0, atol=34 * 2**-24 * 200)


def outputs_and_gradient(model, x):
    graphdef, state = nnx.split(model)

    def loss(x, state):
        y = nnx.merge(graphdef, state)["layer"](x)
        return jnp.sum(y**2) / 2, y

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    dx, y = gradient(x, state)
    return y, dx


class Layer(nnx.Module):
    """Attention and a mixture of experts that all see every token."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, 32, decode=False, rngs=rngs)
        self.up = nnx.Einsum("btd,edf->ebtf", (3, 32, 64), (3, 64), rngs=rngs)
        self.down = nnx.Einsum("ebtf,efd->ebtd", (3, 64, 32), rngs=rngs)
        self.raw = nnx.Param(normal((64, 64)))

    def __call__(self, x):
        x = x + self.attention(x)
        return x + jnp.mean(self.down(nnx.relu(self.up(x))), axis=0)


def test_a_stack_of_attention_and_experts():
    """Scanned with recomputation, by nnx.scan and nnx.remat."""
    stack = fill(lambda: LayerStack(Layer, 2, rngs=nnx.Rngs(0))).layer
    report = quantize_model(stack, INT8, rules=[(["down"], QuantConfig("nf4"))])
    assert report == [
        "attention.key",
        "attention.out",
        "attention.query",
        "attention.value",
        "down",
        "up",
    ]
    assert report.left_alone == {"raw": (2, 64, 64)}
    assert stack.up.kernel.shape == (2, 3, 32, 64)
    assert stack.up.kernel[...].shape == (2, 32, 3 * 64)
    assert stack.down.kernel.shape == (2, 3, 64, 32)
    decoded = nnx.clone(stack)
    dequantize_model(decoded)

    @nnx.jit
    def run(stack, x):
        body = nnx.remat(lambda x, layer: layer(x))
        scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return nnx.grad(lambda x, stack: jnp.mean(scan(x, stack) ** 2))(x, stack)

    x = normal((2, 5, 32))
    got, want = run(stack, x), run(decoded, x)
    scale = float(jnp.abs(want).max())
    # Three products a layer, there and back, of at most 64 terms of random signs.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)


def test_of_the_same_seed_they_quantise_what_flax_draws():
    options = {"bias_init": nnx.initializers.normal()}
    ours = QuantLinearGeneral(32, (2, 8), config=INT8, rngs=nnx.Rngs(0), **options)
    theirs = nnx.LinearGeneral(32, (2, 8), rngs=nnx.Rngs(0), **options)
    want = INT8.quantize_kernel(theirs.kernel[...].reshape(32, 16))
    jax.tree.map(np.testing.assert_array_equal, ours.kernel[...], want)
    np.testing.assert_array_equal(ours.bias[...], theirs.bias[...])
    args = "btd,edf->ebtf", (3, 32, 8), (3, 8)
    ours = QuantEinsum(*args, config=INT8, rngs=nnx.Rngs(0))
    theirs = nnx.Einsum(*args, rngs=nnx.Rngs(0))
    want = INT8.quantize_kernel(jnp.moveaxis(theirs.kernel[...], 1, 0).reshape(32, 24))
    jax.tree.map(np.testing.assert_array_equal, ours.kernel[...], want)

    x = normal((3, 2, 5, 16))
    options = {
        "axis": (-1, -2),
        "batch_dims": (0,),
        "bias_init": nn.initializers.normal(),
    }
    ours = jaxbnb.linen.QuantDenseGeneral((2, 4), config=INT8, **options)
    theirs = nn.DenseGeneral((2, 4), **options)
    got = ours.init(jax.random.key(0), x)
    drawn = theirs.init(jax.random.key(0), x)["params"]
    kernel = INT8.quantize_kernel(drawn["kernel"].reshape(3, 80, 8))
    jax.tree.map(np.testing.assert_array_equal, got["quantized"]["kernel"], kernel)
    np.testing.assert_array_equal(got["params"]["bias"], drawn["bias"])
    decoded = {**drawn, "kernel": kernel.dequantize().reshape(drawn["kernel"].shape)}
    np.testing.assert_allclose(
        ours.apply(got, x), theirs.apply({"params": decoded}, x), rtol=0, atol=1e-4
    )


def test_what_is_refused():
    def quantize(layer):
        nnx.eval_shape(lambda: quantize_model(nnx.Dict(a=layer())))

    with pytest.raises(ValueError, match=r"a: 'bi,ij->b' is not a product"):
        quantize(lambda: nnx.Einsum("bi,ij->b", (64, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="a: Einsum has a einsum_op"):
        quantize(
            lambda: nnx.Einsum(
                "bi,ij->bj", (64, 3), einsum_op=lambda *a, **k: a[1], rngs=nnx.Rngs(0)
            )
        )
    for kind in (nnx.Linear, nnx.LinearGeneral):
        with pytest.raises(NotImplementedError, match="has a dot_general of its own"):
            quantize(
                lambda kind=kind: kind(
                    64, 3, dot_general=lambda *a, **k: a[0], rngs=nnx.Rngs(0)
                )
            )
    layer = QuantEinsum("td,dk->tk", (32, 16), config=INT8, rngs=nnx.Rngs(0))
    assert layer(normal((2, 5, 32)), "btd,dk->btk").shape == (2, 5, 16)
    with pytest.raises(ValueError, match=r"sums over axes \(1,\) of the kernel"):
        layer(normal((5, 16)), "tk,dk->td")
    with pytest.raises(ValueError, match=r"axes \(1,\) of an input .* must be \(32,\)"):
        layer(normal((5, 31)))
    with pytest.raises(ValueError, match=r"does not fit an input of 3 axes"):
        layer(normal((2, 5, 32)))
    with pytest.raises(ValueError, match=r"'td,dk' .*two operands|got 'td,dk'"):
        layer(normal((5, 32)), "td,dk")
    with pytest.raises(ValueError, match="a kernel with 2 axes, got"):
        QuantEinsum("td,dk->tk", (2, 32, 16), rngs=nnx.Rngs(0))


LAYERS = {
    "embed": (lambda: nnx.Embed(64, 32, rngs=nnx.Rngs(0)), ("d", None, None)),
    "linear": (lambda: nnx.Linear(32, 64, rngs=nnx.Rngs(0)), ("d", None)),
    "heads": (lambda: general(32, (2, 32)), ("d", None, None)),
    "einsum": (lambda: einsum("td,dhk->thk", (32, 2, 32), (2, 32)), ("d", None, None)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_out_sharding_on_a_mesh_of_explicit_axes(name):
    """The argument of Flax's own layers; rows of x and of the codes are divided."""
    make, spec = LAYERS[name]
    model = fill(lambda: nnx.Dict(layer=make()))
    quantize_model(model, INT8, rules=[(["layer"], INT8)])
    layer = model["layer"]
    x = jnp.arange(8).reshape(4, 2) if name == "embed" else normal((4, 32))
    want = layer(x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    weight = layer.embedding if name == "embed" else layer.kernel
    with jax.set_mesh(mesh):
        rows = jax.sharding.PartitionSpec("d")
        weight.set_value(
            jax.tree.map(lambda leaf: jax.device_put(leaf, rows), weight.get_value())
        )
        x = jax.device_put(x, rows)
        spec = jax.sharding.PartitionSpec(*spec)
        y = jax.jit(lambda x: layer(x, out_sharding=spec))(x)
    assert y.sharding.spec == spec
    # Sums of 32 products, each below 20.
    np.testing.assert_allclose(y, want, rtol=0, atol=34 * 2**-24 * 20)
