"""What a conversion makes of each tensor, decided before anything is read."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import ml_dtypes
import numpy as np

from jaxbnb.convert import _bitsandbytes_weights
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.paths import matches
from jaxbnb.core.table import layout

DTYPES: Final[dict[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# What becomes of a tensor that the model does not need.
LEFT_OUT: Final = "left out"
_FLOATS: Final = (*DTYPES.values(), np.dtype(np.float64))
# The names that Hugging Face's models have for output heads and embeddings, whose
# weights look like those of linear layers. bitsandbytes quantises neither.
HEADS_AND_EMBEDDINGS: Final = (
    *("lm_head", "embed_out", "embed_tokens", "embed_positions", "embed_in"),
    *("wte", "wpe", "word_embeddings", "position_embeddings", "shared"),
)


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What a conversion does, or did, with one tensor.

    Attributes:
        name: the tensor, in Hugging Face's names.
        shape: of it, ``(out, in)`` of a linear layer.
        source: the format it is stored in, e.g. "bfloat16", "nf4" or GGUF's "Q4_1".
        result: the format it is written in.
        nbytes: what it takes then, with absmax and all.
        sqnr: of a tensor that was quantised, the power of the values over that of the
            error, in decibels; None until it is.
        note: why a linear layer's weight is not quantised, or nothing.
        place: where it goes in a model of ours, if that is what is made: variables, and
            which of their layers.

    Example:
        >>> TensorReport("lm_head.weight", (89, 64), "float32", "bfloat16", 11392).sqnr
    """

    name: str
    shape: tuple[int, ...]
    source: str
    result: str
    nbytes: int
    sqnr: float | None = None
    note: str = ""
    place: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether this conversion quantises it."""
        return self.source != self.result and self.result not in (*DTYPES, LEFT_OUT)


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the source, and what is written for it.

    Attributes:
        report: of it, yet without an SQNR.
        dtype: that it is cast to; before it is quantised, if it is.
        config: the format that it is quantised to, or None.
        outputs: what is written.
    """

    report: TensorReport
    dtype: np.dtype
    config: QuantConfig | None
    outputs: Mapping[str, TensorInfo]


def make(
    source: Checkpoint,
    dtype: str | None,
    quant: QuantConfig | None,
    skip: str | Sequence[str],
) -> list[Job]:
    """A job for each tensor that ``source`` has, larger elements first.

    Raises:
        ValueError: a dtype or a format that cannot be written, or nothing to quantise.
        UnsupportedCheckpointError: the source is quantised in a way that this would
            spoil.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")
    if quant is not None:
        try:
            quant.to_huggingface()
        except ValueError as error:
            raise ValueError(
                f"{error}. To write a Flax model in it: --to flax, or "
                "jaxbnb.models.convert_to_flax"
            ) from error
    if quant is not None and source.config.get("quantization_config"):
        raise UnsupportedCheckpointError(
            f"{source.path} is quantised already; to quantise it otherwise, decode it "
            "first, with a dtype and without quant"
        )
    model_type = source.config.get("model_type")
    if quant is not None and model_type in _bitsandbytes_weights.TRANSPOSED_MODELS:
        raise UnsupportedCheckpointError(
            f"{source.path}: bitsandbytes turns the weights of a {model_type} round "
            "before it quantises them, which jaxbnb does not write; --to flax does"
        )
    is_opaque = "quantization_config" in source.config and not source.quantized
    if dtype is not None and is_opaque:
        raise UnsupportedCheckpointError(
            f"{source.path} is quantised; casting its codes and scales to {dtype} "
            "would ruin them. Leave dtype out to copy it as it is"
        )
    jobs = [
        _job(source, name, info, dtype, quant, skip)
        for name, info in source.tensors.items()
    ]
    if quant is not None and all(job.config is None for job in jobs):
        raise ValueError(
            f"{source.path} has nothing to quantise: no matrix of its "
            f"{len(jobs)} tensors that skip={skip!r} leaves is a linear layer's, with "
            f"rows that are a multiple of {quant.block_size}"
        )
    return sorted(jobs, key=lambda job: -job.dtype.itemsize)


def skipped_modules(jobs: Iterable[Job]) -> list[str]:
    """The modules with matrices that were left alone, for ``quantization_config``."""
    names = [
        job.report.name.removesuffix(".weight")
        for job in jobs
        if job.config is None and len(job.report.shape) == 2
    ]
    return sorted({"lm_head", *names})


def report_table(reports: Sequence[TensorReport]) -> str:
    """Reports as a table to print, and their sums.

    Args:
        reports: of `plan_conversion`, or what `convert_checkpoint` reported.

    Example:
        >>> print(report_table(
        ...     [TensorReport("a.weight", (8, 64), "float32", "nf4", 562, 20.5)]))
        tensor    shape        from     to   bytes  SQNR dB
        a.weight  (8, 64)      float32  nf4    562    20.50
        total     1 quantised                  562
    """
    rows = [("tensor", "shape", "from", "to", "in the model", "bytes", "SQNR dB")]
    for r in reports:
        sqnr = r.note if r.sqnr is None else f"{r.sqnr:.2f}"
        cells = (r.name, str(r.shape), r.source, r.result, r.place)
        rows.append((*cells, f"{r.nbytes:,}", sqnr))
    count = sum(r.is_quantized for r in reports)
    total = f"{sum(r.nbytes for r in reports):,}"
    rows.append(("total", f"{count} quantised", "", "", "", total, ""))
    if not any(r.place for r in reports):
        rows = [row[:4] + row[5:] for row in rows]
    return layout(rows, num_right=2)


def source_format(source: Checkpoint, name: str) -> str:
    """How a tensor is stored: its dtype, or the format of what is quantised."""
    if name in source.quantized:
        return source.quantized[name].quant_type
    if name in source.encodings:
        return source.encodings[name][0]
    return source.tensors[name].dtype.name


def _job(
    source: Checkpoint,
    name: str,
    info: TensorInfo,
    dtype: str | None,
    quant: QuantConfig | None,
    skip: str | Sequence[str],
) -> Job:
    is_float = info.dtype in _FLOATS
    cast = info.dtype if dtype is None or not is_float else DTYPES[dtype]
    outputs, config, note = {name: TensorInfo(info.shape, cast)}, None, ""
    if quant is not None and is_float and _is_linear(name, info, skip):
        config, note = quant, _obstacle(info, quant)
    if note:
        config = None
    if config is not None:
        if cast not in DTYPES.values():
            cast = DTYPES["float32"]  # bitsandbytes has no float64.
        outputs = _bitsandbytes_weights.infos(
            name, TensorInfo(info.shape, cast), config
        )
    report = TensorReport(
        name=name,
        shape=info.shape,
        source=source_format(source, name),
        result=cast.name if config is None else config.quant_type,
        nbytes=sum(output.nbytes for output in outputs.values()),
        note=note,
    )
    return Job(report, cast, config, outputs)


def _is_linear(name: str, info: TensorInfo, skip: str | Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    is_matrix = len(info.shape) == 2 and name.endswith(".weight")
    return is_matrix and not matches(module, skip)


def _obstacle(info: TensorInfo, quant: QuantConfig) -> str:
    """Why a matrix cannot be quantised so that a layer of either library reads it."""
    size = info.shape[1]
    if 0 in info.shape:
        return "empty"
    if quant.quant_type == LLM_INT8 or size % (quant.block_size or 1) == 0:
        return ""
    return f"rows of {size}, no multiple of {quant.block_size}"
