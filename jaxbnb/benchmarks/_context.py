"""Long texts: the time of a step against dense attention, and memory.

On a GPU, the memory is that of a QLoRA step of Llama 3 8B, as XLA compiles it for GPUs
that need not be there.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies

import jaxbnb
from jaxbnb.benchmarks._context_peak import measure_peaks
from jaxbnb.benchmarks._data import SMOLLM2
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.finetune import next_token_loss, split_trainable, train_step
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import CausalLM, DecoderConfig, attention
from jaxbnb.nnx import Remat, quantize_model

# Two of SmolLM2-135M's 30 layers, without its vocabulary.
SMOL = dataclasses.replace(SMOLLM2, vocab_size=1024, num_hidden_layers=2)
LLAMA_3_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=2**17,
)
# Most that a step may need on an H100, in GiB; a card of 24 GB has 22.35.
LIMITS = {8192: 9.5, 16_384: 12.0, 65_536: 22.35}
SETTINGS = {
    8192: {"every layer": True},
    16_384: {"every layer": True, "every 4 layers": Remat(every=4)},
    65_536: {"inputs on the host": Remat(offload=True)},
}
# Public figures of the data sheets. Only these affect compilation.
GPUS = {
    "T4": ("7 minor: 5", 40, 15, 320, 4, 65_536, 1024, 64, 1.59, "Tesla T4"),
    "RTX 4090": (
        *("8 minor: 9", 128, 24, 1008, 72, 102_400, 1536, 128, 2.52),
        "NVIDIA GeForce RTX 4090",
    ),
    "H100": (
        *("9 minor: 0", 132, 80, 3350, 50, 233_472, 2048, 128, 1.98),
        "NVIDIA H100 80GB HBM3",
    ),
}


def bench_context() -> Iterator[Figure]:
    """Times steps of long texts, measures memory, and compiles a step for each GPU."""
    yield from _measure_steps()
    yield from measure_peaks()
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise NotImplementedError(
            "the memory on GPUs needs JAX's CUDA plugin, to compile with: put "
            "jax-cuda13-plugin and jax-cuda13-pjrt in a folder and name it in "
            "PYTHONPATH"
        )
    for gpu in GPUS:
        for seq, settings in SETTINGS.items():
            for name, remat in settings.items():
                yield _compile_step(gpu, seq, name, remat)


def _measure_steps() -> Iterator[Figure]:
    # All nine heads of 8,192 tokens would take dense attention 10 GiB. With a third of
    # them, all else is as much, so blocks gain less.
    third = dataclasses.replace(SMOL, num_attention_heads=3, num_key_value_heads=1)
    cases = ((2048, SMOL, 1.0), (4096, SMOL, 0.5), (8192, third, 0.5))
    for seq, config, limit in cases:
        calls = {
            "blocks": _make_step(config, seq, attention.DENSE_SCORES),
            "dense": _make_step(config, seq, seq**2),
        }
        times = time_together(calls, rounds=2)
        heads = f", {config.num_attention_heads} of 9 heads" if config is third else ""
        yield Figure(
            f"step of 2 SmolLM2 layers, {seq:,} tokens{heads}",
            ratio(times["blocks"], times["dense"]),
            "x dense attention's time",
            limit,
            f"{milliseconds(times['blocks'])} and {milliseconds(times['dense'])}",
        )


def _make_step(
    config: DecoderConfig, seq: int, dense_scores: int
) -> Callable[[], tuple[Any, Any]]:
    graphdef, params = nnx.split(CausalLM(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.arange(seq)[None] % config.vocab_size, jnp.int32)

    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params), tokens, remat=True)

    with _dense_up_to(dense_scores):
        step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return lambda: step(params)


@contextlib.contextmanager
def _dense_up_to(scores: int) -> Iterator[None]:
    before = attention.DENSE_SCORES
    attention.DENSE_SCORES = scores
    try:
        yield
    finally:
        attention.DENSE_SCORES = before


def _compile_step(gpu: str, seq: int, name: str, remat: bool | Remat) -> Figure:
    memory: Any = compile_step(LLAMA_3_8B, seq, remat, gpu).memory_analysis()
    device = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    host = memory.host_temp_size_in_bytes
    limit = LIMITS[seq] if gpu == "H100" and name != "every 4 layers" else None
    title = f"{gpu}, {seq:,} tokens, kept: {name}"
    detail = f"{host / 2**30:.2f} GiB on the host" if host else ""
    return Figure(title, device / 2**30, "GiB", limit, detail)


def compile_step(
    config: DecoderConfig, seq: int, remat: bool | Remat, gpu: str
) -> jax.stages.Compiled:
    """Compiles a QLoRA step of one row for a GPU.

    NF4 with double quantisation, adapters of rank 16 on every linear layer, 8-bit
    AdamW; the embedding and the head are in 16 bits.
    """
    dtype = jnp.float16 if gpu == "T4" else jnp.bfloat16

    def make() -> CausalLM:
        model = CausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        quant = jaxbnb.QuantConfig("nf4", double_quant=True, compute_dtype=dtype)
        quantize_model(model, quant)
        add_adapter(model, LoraConfig(r=16), rngs=nnx.Rngs(1))
        return model

    graphdef, trainable, frozen = split_trainable(nnx.eval_shape(make))
    tx: optax.GradientTransformation = jaxbnb.adamw8bit(1e-4)
    step = train_step(graphdef, tx, remat=remat)
    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    args = trainable, jax.eval_shape(tx.init, trainable), frozen, tokens
    sharding = jax.sharding.SingleDeviceSharding(_absent_device(gpu))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(*placed).compile()


def _absent_device(gpu: str) -> Any:
    capability, cores, gib, bandwidth, cache, shared, threads, units, clock, name = (
        GPUS[gpu]
    )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    config = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024 * (shared > 65_536)}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth * 10**9} l2_cache_size: {cache << 20}
  clock_rate_ghz: {clock} device_memory_size: {gib << 30}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{name}"
"""
    shape = "1x1x1"
    topology = topologies.get_topology_desc(
        shape, platform="cuda", topology=shape, target_config=config
    )
    return topology.devices[0]
