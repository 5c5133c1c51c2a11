"""TrainResult: what a run came to, and how to use it."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxbnb.core import QuantConfig
from jaxbnb.core.units import format_bytes, format_seconds
from jaxbnb.finetune._config import TrainConfig


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run of `train` came to.

    Attributes:
        out: folder of the run.
        steps: number of steps, with those before a resume.
        total_steps: number of steps that the config asks for.
        loss: loss of the last step, in nats per target; NaN if no step was taken.
        eval_loss: loss of the last evaluation; None without one.
        best_eval_loss: lowest loss of an evaluation; None without one.
        best_step: step after which that was; None without an evaluation.
        is_complete: whether the run reached its end. Otherwise it was interrupted, and
            ``resume`` goes on with it.
        ended_early: whether ``patience`` ended it.
        is_preempted: whether SIGTERM ended it.
        skipped_steps: number of steps that were not taken.
        truncated_rows: number of rows that lost tokens to fit into a window, over all
            epochs.
        skipped_rows: number of rows that were left out, over all epochs, because they
            could not be encoded or had no target. Bad lines of a file are not among
            them.
        seconds: time of all steps, without compilation and evaluation.
        tokens_per_second: tokens, without padding, over seconds.
        efficiency: share of the places in windows that hold a token.
        weight_bytes: size of the frozen weights.
        trainable_bytes: size of the trained variables.
        optimizer_bytes: size of the optimizer's state.
        peak_bytes: peak memory of the compiled step, see `jaxbnb.finetune.peak_bytes`;
            0 if nothing was left to do.
        samples: prompts with their answers before and after training, as the report
            shows them; empty for a run that was interrupted.
    """

    out: str
    steps: int
    total_steps: int
    loss: float
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    is_complete: bool
    ended_early: bool
    is_preempted: bool
    skipped_steps: int
    truncated_rows: int
    skipped_rows: int
    seconds: float
    tokens_per_second: float
    efficiency: float
    weight_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    samples: tuple[tuple[str, str, str], ...] = ()


def summarize(
    result: TrainResult, config: TrainConfig, usage: Sequence[str]
) -> list[str]:
    """Returns lines for the end of a run; ``usage`` is the result of `show_usage`."""
    if not result.is_complete:
        return [
            f"stopped after step {result.steps} of {result.total_steps}; the same "
            "command with --resume goes on from there"
        ]
    lines = [
        f"{result.steps} steps in {format_seconds(result.seconds)}, "
        f"{result.tokens_per_second:,.0f} tokens/s; last loss {result.loss:.4f}; "
        f"windows {result.efficiency:.1%} full"
    ]
    if result.skipped_steps:
        lines.append(
            f"steps that were not finite, and not taken: {result.skipped_steps}"
        )
    if result.truncated_rows or result.skipped_rows:
        lines.append(
            f"rows cut to fit into a window: {result.truncated_rows:,}; rows left out: "
            f"{result.skipped_rows:,}"
        )
    if result.best_eval_loss is not None:
        lines.append(
            f"held-out loss {result.eval_loss:.4f}, lowest {result.best_eval_loss:.4f} "
            f"after step {result.best_step}"
        )
    parts = [
        f"weights {format_bytes(result.weight_bytes)}",
        f"trained variables {format_bytes(result.trainable_bytes)}",
        f"optimizer state {format_bytes(result.optimizer_bytes)}",
    ]
    if result.peak_bytes:
        parts.append(f"peak of a step {format_bytes(result.peak_bytes)}")
    report = Path(result.out) / "report.html"
    use = ["to use it:", *(f"  {line}" for line in usage)]
    return [*lines, ", ".join(parts), f"report: {report}", *use]


def show_usage(config: TrainConfig, *, is_chat: bool, vocab_size: int) -> list[str]:
    """Returns two commands that use the result, here and with Hugging Face's libraries.

    Args:
        config: the run's config.
        is_chat: whether the data are chats, as prompts should then be.
        vocab_size: number of tokens of the model, with new ones.
    """
    out = Path(config.out)
    if config.full:
        folder = out / "model"
        parts = [folder]
        theirs = f'transformers: AutoModelForCausalLM.from_pretrained("{folder}")'
    else:
        folder = out / "adapter"
        parts = [config.model, "--adapter", folder]
        quant = config.quant_config()
        if isinstance(quant, QuantConfig):
            parts += ["--quant", quant.quant_type]
            parts += ["--double-quant"] if quant.double_quant else []
        elif quant is not None:
            parts += ["--quant", quant]
        parts += ["--dtype", config.dtype]
        theirs = f'PeftModel.from_pretrained(model, "{folder}")'
        if config.new_tokens:
            theirs = f"model.resize_token_embeddings({vocab_size}); {theirs}"
        theirs = f"PEFT: {theirs}"
    if config.tokenizer is not None and not config.new_tokens:
        parts += ["--tokenizer", config.tokenizer]
    parts += ["--chat"] if is_chat else []
    ours = shlex.join(["jaxbnb", "generate", *map(str, parts)])
    return [f"{ours} --prompt ...", theirs]
