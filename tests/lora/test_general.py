"""Adapters of layers over any axes: attention heads, and experts with a pair each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.lora import (
    LoraConfig,
    LoraLinear,
    adapter_rows,
    add_adapter,
    combine_adapters,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from jaxbnb.nnx import LayerStack, QuantEinsum, QuantLinearGeneral, quantize_model

INT8 = QuantConfig("int8", block_size=16)
SHAPES = {
    "heads": (3, 32),
    "apart": (3, 2, 5, 16),
    "experts": (3, 2, 5, 16),
    "einsum": (3, 5, 16),
    "mixture": (2, 3, 5, 16),
    "transposed": (2, 5, 2, 16),
}


def normal(shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x)


def fill(make):
    """A module without its initializers, which take longer to compile than all else."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(lambda x: normal(x.shape, x.size) / 4, state)
    return nnx.merge(graphdef, state)


def layers():
    rngs = nnx.Rngs(0)
    general, einsum = nnx.LinearGeneral, nnx.Einsum
    return nnx.Dict(
        heads=general(32, (2, 8), rngs=rngs),
        apart=general((2, 16), (3, 4), axis=(1, -1), rngs=rngs),
        experts=general(16, (2, 8), batch_axis={0: 3}, rngs=rngs),
        einsum=einsum("...td,hdk->...htk", (2, 16, 8), (2, 1, 8), rngs=rngs),
        mixture=einsum("gecd,edf->gecf", (3, 16, 8), (3, 1, 8), rngs=rngs),
        transposed=einsum("bthk,dhk->bdt", (6, 2, 16), None, rngs=rngs),
    )


@nnx.jit
def outputs(model):
    return {name: model[name](normal(shape, 1)) for name, shape in SHAPES.items()}


def assert_close(got, want):
    # Sums of at most 2 * 32 products, none above 16, and of 4 of those.
    for name in SHAPES:
        np.testing.assert_allclose(
            got[name], want[name], rtol=0, atol=68 * 16 * 2**-24, err_msg=name
        )


@pytest.fixture(scope="module")
def plain():
    model = fill(layers)
    return model, outputs(model)


def matrices(kernel, name):
    """By hand, the kernel as the adapter sees it."""
    if name == "einsum":
        return kernel.transpose(1, 0, 2).reshape(16, 16)
    if name == "transposed":
        return kernel.transpose(1, 2, 0).reshape(32, 6)
    if name in ("experts", "mixture"):
        return kernel.reshape(3, 16, -1)
    return kernel.reshape(32, -1)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_it_is_the_layer_with_the_sum_for_its_kernel(plain, use_dora):
    model = nnx.clone(plain[0])
    config = LoraConfig(r=2, init_lora_weights=False, use_dora=use_dora)
    assert add_adapter(model, config, rngs=nnx.Rngs(1)) == sorted(SHAPES)
    if use_dora:
        for name in SHAPES:
            magnitude = model[name].adapters["default"].magnitude
            magnitude[...] = magnitude * (1.5 + normal(magnitude.shape) / 4)
    want = outputs(model)
    for name in SHAPES:
        # Not nothing: without DoRA too, a tenth of the result.
        changed = np.abs(want[name] - plain[1][name]).max()
        assert changed > np.abs(plain[1][name]).max() / 50
    if not use_dora:
        for name in SHAPES:
            layer = model[name]
            adapter, kernel = layer.adapters["default"], layer.kernel[...]
            product = 4 * adapter.lora_a[...] @ adapter.lora_b[...]
            change = adapter.change(matrices(kernel, name))
            np.testing.assert_allclose(change, product, rtol=1e-5, atol=1e-6)
    originals = merge(model)
    assert set(originals.sqnr.values()) == {np.inf}
    assert nnx.graphdef(model) == nnx.graphdef(plain[0])
    assert_close(outputs(model), want)
    unmerge(model, originals)
    assert isinstance(model["mixture"], LoraLinear)
    np.testing.assert_array_equal(outputs(model)["mixture"], want["mixture"])


def test_what_is_taken_out_of_the_weight_is_in_the_adapter(plain):
    model = nnx.clone(plain[0])
    add_adapter(model, LoraConfig(r=3, init_lora_weights="pissa"), rngs=nnx.Rngs(1))
    assert_close(outputs(model), plain[1])


def test_saved_and_loaded(plain, tmp_path):
    """Over a quantised base, that "loftq" fitted; the files have PEFT's matrices."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model, again = nnx.clone(plain[0]), nnx.clone(plain[0])
    config = LoraConfig(r=2, init_lora_weights="loftq")
    add_adapter(model, config, quant=INT8, rngs=nnx.Rngs(1))
    assert type(model["experts"].base) is QuantLinearGeneral
    assert type(model["mixture"].base) is QuantEinsum
    save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    shapes = {
        name: [tensors[f"base_model.model.{name}.lora_{x}.weight"].shape for x in "AB"]
        for name in ("einsum", "transposed", "mixture")
    }
    assert shapes == {
        "einsum": [(2, 16), (16, 2)],
        "transposed": [(2, 32), (6, 2)],
        "mixture": [(3, 2, 16), (3, 8, 2)],
    }
    load_adapter(again, tmp_path, quant=INT8)
    got, want = outputs(again), outputs(model)
    for name in SHAPES:
        np.testing.assert_array_equal(got[name], want[name])
    # The int8 base decoded, and the sum kept in float32.
    assert_close(outputs(merged_exactly(model)), want)


def merged_exactly(model):
    for name in SHAPES:
        base = model[name].base
        is_einsum = isinstance(base, QuantEinsum)
        model[name].base = base.to_einsum() if is_einsum else base.to_linear_general()
    merge(model)
    return model


class Block(nnx.Module):
    def __init__(self, rngs):
        self.heads = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.up = nnx.Einsum("bthd,edf->bethf", (3, 8, 4), rngs=rngs)
        self.down = nnx.Einsum("bethf,efd->bethd", (3, 4, 8), rngs=rngs)

    def __call__(self, x):
        # Not so large that what adapters do to it is lost beside it.
        y = jnp.tanh(self.heads(x))
        return x + jnp.sum(self.down(self.up(y)), 1).reshape(x.shape)


def test_a_stack_of_heads_and_experts():
    """Trained by name, a row of the batch through each adapter, and combined."""
    stack = fill(lambda: LayerStack(Block, 2, rngs=nnx.Rngs(0)))
    quantize_model(stack, INT8)
    # By the number of a layer too, the second.
    paths = ["layer.heads", "layer.up", "1.down"]
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=paths)
    for seed, name in enumerate(("one", "two")):
        add_adapter(stack, config, name=name, rngs=nnx.Rngs(seed + 1))
    # Experts that see every token are outputs more; those that see their own, a batch.
    assert stack.layer.up.adapters["one"].lora_b.shape == (2, 2, 12)
    down = stack.layer.down.adapters["one"]
    assert (down.lora_a.shape, down.lora_b.shape) == ((2, 3, 4, 2), (2, 3, 2, 8))
    assert not np.any(down.lora_a[0])
    assert np.all(np.any(down.lora_a[1], axis=(-1, -2)))

    x = normal((2, 5, 16))
    apply = lambda layer, x, i: layer(x)  # noqa: E731

    def loss(stack):
        y = stack(apply, x)
        return jnp.sum(y**2), y

    train = nnx.DiffState(0, nnx.LoRAParam)
    run = nnx.jit(nnx.grad(loss, argnums=train, has_aux=True))
    gradients, alone = run(stack)
    for path, gradient in nnx.to_flat_state(gradients):
        # Only the active adapter has a gradient.
        assert np.any(gradient[...]) == ("one" in path), path
    each = {}
    for index in ([0, 0], [1, 1], [1, 0], [-1, 0]):
        with adapter_rows(stack, ["one", "two"], jnp.array(index)):
            each[tuple(index)] = nnx.jit(lambda stack: stack(apply, x))(stack)
    # Sums of 16 products and of 3 experts, none above 16, in two layers.
    atol = 2 * 48 * 16 * 2**-24
    np.testing.assert_allclose(each[0, 0], alone, rtol=0, atol=atol)
    np.testing.assert_array_equal(each[1, 0][0], each[1, 1][0])
    np.testing.assert_array_equal(each[1, 0][1], each[0, 0][1])
    differ = [each[1, 1][0] - alone[0], each[-1, 0][0] - alone[0]]
    assert all(np.abs(difference).max() > 0.1 for difference in differ)

    combine_adapters(stack, ["one", "two"], [2.0, -1.0], name="both")
    down = stack.layer.down.adapters
    weight = jnp.zeros((2, 3, 4, 8))
    one, two, both = (down[name].change(weight) for name in ("one", "two", "both"))
    np.testing.assert_allclose(both, 2 * one - two, rtol=0, atol=2**-20)


def test_bad_input():
    model = nnx.Dict(
        mixture=nnx.Einsum("ecd,edf->ecf", (3, 16, 8), rngs=nnx.Rngs(0)),
        sums=nnx.Einsum("td,kd->t", (3, 16), rngs=nnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match="sums: 'td,kd->t' is not a product"):
        add_adapter(model, LoraConfig(), rngs=nnx.Rngs(0))
    add_adapter(model, LoraConfig(r=2, target_modules=["mixture"]), rngs=nnx.Rngs(0))
    with (
        adapter_rows(model, ["default"], jnp.array([0, 0, -1])),
        pytest.raises(ValueError, match=r"first axis must be .* an axis of experts"),
    ):
        model["mixture"](jnp.ones((3, 4, 16)))
    with pytest.raises(ValueError, match="make it for this product"):
        model["mixture"](jnp.ones((3, 4, 8)), "ecf,edf->ecd")
    with pytest.raises(NotImplementedError, match="does not take an out_sharding"):
        model["mixture"](jnp.ones((3, 4, 16)), out_sharding=("a",))
