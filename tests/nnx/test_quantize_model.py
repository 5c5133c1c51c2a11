"""quantize_model: which layers, where they are, and what stays."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.nnx import (
    LayerStack,
    QuantEinsum,
    QuantEmbed,
    QuantLinear,
    QuantParam,
    dequantize_model,
    outlier_columns,
    quantize_model,
    summary,
)


def linear(fan_in=64, fan_out=64):
    return nnx.Linear(fan_in, fan_out, rngs=nnx.Rngs(0))


def fill(make, seed=0):
    """A module without its initializers, which take longest to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    generator = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(generator.standard_normal(x.shape) / 8, x.dtype), state
    )
    return nnx.merge(graphdef, state)


class Block(nnx.Module):
    def __init__(self):
        self.up = linear()
        self.down = linear()

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
    """Linear layers in every kind of place, and layers of other kinds."""

    def __init__(self):
        norm = nnx.LayerNorm(64, rngs=nnx.Rngs(0))
        self.embed = nnx.Embed(32, 64, rngs=nnx.Rngs(0))
        self.first = linear()
        self.blocks = nnx.List([Block(), Block()])
        self.experts = nnx.Dict(a=linear(), b=nnx.List([linear()]))
        self.tail = nnx.Sequential(linear(), nnx.relu, norm)
        self.lm_head = linear(64, 32)

    def __call__(self, tokens):
        x = self.first(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.experts["a"](x) + self.experts["b"][0](x)
        return self.lm_head(self.tail(x))


EVERY_LINEAR = [
    "first",
    "blocks.0.up",
    "blocks.0.down",
    "blocks.1.up",
    "blocks.1.down",
    "experts.a",
    "experts.b.0",
    "tail.layers.0",
    "lm_head",
]


def get(model, path):
    for part in path.split("."):
        if isinstance(model, nnx.List):
            model = model[int(part)]
        elif isinstance(model, nnx.Dict):
            model = model[part]
        else:
            model = getattr(model, part)
    return model


def test_everywhere_but_the_head():
    model, before = fill(Model), fill(Model)
    config = QuantConfig("int8")
    paths = quantize_model(model, config)
    assert sorted(paths) == sorted(set(EVERY_LINEAR) - {"lm_head"})
    for path in paths:
        layer, original = get(model, path), get(before, path)
        assert type(layer) is QuantLinear
        assert layer.config == config
        want = config.quantize_kernel(original.kernel[...])
        jax.tree.map(np.testing.assert_array_equal, layer.kernel[...], want)
        np.testing.assert_array_equal(layer.bias[...], original.bias[...])
    # All else is as it was.
    assert type(model.lm_head) is nnx.Linear
    assert type(model.tail.layers[2]) is nnx.LayerNorm
    for name in ("embed", "lm_head"):
        a, b = (nnx.state(getattr(m, name)) for m in (model, before))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len(nnx.to_flat_state(nnx.state(model, QuantParam))) == len(paths)
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert [path for path, _ in params if path[-1] == "kernel"] == [
        ("lm_head", "kernel")
    ]


def test_the_model_computes_with_the_decoded_kernels():
    model, decoded = fill(Model), fill(Model)
    tokens = jnp.arange(6).reshape(2, 3)
    for path in quantize_model(model, QuantConfig("int8")):
        kernel = get(model, path).kernel[...].dequantize()
        get(decoded, path).kernel = nnx.Param(kernel)
    run = nnx.jit(lambda model, tokens: model(tokens))
    got, want = run(model, tokens), run(decoded, tokens)
    # Eight products of 64 terms, of random signs.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - run(fill(Model), tokens)).max() > 1e-3


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (["lm_head"], ["lm_head"]),
        (["down", "experts.a"], ["blocks.0.down", "blocks.1.down", "experts.a"]),
        (["blocks.1.up", "head"], ["blocks.1.up"]),
        (["0"], ["experts.b.0", "tail.layers.0"]),
        (r"blocks\.\d\.(up|down)|lm_head", [*EVERY_LINEAR[1:5], "lm_head"]),
        (r"blocks", []),
        ("lm_head", ["lm_head"]),
    ],
    ids=str,
)
def test_skip(skip, left):
    """Names are whole paths or their last parts; one string is a whole path's regex."""
    paths = []
    nnx.eval_shape(lambda: paths.extend(quantize_model(Model(), skip=skip)))
    assert sorted(paths) == sorted(set(EVERY_LINEAR) - set(left))


def test_nothing_to_quantise():
    with pytest.raises(ValueError, match=r"in Block: its linear layers are \['down',"):
        quantize_model(fill(Block), skip=["up", "down"])
    only_head = fill(lambda: nnx.Dict(lm_head=linear()))
    with pytest.raises(
        ValueError, match=r"are \['lm_head'\], and skip is \('lm_head',"
    ):
        quantize_model(only_head)
    with pytest.raises(ValueError, match=r"its linear layers are \[\]"):
        quantize_model(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))


def test_only_nnx_linear_itself():
    """A subclass may compute something else, so it is not replaced."""

    class Scaled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    def make():
        return nnx.Dict(
            scaled=Scaled(64, 64, rngs=nnx.Rngs(0)),
            conv=nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)),
            linear=linear(),
        )

    model = fill(make)
    assert quantize_model(model) == ["linear"]
    assert type(model["scaled"]) is Scaled


def test_a_shared_layer_stays_shared():
    shared, block = fill(linear), fill(Block)
    model = nnx.Dict(
        a=nnx.Dict(x=shared), b=nnx.Dict(x=shared, y=shared), c=block, d=block
    )
    paths = quantize_model(model)
    assert type(model["a"]["x"]) is QuantLinear
    assert model["b"]["x"] is model["b"]["y"] is model["a"]["x"]
    assert model["c"] is model["d"]
    assert type(model["d"].up) is QuantLinear
    assert {"a.x", "c.up", "c.down"} <= set(paths)
    # One of each is held.
    assert len(nnx.to_flat_state(nnx.state(model, QuantParam))) == 3


def test_a_stack():
    stack = fill(lambda: LayerStack(lambda _: Block(), 3, rngs=nnx.Rngs(0)))
    kernel = stack.layer.up.kernel[...]
    assert quantize_model(stack) == ["layer.down", "layer.up"]
    assert stack.layer.up.kernel.shape == (3, 64, 64)
    want = QuantConfig().quantize_kernel(kernel[1])
    got = stack.layer.up.kernel[...][1]
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_while_abstract():
    """Before there are weights, as a checkpoint is loaded into."""
    config = QuantConfig(double_quant=True)

    def make():
        block = Block()
        quantize_model(block, config)
        return block

    abstract, model = nnx.eval_shape(make), fill(Block)
    quantize_model(model, config)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    assert abstract.up.kernel.get_value().codes.dtype == jnp.uint8


def test_biases_are_trained_on():
    model = fill(Block)
    quantize_model(model)
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(jnp.ones((3, 64))) ** 2)))(model)
    assert [path for path, _ in nnx.to_flat_state(grads)] == [
        ("down", "bias"),
        ("up", "bias"),
    ]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


INT8, FP4 = QuantConfig("int8"), QuantConfig("fp4", block_size=32)


def test_the_first_rule_that_names_a_layer_decides():
    model = fill(Model)
    rules = [
        (["blocks.0.up", "embed"], INT8),
        (r"blocks\..*", FP4),
        (["tail.layers.0"], None),
        (["lm_head"], INT8),
    ]
    before = model.embed.embedding[...]
    paths = quantize_model(model, rules=rules)
    assert model.blocks[0].up.kernel.quant_type == "int8"
    for layer in (model.blocks[0].down, model.blocks[1].up, model.blocks[1].down):
        assert (layer.kernel.quant_type, layer.kernel.block_size) == ("fp4", 32)
    assert model.first.kernel.quant_type == "nf4"
    assert type(model.tail.layers[0]) is nnx.Linear
    # Rules go before skip.
    assert model.lm_head.kernel.quant_type == "int8"
    assert type(model.embed) is QuantEmbed
    want = INT8.quantize_embedding(before)
    jax.tree.map(np.testing.assert_array_equal, model.embed.embedding[...], want)
    assert {"embed", "lm_head", "first"} <= set(paths)
    assert "tail.layers.0" not in paths
    assert np.all(np.isfinite(model(jnp.arange(4)[None])))


def test_a_rule_that_decides_over_nothing():
    with pytest.raises(ValueError, match=r"no layer of Block: .*'middle'.*\['down'"):
        nnx.eval_shape(lambda: quantize_model(Block(), rules=[(["middle"], INT8)]))
    # The second of two that name the same layers.
    rules = [(["up"], INT8), (["up"], FP4)]
    with pytest.raises(ValueError, match=r"no layer of Block: .*fp4"):
        nnx.eval_shape(lambda: quantize_model(Block(), rules=rules))


@pytest.mark.parametrize("rules", [{"up": "int8"}, {}, ("up", "int8"), [("up",)]])
def test_rules_in_another_form(rules):
    with pytest.raises(
        TypeError, match=r"^rules are \(layers, config\) pairs in a list"
    ):
        nnx.eval_shape(lambda: quantize_model(Block(), rules=rules))


def test_rules_that_skip_everything():
    with pytest.raises(ValueError, match="nothing to quantise in Block"):
        quantize_model(fill(Block), rules=[(".*", None)])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dequantised_it_has_the_decoded_weights(dtype):
    model = fill(Model)
    rules = [(["embed"], INT8)]
    paths = quantize_model(model, rules=rules)
    kernel, rows = model.first.kernel[...], model.embed.embedding[...]
    bias = model.first.bias[...]
    assert dequantize_model(model, dtype) == paths
    assert type(model.first) is nnx.Linear
    assert type(model.embed) is nnx.Embed
    np.testing.assert_array_equal(model.first.kernel[...], kernel.dequantize(dtype))
    np.testing.assert_array_equal(model.embed.embedding[...], rows.dequantize(dtype))
    np.testing.assert_array_equal(model.first.bias[...], bias)
    if dtype is None:
        fresh = fill(Model)
        got, want = nnx.state(model), nnx.state(fresh)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert np.all(np.isfinite(model(jnp.arange(4)[None])))


def test_a_stack_is_dequantised():
    stack = fill(lambda: LayerStack(lambda _: Block(), 3, rngs=nnx.Rngs(0)))
    quantize_model(stack)
    kernel = stack.layer.up.kernel[...]
    assert dequantize_model(stack) == ["layer.down", "layer.up"]
    np.testing.assert_array_equal(stack.layer.up.kernel[...], kernel.dequantize())


def test_nothing_to_dequantise():
    with pytest.raises(ValueError, match="Block has no quantised layers"):
        nnx.eval_shape(lambda: dequantize_model(Block()))


class Mixture(nnx.Module):
    """Experts that are not layers, read in every way that a model may read them."""

    def __init__(self):
        self.up = nnx.Param(jnp.zeros((3, 32, 16)))
        self.gate = nnx.Param(jnp.zeros((3, 32, 16)))
        self.down = nnx.Param(jnp.zeros((3, 16, 32)))
        self.offset = nnx.data(jnp.ones((64, 64)))
        self.route = linear(32, 3)

    def __call__(self, x):
        y = jnp.einsum("td,edf->etf", x, self.up)
        y = jnp.tanh(y * (x @ self.gate[...]))
        y = jax.vmap(lambda y, w: y @ w)(y, self.down)
        return x + jnp.einsum("te,etd->td", self.route(x), y) + self.offset[0, 0]


def test_a_parameter_that_no_layer_holds():
    """A rule names it; it is stacked, compiled and differentiated as before."""
    stack = fill(lambda: LayerStack(lambda rngs: Mixture(), 2, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(stack)
    int8, nf4 = QuantConfig("int8", 16), QuantConfig("nf4", 16)
    with pytest.raises(ValueError, match=r"layer.up is an nnx.Param, .*int8"):
        quantize_model(stack, rules=[(["up"], QuantConfig("llm_int8"))])
    with pytest.raises(
        ValueError, match=r"over no layer of \w+: \[\(.*, 'nf4'\)\]; its"
    ):
        quantize_model(stack, rules=[(r".*up", nf4)])
    assert nnx.graphdef(stack) == graphdef
    report = quantize_model(
        stack, int8, rules=[(["layer.up"], nf4), (["gate", "down"], int8)], skip=()
    )
    assert report == ["layer.down", "layer.gate", "layer.route", "layer.up"]
    # Arrays outside variables are reported too.
    assert report.left_alone == {"layer.offset": (2, 64, 64)}
    up = stack.layer.up
    assert (isinstance(up, QuantParam), up.shape) == (True, (2, 3, 32, 16))
    assert up.get_raw_value().quant_type == "nf4"
    assert re.search(r"layer\.up +\(2, 3, 32, 16\) +nf4 ", summary(stack))
    assert "TypeError" not in repr(stack)
    decoded = nnx.clone(stack)
    assert set(dequantize_model(decoded)) == set(report)
    assert nnx.graphdef(decoded) == graphdef
    np.testing.assert_array_equal(decoded.layer.up[...], up[...])

    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 32)), jnp.float32)

    @nnx.jit
    @nnx.grad(argnums=(0, 1))
    def gradients(stack, x):
        return jnp.sum(stack(lambda layer, x, i: layer(x), x) ** 2)

    (got, dx), (want, dwant) = gradients(stack, x), gradients(decoded, x)
    # Sums of 32 products, of numbers that are below 200 in all.
    np.testing.assert_allclose(dx, dwant, rtol=0, atol=34 * 2**-24 * 200)
    paths = {path for path, _ in nnx.to_flat_state(got)}
    assert ("layer", "up") in {path for path, _ in nnx.to_flat_state(want)} - paths


def test_quantised_already():
    model = nnx.eval_shape(lambda: nnx.Dict(up=linear(), lm_head=linear(64, 32)))
    quantize_model(model, "int8")
    with pytest.raises(ValueError, match=r"Dict is quantised already: {'int8': \['up"):
        quantize_model(model, "nf4")
    with pytest.raises(ValueError, match=r"no layer of Dict.*already are {'int8'"):
        quantize_model(model, rules=[(["up"], "nf4")])
    # What is not is quantised all the same.
    assert quantize_model(model, "nf4", skip=[]) == ["lm_head"]


def test_a_layer_that_is_the_model():
    """No model holds it, so nothing can be put in its place."""
    with pytest.raises(ValueError, match=r"jaxbnb\.nnx\.QuantLinear\.from_linear"):
        quantize_model(linear())
    layer = QuantEinsum("bi,io->bo", (64, 4), config="int8", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="QuantEinsum is quantised already"):
        quantize_model(layer)


@pytest.mark.parametrize(
    ("function", "twin"),
    [
        (quantize_model, "quantize_params"),
        (dequantize_model, "dequantize_params"),
        (lambda model: outlier_columns(model, 0), "outlier_columns"),
    ],
)
def test_what_is_no_model_of_nnx(function, twin):
    for given in (nn.Dense(64), {"params": {}}, nnx.state(linear())):
        with pytest.raises(TypeError, match=rf"jaxbnb\.linen\.{twin}\("):
            function(given)
    with pytest.raises(TypeError, match="summary takes an NNX model"):
        summary(nn.Dense(64))
    with pytest.raises(TypeError, match=r"lora takes an NNX model; got the Linen"):
        add_adapter(nn.Dense(64), LoraConfig(), rngs=nnx.Rngs(0))
