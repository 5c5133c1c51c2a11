"""A whole program: a QLoRA step of Llama 3 8B, compiled for a Hopper GPU.

Its weights are only shapes. XLA's memory analysis says what the step would need.
"""

import math
import re

import hopper_compiler
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.models import Llama, LlamaConfig
from jaxbnb_kernels import config

LAYERS, HIDDEN, MLP, VOCABULARY = 32, 4096, 14336, 128256
TOKENS = (1, 2048)


def make_model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=5e5,
    )
    model = Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig("nf4", double_quant=True))
    adapters = jaxbnb.lora.LoraConfig(r=16, target_modules="all-linear")
    jaxbnb.lora.add_adapter(model, adapters, rngs=nnx.Rngs(1))
    return model


with_and_without_kernels = pytest.mark.parametrize(
    "setting", ["never", "always"], ids=["xla", "mosaic_gpu"]
)


def compiled_step(mesh, tokens, **options):
    """Returns ``(compiled, trainable, frozen)``."""
    model = nnx.eval_shape(make_model)
    graphdef, trainable, frozen = jaxbnb.finetune.split_trainable(model)
    tx = jaxbnb.adamw8bit(1e-4)
    with jax.numpy_dtype_promotion("standard"):
        compiled, _ = hopper_compiler.compile_for(
            mesh,
            jaxbnb.finetune.train_step(graphdef, tx),
            trainable,
            jax.eval_shape(tx.init, trainable),
            frozen,
            jax.ShapeDtypeStruct(tokens, jnp.int32),
            donate_argnums=(0, 1),
            **options,
        )
    return compiled, trainable, frozen


@pytest.mark.matrix
@with_and_without_kernels
def test_a_qlora_step_keeps_no_decoded_matrix(setting, monkeypatch, capsys):
    monkeypatch.setattr(config, "mosaic_gpu", setting)
    mesh = hopper_compiler.mesh()
    # Nothing is computed on the devices of a mesh that are only compiled for.
    with jax.set_mesh(mesh):
        compiled, trainable, frozen = compiled_step(mesh, TOKENS)
    text = compiled.as_text()
    assert ('custom_call_target="mosaic_gpu' in text) == (setting == "always")
    # The smallest decoded stack would be all layers' keys, in 16 bits.
    smallest = 2 * LAYERS * HIDDEN * 1024
    decoded = LAYERS * HIDDEN * 1024, LAYERS * HIDDEN**2, LAYERS * HIDDEN * MLP
    for shape in set(re.findall(r"\b(?:bf16|f16|f32)\[([\d,]+)\]", text)):
        size = math.prod(map(int, shape.split(",")))
        is_activation = f"{TOKENS[1]}" in shape.split(",")
        assert is_activation or size not in decoded, shape
    peak = jaxbnb.finetune.peak_bytes(compiled)
    held = jaxbnb.core.tree_nbytes(frozen)
    with capsys.disabled():
        print(
            f"\nQLoRA step of Llama 3 8B, {TOKENS[1]} tokens: {peak / 2**30:.2f} GiB, "
            f"of which {held / 2**30:.2f} GiB are weights"
        )
    # The bound adds adapters, their gradients and state; the layers' inputs in 16 bits;
    # and for one layer at a time, attention's float32 scores a few times over.
    adapters = jaxbnb.core.tree_nbytes(trainable)
    inputs = 2 * LAYERS * math.prod(TOKENS) * HIDDEN
    scores = 4 * 32 * TOKENS[1] ** 2
    assert peak < held + 3 * adapters + inputs + 4 * scores
    assert peak - held > smallest


@pytest.mark.matrix
@with_and_without_kernels
def test_a_qlora_step_of_two_gpus(setting, monkeypatch, capsys):
    """Each takes an example. They send only gradients, to sum them."""
    monkeypatch.setattr(config, "mosaic_gpu", setting)
    mesh = hopper_compiler.mesh(num_devices=2)
    whole, of_rows = (NamedSharding(mesh, spec) for spec in (P(), P("device")))
    shardings = whole, whole, whole, of_rows
    compiled, _, frozen = compiled_step(mesh, (2, TOKENS[1]), in_shardings=shardings)
    text = compiled.as_text()
    assert ('custom_call_target="mosaic_gpu' in text) == (setting == "always")
    collectives = r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    assert set(re.findall(collectives, text)) == {"all-reduce"}
    peak = jaxbnb.finetune.peak_bytes(compiled)
    with capsys.disabled():
        print(f"\nThe same on each of two GPUs: {peak / 2**30:.2f} GiB")
    # As in one GPU's step, one example's activations come on top of the weights.
    assert peak - jaxbnb.core.tree_nbytes(frozen) < 3 * 2**30
