"""The memory that long texts take on a CPU, measured in processes of their own."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.benchmarks._data import SMOLLM2
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.core.process_memory import peak_bytes, reset_peak, resident_bytes
from jaxbnb.finetune import next_token_loss
from jaxbnb.models import CausalLM, KVCache

# Two of SmolLM2-135M's 30 layers, with its vocabulary, for longer texts.
CONFIG = dataclasses.replace(
    SMOLLM2, num_hidden_layers=2, max_position_embeddings=32_768
)
STEP, PREFILL = "step", "prefill"
LENGTHS = {STEP: (4096, 8192), PREFILL: (16_384, 32_768)}


def measure_peaks(
    lengths: Mapping[str, tuple[int, int]] = MappingProxyType(LENGTHS),
) -> Iterator[Figure]:
    """Measures the peak of each length, next to the one that XLA has compiled for.

    Args:
        lengths: a short and a long text for each kind of call.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise NotImplementedError("peaks of memory can be measured only on Linux")
    for what, (short, long) in lengths.items():
        runs = {seq: _run(what, seq) for seq in (short, long)}
        title = f"{what} of 2 SmolLM2 layers"
        for seq, run in runs.items():
            yield Figure(
                f"{title}, {seq:,} tokens, measured peak",
                run["peak"] / 2**20,
                "MiB",
                None,
                f"compiled: {run['compiled'] / 2**20:.0f} MiB; {run['seconds']:.1f} s",
                run,
            )
        yield Figure(
            f"{title}, {long:,} tokens",
            runs[long]["peak"] / runs[short]["peak"],
            f"x the peak of {short:,} tokens",
            long / short,
        )


def _run(what: str, seq: int) -> dict[str, Any]:
    code = "from jaxbnb.benchmarks import _context_peak; _context_peak.measure()"
    command = [sys.executable, "-P", "-c", code, what, str(seq)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure() -> None:
    """Measures in this process, and prints a JSON object.

    The peak counts what the call allocates: results and temporaries, not arguments.
    """
    what, seq = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_platforms", "cpu")
    graphdef, state = nnx.split(CausalLM(CONFIG, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.arange(seq)[None] % CONFIG.vocab_size, jnp.int32)
    function = {STEP: _differentiate, PREFILL: _prefill}[what]
    call = jax.jit(function, static_argnums=0)
    compiled = call.lower(graphdef, state, tokens).compile()
    memory: Any = compiled.memory_analysis()
    # The peak so far is that of compiling.
    reset_peak()
    before = resident_bytes()
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, tokens))
    seconds = time.perf_counter() - start
    peak = (peak_bytes() or 0) - before
    planned = memory.temp_size_in_bytes + memory.output_size_in_bytes
    print(json.dumps({"peak": peak, "compiled": planned, "seconds": seconds}))


def _differentiate(graphdef: Any, state: Any, tokens: Any) -> Any:
    def loss(state):
        return next_token_loss(nnx.merge(graphdef, state), tokens, remat=True)

    return jax.value_and_grad(loss)(state)


def _prefill(graphdef: Any, state: Any, tokens: Any) -> Any:
    """Reads a prompt as `generate` does: in parts, and with the last logits only."""
    model = nnx.merge(graphdef, state)
    cache = KVCache.empty(model.config, 1, tokens.shape[1])
    hidden, cache = model.model(tokens, cache=cache)
    return model.logits(hidden[:, -1]), cache
