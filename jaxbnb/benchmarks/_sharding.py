"""What eight GPUs send to each other: programs of Llama 3 8B, compiled without them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.benchmarks._context import LLAMA_3_8B
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.core import QuantizedArray
from jaxbnb.models import CausalLM
from jaxbnb.nnx import quantize_model
from jaxbnb.planning import collective_bytes, find_gpu, plan
from jaxbnb.planning.gpus import absent_devices, has_compiler
from jaxbnb.sharding import partition_specs, use_mesh

GPU, DEVICES, ROWS, SEQ = "h100", 8, 8, 2048
# Most bytes that a device may get for each quantised weight of a forward pass: codes
# and doubly quantised absmax take 0.516 of them.
FORWARD_LIMIT = 0.57
# Most GiB that it may get in a QLoRA step: codes for two passes are 6.7 of them.
STEP_LIMIT = 11.0


def bench_sharding() -> Iterator[Figure]:
    """Counts bytes of collectives on eight H100s, divided as "fsdp"."""
    if not has_compiler():
        raise NotImplementedError(
            "programs for GPUs need JAX's CUDA plugin, to compile with: put "
            "jax-cuda13-plugin and jax-cuda13-pjrt in a folder and name it in "
            "PYTHONPATH"
        )
    tokens = f"{ROWS} x {SEQ:,} tokens"
    compiled, count = compile_forward()
    found = collective_bytes(compiled)
    name = f"forward pass, {tokens}"
    value = sum(found.values()) / count
    yield Figure(name, value, "bytes a weight", FORWARD_LIMIT, _describe(found))
    full: dict[str, Any] = {"quant": None, "rank": None}
    for kind, trained, limit in (("QLoRA", {}, STEP_LIMIT), ("full", full, None)):
        made = plan(
            *(LLAMA_3_8B, GPU),
            devices=DEVICES,
            double_quant=True,
            optimizer="adamw8bit",
            batch=ROWS,
            seq=SEQ,
            compile=True,
            **trained,
        )
        assert made.collectives is not None
        sent = sum(made.collectives.values()) / 2**30
        name = f"{kind} step of adamw8bit, {tokens}"
        yield Figure(name, sent, "GiB", limit, _describe(made.collectives))
        name = f"{kind} step: memory of a device"
        yield Figure(name, made.peak_bytes / 2**30, "GiB")


def compile_forward() -> tuple[jax.stages.Compiled, int]:
    """Compiles a forward pass of Llama 3 8B in NF4, doubly quantised, and bfloat16.

    Returns:
        The program, and the number of quantised weights.
    """
    dtype = jnp.bfloat16
    mesh = Mesh(np.array(absent_devices(find_gpu(GPU), DEVICES)), ("fsdp",))

    def make() -> CausalLM:
        model = CausalLM(LLAMA_3_8B, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        quant = jaxbnb.QuantConfig("nf4", double_quant=True, compute_dtype=dtype)
        quantize_model(model, quant)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        state,
        partition_specs(state, mesh),
    )
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    count = sum(x.size for x in leaves if isinstance(x, QuantizedArray))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32, sharding=rows)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    with use_mesh(mesh):
        return forward.lower(state, tokens).compile(), count


def _describe(found: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in found.items())
