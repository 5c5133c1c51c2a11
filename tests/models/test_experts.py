"""Experts one by one, and sorted: the same sums, and which of the two runs where."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import jaxbnb
import jaxbnb_kernels
from jaxbnb.models import DecoderConfig
from jaxbnb.models._experts import Experts
from jaxbnb.models._layer import MLP


@functools.cache
def make_experts(quant_type="nf4", **options):
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=8,
        **options,
    )
    make_mlp = functools.partial(_make_mlp, config)
    experts = Experts(config, make_mlp, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    jaxbnb.nnx.quantize_model(experts, jaxbnb.QuantConfig(quant_type))
    return experts


def _make_mlp(config, rngs):
    return MLP(config, dtype=None, param_dtype=jnp.float32, rngs=rngs)


def tokens(count=7):
    x = np.random.default_rng(0).standard_normal((2, count, 128))
    return jnp.asarray(x, jnp.float32)


def adapt(experts, **options):
    """Gives experts adapters and biases that change what they compute."""
    adapted = nnx.clone(experts)
    config = jaxbnb.lora.LoraConfig(r=2, **options)
    jaxbnb.lora.add_adapter(adapted, config, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(adapted)):
        if path[-1] in ("lora_b", "bias"):
            values = 0.1 * random.standard_normal(variable[...].shape)
            variable.set_value(jnp.asarray(values, variable[...].dtype))
    return adapted


@pytest.mark.parametrize(
    ("options", "has_adapters"),
    [({}, False), ({"gated_mlp": False}, False), ({"mlp_bias": True}, True)],
)
def test_sorted_tokens_give_the_same_sums(options, has_adapters):
    experts, x = make_experts(**options), tokens()
    if has_adapters:
        experts = adapt(experts)
    weights, chosen = experts.gate(x)
    # Some expert has more tokens than another.
    assert len(set(np.bincount(chosen.reshape(-1), minlength=4).tolist())) > 1
    graph, adapters, rest = nnx.split(experts, nnx.LoRAParam, ...)
    assert has_adapters == bool(jax.tree.leaves(adapters))

    def apply(x, adapters, way):
        return getattr(nnx.merge(graph, adapters, rest), way)(x, weights, chosen)

    def loss(x, adapters, way):
        return jnp.sum(jnp.sin(apply(x, adapters, way)))

    values = [
        (apply(x, adapters, way), jax.grad(loss, argnums=(0, 1))(x, adapters, way))
        for way in ("_grouped", "_one_by_one")
    ]
    # Sums of up to 256 terms, in two orders, three times in a row.
    for got, expected in zip(*map(jax.tree.leaves, values), strict=True):
        atol = 3 * 256 * 2.0**-24 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_on_a_cpu_experts_run_one_by_one():
    x = tokens()
    experts = make_experts()
    assert experts._may_group(28)
    graph, state = nnx.split(experts)
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    assert "stablehlo.sort" not in lowered.as_text()
    np.testing.assert_array_equal(experts(x), experts._one_by_one(x, *experts.gate(x)))


def test_what_is_not_grouped():
    assert make_experts("int8")._may_group(64 * 4)
    assert not make_experts("int8")._may_group(64 * 4 + 1)
    # Codes of x depend on the layer.
    assert not make_experts("llm_int8")._may_group(1)
    with jaxbnb_kernels.config.override(mosaic_gpu="never"):
        assert not make_experts()._may_group(1)
    assert adapt(make_experts())._may_group(1)
    assert not adapt(make_experts(), use_dora=True)._may_group(1)
    dropping = adapt(make_experts(), lora_dropout=0.1)
    assert not dropping._may_group(1)
    dropping.eval()
    assert dropping._may_group(1)


@pytest.mark.parametrize("has_adapters", [False, True])
def test_on_a_gpu_each_layer_is_one_kernel(has_adapters):
    experts = adapt(make_experts()) if has_adapters else make_experts()
    graph, state = nnx.split(experts)
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    x = tokens().astype(jnp.bfloat16)
    with (
        jaxbnb_kernels.config.override(mosaic_gpu="always"),
        use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)),
    ):
        exported = jax.export.export(run, platforms=["cuda"])(state, x)
    # The layers that have the same shapes share one.
    text = exported.mlir_module()
    assert len(re.findall("custom_call @mosaic_gpu.*matmul_blockwise", text)) == 2
    assert "stablehlo.while" not in text
