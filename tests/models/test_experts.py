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


@pytest.mark.parametrize("gated_mlp", [True, False])
def test_sorted_tokens_give_the_same_sums(gated_mlp):
    experts, x = make_experts(gated_mlp=gated_mlp), tokens()
    weights, chosen = experts.gate(x)
    # Some expert has more tokens than another.
    assert len(set(np.bincount(chosen.reshape(-1), minlength=4).tolist())) > 1

    def loss(x, apply):
        return jnp.sum(jnp.sin(apply(x, weights, chosen)))

    values, gradients = zip(
        *(
            (apply(x, weights, chosen), jax.grad(loss)(x, apply))
            for apply in (experts._grouped, experts._one_by_one)
        ),
        strict=True,
    )
    # Sums of up to 256 terms, in two orders, three times in a row.
    for got, expected in (values, gradients):
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
    # Codes of x depend on the layer, and a bias on the expert.
    assert not make_experts("llm_int8")._may_group(1)
    assert not make_experts(mlp_bias=True)._may_group(1)
    with jaxbnb_kernels.config.override(mosaic_gpu="never"):
        assert not make_experts()._may_group(1)
    adapted = nnx.clone(make_experts())
    jaxbnb.lora.add_adapter(adapted, jaxbnb.lora.LoraConfig(r=2), rngs=nnx.Rngs(0))
    assert not adapted._may_group(1)


def test_on_a_gpu_each_layer_is_one_kernel():
    graph, state = nnx.split(make_experts())
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
