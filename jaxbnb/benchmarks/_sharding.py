"""What eight GPUs send to each other: programs of Llama 3 8B, compiled without them."""

import dataclasses
from collections.abc import Iterator
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
from jaxbnb.finetune import (
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.nnx import quantize_model
from jaxbnb.planning import collective_bytes, find_gpu
from jaxbnb.planning.gpus import absent_devices, has_compiler
from jaxbnb.sharding import partition_specs, use_mesh

DEVICES, ROWS, SEQ = 8, 8, 2048
# Most bytes that a device may get for each quantised weight of a forward pass: codes
# and doubly quantised absmax take 0.516 of them.
FORWARD_LIMIT = 0.57
# Most GiB that it may get in a QLoRA step: codes for two passes are 6.7 of them.
STEP_LIMIT = 11.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and the number of its weights.

    Attributes:
        compiled: the program.
        quantized: number of quantised weights.
    """

    compiled: jax.stages.Compiled
    quantized: int


def bench_sharding() -> Iterator[Figure]:
    """Counts bytes of collectives on eight H100s, divided as "fsdp"."""
    if not has_compiler():
        raise NotImplementedError(
            "programs for GPUs need JAX's CUDA plugin, to compile with: put "
            "jax-cuda13-plugin and jax-cuda13-pjrt in a folder and name it in "
            "PYTHONPATH"
        )
    mesh = Mesh(np.array(absent_devices(find_gpu("H100"), DEVICES)), ("fsdp",))
    tokens = f"{ROWS} x {SEQ:,} tokens"
    program = compile_program("forward", LLAMA_3_8B, mesh)
    found = collective_bytes(program.compiled)
    value = sum(found.values()) / program.quantized
    name = f"forward pass, {tokens}"
    yield Figure(name, value, "bytes a weight", FORWARD_LIMIT, _describe(found))
    for kind, limit in (("QLoRA", STEP_LIMIT), ("full", None)):
        program = compile_program(kind, LLAMA_3_8B, mesh)
        found = collective_bytes(program.compiled)
        sent = sum(found.values()) / 2**30
        name = f"{kind} step of adamw8bit, {tokens}"
        yield Figure(name, sent, "GiB", limit, _describe(found))
        peak = peak_bytes(program.compiled) / 2**30
        yield Figure(f"{kind} step: memory of a device", peak, "GiB")


def compile_program(kind: str, config: DecoderConfig, mesh: Mesh) -> Program:
    """Compiles a forward pass, a QLoRA step, or a step of all parameters.

    Args:
        kind: "forward", "QLoRA" or "full".
        config: sizes of the model, which is in bfloat16. The first two have linear
            layers in NF4, doubly quantised.
        mesh: devices, which may be absent, with the axis "fsdp".
    """
    tx = jaxbnb.adamw8bit(1e-4)

    def make() -> CausalLM:
        dtype = jnp.bfloat16
        model = CausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        if kind != "full":
            quant = jaxbnb.QuantConfig("nf4", double_quant=True, compute_dtype=dtype)
            quantize_model(model, quant)
        if kind == "QLoRA":
            add_adapter(model, LoraConfig(r=16), rngs=nnx.Rngs(1))
        return model

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
            partition_specs(tree, mesh),
        )

    graphdef, state = nnx.split(nnx.eval_shape(make))
    state = place(state)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    quantized = sum(x.size for x in leaves if isinstance(x, QuantizedArray))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    with use_mesh(mesh):
        if kind == "forward":
            tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32, sharding=rows)
            forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
            return Program(forward.lower(state, tokens).compile(), quantized)
        wrt = nnx.Param if kind == "full" else nnx.LoRAParam
        graphdef, trainable, frozen = split_trainable(nnx.merge(graphdef, state), wrt)
        opt_state = place(jax.eval_shape(tx.init, trainable))
        step = train_step(graphdef, tx)
        compiled = compile_train_step(
            step, trainable, opt_state, frozen, (ROWS, SEQ), batch_sharding=rows
        )
    return Program(compiled, quantized)


def _describe(found: dict[str, int]) -> str:
    return ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in found.items())
