"""Functions that take a whole model take one on a mesh, too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, add_adapter, merge, unmerge
from jaxbnb.models import generate
from jaxbnb.sharding import find_mesh, shard_model, use_mesh
from jaxbnb.sharding.activations import look_up


def small(rng=nnx.Rngs):
    """Two linear layers with the names of a decoder's."""
    graphdef, state = nnx.split(
        nnx.eval_shape(
            lambda: nnx.Dict(
                up_proj=nnx.Linear(128, 256, rngs=rng(0)),
                down_proj=nnx.Linear(256, 128, rngs=rng(1)),
            )
        )
    )
    generator = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(generator.standard_normal(x.shape), x.dtype), state
    )
    return nnx.merge(graphdef, state)


def assert_equal(model, other):
    values, others = (jax.tree.leaves(nnx.state(x)) for x in (model, other))
    for a, b in zip(values, others, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_quantise_adapt_and_merge(make):
    """The bits of one device, and each device keeps its part."""
    config = QuantConfig("nf4", block_size=16, double_quant=True)
    model, other = small(), small()
    shard_model(model, make.mesh(fsdp=2, tensor=4))
    for each in (model, other):
        jaxbnb.nnx.quantize_model(each, config)
        # Its factors are drawn on one device.
        lora = LoraConfig(r=2, init_lora_weights=False)
        add_adapter(each, lora, rngs=nnx.Rngs(1))
    assert_equal(model, other)
    up = model["up_proj"]
    assert up.base.kernel[...].codes.sharding.spec == P("tensor", "fsdp")
    assert up.adapters["default"].lora_b[...].sharding.spec == P("fsdp", "tensor")
    merged = merge(model)
    assert merged.sqnr == pytest.approx(merge(other).sqnr, rel=1e-6)
    assert_equal(model, other)
    codes = model["up_proj"].kernel[...].codes
    assert codes.sharding == up.base.kernel[...].codes.sharding
    unmerge(model, merged)
    assert model["up_proj"] is up


def test_a_model_of_explicit_axes_is_on_automatic_ones(make):
    model = small()
    shard_model(model, make.mesh(AxisType.Explicit, fsdp=8))
    mesh = find_mesh(model)
    assert set(mesh.axis_types) == {AxisType.Auto}
    with use_mesh(make.mesh(AxisType.Explicit, fsdp=8)):
        assert jax.sharding.get_mesh() == mesh


def test_automatic_model_in_a_context_of_explicit_axes(make):
    """It runs there, and what changes it leaves its axes automatic."""
    mesh, tokens = make.mesh(AxisType.Explicit, data=2, fsdp=4), make.tokens(8, 3)
    model, other = (make.llama(rank=0, num_hidden_layers=1) for _ in range(2))
    shard_model(model, mesh)

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    want = jax.jit(lambda x: other(x))(tokens)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, P(("data", "fsdp")))
        logits = jax.jit(lambda x: model(x))(placed)
        assert jax.typeof(logits).sharding.spec[0] == ("data", "fsdp")
        close(logits, want)
        close(model(placed), want)
        with use_mesh(model):
            divided = jax.shard_map(
                lambda x: model(x),
                in_specs=P("data"),
                out_specs=P("data"),
                axis_names={"data"},
                check_vma=False,
            )
            close(jax.jit(divided)(tokens), want)
        lora = LoraConfig(r=2, init_lora_weights=False)
        add_adapter(model, lora, rngs=nnx.Rngs(1))
        assert find_kinds(model) == {AxisType.Auto}
        got = model(placed)
    add_adapter(other, lora, rngs=nnx.Rngs(1))
    close(got, other(tokens))


def find_kinds(model):
    meshes = (x.sharding.mesh for x in jax.tree.leaves(nnx.state(model)))
    return {kind for mesh in meshes for kind in mesh.axis_types}


def test_arrays_that_are_explicit_outside_a_context(make):
    model = make.llama(rank=0, num_hidden_layers=1)
    mesh = make.mesh(AxisType.Explicit, fsdp=8)
    with jax.set_mesh(mesh):
        shard_model(model, mesh)
    tokens = make.tokens(8, 3)
    want = generate(make.llama(rank=0, num_hidden_layers=1), tokens, 2)
    np.testing.assert_array_equal(generate(model, tokens, 2), want)
    with pytest.raises(
        ValueError, match=r"explicit axes.*within jax\.set_mesh\(mesh\)"
    ):
        model(tokens)


def test_look_up(make):
    """Rows of an embedding that two axes divide, and their gradient."""
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    tokens = make.tokens(4, 5) % 64

    def loss(embedding, tokens):
        rows = look_up(embedding, tokens)
        if rows is None:
            rows = embedding[tokens]
        return jnp.sum(jnp.sin(rows)), rows

    step = jax.value_and_grad(loss, has_aux=True)
    want = step(embedding, tokens)
    with jax.set_mesh(make.mesh(data=2, fsdp=2, tensor=2)):
        compiled = jax.jit(step).lower(embedding, tokens).compile()
        assert "reduce-scatter" in compiled.as_text()
        got = compiled(embedding, tokens)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_generate(make):
    model = make.llama(rank=0, num_hidden_layers=1)
    prompts = make.tokens(8, 3)
    want = generate(model, prompts, 3)
    shard_model(model, make.mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(generate(model, prompts, 3), want)


def test_experts(make):
    """Four devices run an expert each. Sum and gradients are those of one device."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    model = make.llama(quant=None, rank=0, hidden_size=16, intermediate_size=8, **sizes)
    layer = nnx.to_flat_state(nnx.state(model.model.layers.layer.mlp))
    graphdef = nnx.graphdef(model.model.layers.layer.mlp)
    # One layer, out of its stack.
    params = nnx.from_flat_state([(p, v.replace(v.get_value()[0])) for p, v in layer])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5, 16)), jnp.float32)

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    want = jax.jit(jax.value_and_grad(loss))(params)
    with jax.set_mesh(make.mesh(expert=4)):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        got = compiled(params)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Each device loops over its own expert, the loops of the backward pass too.
    assert re.search(r"f32\[1,16,8\]", compiled.as_text())
