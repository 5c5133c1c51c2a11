"""`jaxbnb calibrate`: quantises a checkpoint, with codes chosen on text."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from flax import nnx

from jaxbnb.calibration import (
    Comparison,
    LayerReport,
    calibrate,
    compare,
    merge_calibrated,
    tune,
)
from jaxbnb.cli import _model
from jaxbnb.cli._arguments import count_held_out
from jaxbnb.convert import (
    convert_checkpoint,
    gguf_tokenizer,
    load_tokenizer,
    open_checkpoint,
    plan_conversion,
)
from jaxbnb.core import QuantConfig
from jaxbnb.core.files import atomic_folder, check_outside
from jaxbnb.core.table import format_table
from jaxbnb.data import Batches, Encoder, TrainBatch, load_dataset
from jaxbnb.lora import check_adapter_files, load_adapter, merge
from jaxbnb.models import DecoderConfig, load_pretrained, plan_to_flax, save_pretrained
from jaxbnb.models.families import FAMILIES
from jaxbnb.models.flax_folder import write_state
from jaxbnb.models.tensors import collect_quantized, name_kernels
from jaxbnb.nnx import dequantize_model, quantize_model
from jaxbnb_kernels import verification

# Tokens in a batch, forward and backward at once.
_BATCH_TOKENS: Final = 1024


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes, and prints a report, or ``error: ...`` to stderr.

    Returns:
        The exit status: 0, or 1 if reading, calibrating or writing failed.
    """
    try:
        _run(args)
    except BrokenPipeError:
        raise
    except (*_model.ERRORS, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    quant = QuantConfig(
        args.quant, block_size=args.block_size, double_quant=args.double_quant
    )
    dst = Path(args.dst)
    has_random_tokens = _find_whether_tokens_are_random(args)
    # Fails now for a model that could not be written in the end.
    if args.to == "flax":
        plan = plan_to_flax(args.model, quant=quant, dtype=args.dtype)
    else:
        plan = plan_conversion(args.model, quant=quant, dtype=args.dtype, to=args.to)
    if args.model.endswith(".gguf"):
        gguf_tokenizer(args.model)  # It is written, too.
    planned = {report.name for report in plan if report.is_quantized}
    check_outside(args.model, dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists; choose another name")
    if args.adapter:
        check_adapter_files(args.adapter)
    train, held_out = _read_data(args) if args.data else ([], [])
    verification.verify_if_needed(_model.announce_checks, _model.report_check)
    model = load_pretrained(args.model, quant=_find_base_quant(args), dtype=args.dtype)
    if args.data and args.seq > model.config.max_position_embeddings:
        raise ValueError(
            f"--seq {args.seq} is more than the model takes: "
            f"{model.config.max_position_embeddings} tokens"
        )
    if has_random_tokens:
        train = _draw_tokens(model.config, args)
    skip = [
        path
        for path, names in name_kernels(model).items()
        if not planned.issuperset(names)
    ]
    if args.adapter:
        load_adapter(model, args.adapter)
    kept = dst.with_name(f".{dst.name}.calibrate.partial")
    quantized, reports, divergences, shares = _quantize(
        model, train, quant, skip, kept, args
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(_make_list(reports) if args.report else _make_table(reports))
    if shares:
        least = min(shares, key=shares.__getitem__)
        print(
            f"the layers keep {np.mean([*shares.values()]):.1%} of the adapters' "
            f"update; the least is {shares[least]:.1%}, in {least}"
        )
    if divergences:
        part = max(1, len(divergences) // 4)
        first, last = (np.mean(x) for x in (divergences[:part], divergences[-part:]))
        print(
            f"{args.tune} steps of tuning: KL divergence on the data {first:.4f} in "
            f"the first quarter, {last:.4f} in the last"
        )
    if held_out:
        # Before anything is written, so that an interrupted command can be repeated.
        ours = compare(quantized, model, held_out)
        plain = compare(_quantize_by_absmax(model, quant, skip, args), model, held_out)
        name = f"{args.method}, tuned" if args.tune else args.method
        print(f"on {len(held_out)} windows of the data that were held out:")
        print(_make_comparison({"absmax": plain, name: ours}))
    if args.to == "flax":
        with atomic_folder(dst) as folder:
            write_state(quantized, open_checkpoint(args.model), folder)
    elif args.adapter:
        # Adapters may have changed more than linear layers.
        save_pretrained(quantized, dst, source=args.model, to=args.to)
    else:
        kernels = collect_quantized(quantized)
        convert_checkpoint(
            args.model,
            dst,
            quant=quant,
            dtype=args.dtype,
            quantized=kernels,
            to=args.to,
        )
    shutil.rmtree(kept)
    print(f"{dst}: {time.perf_counter() - start:.0f} s")


def _find_whether_tokens_are_random(args: argparse.Namespace) -> bool:
    """Returns whether random tokens take the place of text.

    Raises:
        ValueError: text or tokens are asked for, and are not all that the model takes.
    """
    name = open_checkpoint(args.model).config.get("model_type")
    kind = FAMILIES[name].kind if name in FAMILIES else None
    if kind not in ("encoder", "encoder-decoder"):
        # Only mse needs no tokens; then it is better with random ones.
        return not args.data and args.random_tokens is not False
    if args.data or args.random_tokens:
        raise ValueError(
            f"{args.model} is a {name}, an {kind}, and text alone calibrates decoders. "
            "Use --method mse without it, or jaxbnb.calibrate(apply=...) in Python"
        )
    return False


def _find_base_quant(args: argparse.Namespace) -> QuantConfig | None:
    """Returns the format of the weights that the adapter was trained with."""
    if args.adapter_quant is None:
        return None
    # As in jaxbnb.finetune.TrainConfig.
    double_quant = args.adapter_quant != "llm_int8"
    return QuantConfig(args.adapter_quant, double_quant=double_quant)


def _quantize(
    model: Any,
    batches: list[Any],
    quant: QuantConfig,
    skip: Sequence[str],
    kept: Path,
    args: argparse.Namespace,
) -> tuple[Any, list[LayerReport], list[float], dict[str, float]]:
    """Calibrates a copy of a model.

    Returns:
        The copy, reports, the divergences of tuning, and the share of the adapters'
        update that each layer has kept.
    """
    progress = _show_progress if sys.stderr.isatty() else _make_line_printer()
    options: Any = {
        "method": args.method,
        "skip": skip,
        "seed": args.seed,
        "resume_dir": kept,
        "progress": progress,
    }
    if args.adapter:
        merged = merge_calibrated(
            model, batches or None, quant, tune_steps=args.tune, **options
        )
        return merged.model, merged.layers, merged.divergences, merged.kept
    # Modules of its own, with the same arrays.
    quantized = nnx.merge(*nnx.split(model))
    reports = calibrate(quantized, batches or None, quant, **options)
    divergences = []
    if args.tune:
        divergences = tune(
            quantized,
            model,
            batches,
            steps=args.tune,
            seed=args.seed,
            progress=progress,
        )
    return quantized, reports, divergences, {}


def _read_data(
    args: argparse.Namespace,
) -> tuple[list[TrainBatch], list[TrainBatch]]:
    """Returns batches of the windows to calibrate on, and windows held out.

    Raises:
        ValueError: the data are too short.
    """
    held_out = count_held_out(args.samples)
    windows = []
    for window in Batches(
        load_dataset(args.data),
        Encoder(load_tokenizer(args.model), loss_on="all"),
        batch_size=1,
        seq_length=args.seq,
        seed=args.seed,
        epochs=1,
    ):
        windows.append(window)
        if len(windows) == args.samples + held_out:
            break
    else:
        raise ValueError(
            f"the data fill {len(windows)} of the {args.samples + held_out} windows of "
            f"{args.seq} tokens that are needed: --samples {args.samples}, and "
            f"{held_out} held out; about "
            f"{4 * args.seq * (args.samples + held_out):,} characters of English. "
            "Give more files to --data, or lower --samples or --seq"
        )
    size = max(1, _BATCH_TOKENS // args.seq)
    train, rest = windows[: args.samples], windows[args.samples :]
    return [_join(train[i : i + size]) for i in range(0, len(train), size)], rest


def _draw_tokens(config: DecoderConfig, args: argparse.Namespace) -> list[np.ndarray]:
    """Returns batches of tokens that are all equally likely."""
    shape = args.samples, min(args.seq, config.max_position_embeddings)
    size = max(1, _BATCH_TOKENS // shape[1])
    tokens = np.random.default_rng(args.seed).integers(config.vocab_size, size=shape)
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def _join(windows: Sequence[TrainBatch]) -> TrainBatch:
    arrays: Any = [
        np.concatenate([window[part] for window in windows], axis=1)
        for part in range(3)
    ]
    return TrainBatch(*arrays, rows=sum((window.rows for window in windows), ()))


def _quantize_by_absmax(
    model: Any, quant: QuantConfig, skip: Sequence[str], args: argparse.Namespace
) -> Any:
    """Returns a copy with the codes that it would have without calibration."""
    plain = nnx.merge(*nnx.split(model))
    if args.adapter_quant is not None:
        dequantize_model(plain)
    if args.adapter:
        merge(plain)
    quantize_model(plain, quant, skip=skip)
    return plain


def _make_comparison(results: Mapping[str, Comparison]) -> str:
    """Returns a line for the model as it was, and one for each choice of codes."""
    (first, *_) = results.values()
    rows = [
        ("codes by", "perplexity", "KL divergence"),
        ("not quantised", f"{first.reference_perplexity:.2f}", "0"),
    ]
    for name, result in results.items():
        rows.append((name, f"{result.perplexity:.2f}", f"{result.kl:.4f}"))
    return format_table(rows, 2)


def _make_table(reports: Sequence[LayerReport]) -> str:
    """Returns a line for each kind of layer, with means over its matrices."""
    kinds: dict[str, list[LayerReport]] = {}
    for report in reports:
        kinds.setdefault(report.path, []).append(report)
    rows: list[tuple[str, ...]] = [
        (
            *("layer", "method", "matrices", "error before", "after", "worst"),
            *("seconds", "peak MiB"),
        )
    ]
    for path, group in kinds.items():
        before = float(np.mean([report.absmax_error for report in group]))
        after = float(np.mean([report.error for report in group]))
        worst = max(report.error for report in group)
        seconds = sum(report.seconds for report in group)
        memory = max(report.memory or 0 for report in group)
        rows.append(
            (
                *(path, group[0].method, str(len(group))),
                *map(_format_share, (before, after, worst)),
                *(f"{seconds:.1f}", _format_memory(memory)),
            )
        )
    return format_table(rows, 6)


def _make_list(reports: Sequence[LayerReport]) -> str:
    """Returns a line for each matrix."""
    rows: list[tuple[str, ...]] = [
        ("layer", "method", "error before", "after", "seconds", "peak MiB")
    ]
    for report in reports:
        number = "" if report.number is None else f", {report.number}"
        rows.append(
            (
                *(f"{report.path}{number}", report.method),
                *map(_format_share, (report.absmax_error, report.error)),
                *(f"{report.seconds:.1f}", _format_memory(report.memory)),
            )
        )
    return format_table(rows, 4)


def _format_share(share: float) -> str:
    # Errors of a merged update are far below those of quantising a model.
    return f"{100 * share:.3g}%"


def _format_memory(count: int | None) -> str:
    return f"{count / 2**20:,.0f}" if count else "?"


def _show_progress(done: int, total: int, what: str) -> None:
    """Redraws a line of the terminal."""
    # \x1b[K clears the rest of a longer line.
    line = f"{100 * done // max(total, 1):3d}% of {total}  {what}"
    print(f"\r{line:.79}\x1b[K", end="", file=sys.stderr, flush=True)


def _make_line_printer() -> Callable[[int, int, str], None]:
    """Returns a function that prints a line for each tenth, for files of output."""
    last = -1

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if tenth != last:
            print(
                f"{100 * done // max(total, 1):3d}% of {total}  {what}",
                file=sys.stderr,
                flush=True,
            )
        last = tenth

    return show
