"""Plans what a conversion does with each tensor, before it reads any weights."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._bitsandbytes_weights import TRANSPOSED_MODELS
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.convert.writers import BITSANDBYTES, Writer, find_writer
from jaxbnb.core import QuantConfig
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.paths import matches
from jaxbnb.core.table import format_table

DTYPES: Final[dict[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Result of a tensor that the model does not need.
LEFT_OUT: Final = "left out"
_FLOATS: Final = (*DTYPES.values(), np.dtype(np.float64))
# Names of output heads and embeddings in Hugging Face's models. Their weights look like
# those of linear layers, but bitsandbytes quantises neither.
HEADS_AND_EMBEDDINGS: Final = (
    *("lm_head", "embed_out", "embed_tokens", "embed_positions", "embed_in"),
    *("wte", "wpe", "word_embeddings", "position_embeddings", "shared"),
    *("token_type_embeddings", "relative_attention_bias"),
    # RoBERTa's, inside a head that transformers leaves alone as a whole.
    "lm_head.dense",
)
# Linear layers that transformers keeps in float32, so it would not load their codes.
_KEPT: Final = {"t5": ("wo",), "mt5": ("wo",)}


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What a conversion does, or did, with one tensor.

    Attributes:
        name: Hugging Face's name of the tensor.
        shape: shape of the tensor, ``(out, in)`` for a linear layer.
        source: format in the source, e.g. "bfloat16", "nf4" or GGUF's "Q4_1".
        result: format after the conversion.
        nbytes: size after the conversion in bytes, including absmax and other parts.
        sqnr: power of the values divided by the power of the quantisation error, in
            decibels; None if the tensor is not quantised (yet).
        note: why the weight of a linear layer is not quantised, or "".
        place: variables of a Flax model that the tensor becomes, and which of their
            layers; "" in other conversions.

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
        """Whether this conversion quantises the tensor."""
        return self.source != self.result and self.result not in (*DTYPES, LEFT_OUT)


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the source, and the tensors that are written for it.

    Attributes:
        report: report on the tensor, without an SQNR.
        dtype: dtype to cast to, before quantisation if there is any.
        config: format to quantise to, or None.
        outputs: tensors to write, by name.
    """

    report: TensorReport
    dtype: np.dtype
    config: QuantConfig | None
    outputs: Mapping[str, TensorInfo]


def make_jobs(
    source: Checkpoint,
    dtype: str | None,
    quant: QuantConfig | None,
    skip: str | Sequence[str],
    to: str = BITSANDBYTES,
) -> list[Job]:
    """Makes a job for each tensor of ``source``; larger elements come first.

    Raises:
        ValueError: the dtype or format cannot be written, or there is nothing to
            quantise.
        UnsupportedCheckpointError: the source is already quantised in a form that the
            conversion would damage.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")
    writer = find_writer(to)
    if quant is not None:
        try:
            writer.make_config(quant, ())
        except ValueError as error:
            raise ValueError(
                f"{error}. To write a Flax model in it: --to flax, or "
                "jaxbnb.models.convert_to_flax"
            ) from error
    if quant is not None and source.config.get("quantization_config"):
        raise UnsupportedCheckpointError(
            f"{source.path} is already quantised; to quantise it to another format, "
            "decode it first, with a dtype and without quant"
        )
    model_type = source.config.get("model_type")
    if quant is not None and model_type in TRANSPOSED_MODELS:
        raise UnsupportedCheckpointError(
            f"{source.path}: {to} needs the weights of a {model_type} transposed "
            "before they are quantised, and jaxbnb does not write these; use --to flax"
        )
    is_read = source.quantized or source.decoded
    is_opaque = "quantization_config" in source.config and not is_read
    if dtype is not None and is_opaque:
        raise UnsupportedCheckpointError(
            f"{source.path} is quantised; casting its codes and scales to {dtype} "
            "would ruin them. Leave dtype out to copy them unchanged"
        )
    jobs = [
        _make_job(source, name, info, dtype, quant, skip, writer)
        for name, info in source.tensors.items()
    ]
    if quant is not None and all(job.config is None for job in jobs):
        raise ValueError(
            f"{source.path} has nothing to quantise: apart from skip={skip!r}, none of "
            f"its {len(jobs)} tensors is the matrix of a linear layer with rows that "
            f"are a multiple of {quant.block_size}"
        )
    return sorted(jobs, key=lambda job: -job.dtype.itemsize)


def list_skipped_modules(jobs: Iterable[Job]) -> list[str]:
    """Lists modules with an unquantised matrix, for ``quantization_config``."""
    names = [
        job.report.name.removesuffix(".weight")
        for job in jobs
        if job.config is None and len(job.report.shape) == 2
    ]
    return sorted({"lm_head", *names})


def report_table(reports: Sequence[TensorReport]) -> str:
    """Formats reports as a table to print, with totals.

    Args:
        reports: reports from `plan_conversion` or `convert_checkpoint`.

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
    return format_table(rows, num_right=2)


def source_format(source: Checkpoint, name: str) -> str:
    """Returns how a tensor is stored: its dtype, or its quantised format."""
    if name in source.quantized:
        return source.quantized[name].quant_type
    if name in source.encodings:
        return source.encodings[name][0]
    return source.tensors[name].dtype.name


def _make_job(
    source: Checkpoint,
    name: str,
    info: TensorInfo,
    dtype: str | None,
    quant: QuantConfig | None,
    skip: str | Sequence[str],
    writer: Writer,
) -> Job:
    is_float = info.dtype in _FLOATS
    cast = info.dtype if dtype is None or not is_float else DTYPES[dtype]
    outputs, config, note = {name: TensorInfo(info.shape, cast)}, None, ""
    if quant is not None and is_float and _is_linear(name, info, skip):
        config, note = quant, _find_obstacle(source, name, info, quant)
    if note:
        config = None
    if config is not None:
        if cast not in DTYPES.values():
            cast = DTYPES["float32"]  # No library has float64.
        outputs = writer.plan_arrays(name, TensorInfo(info.shape, cast), config)
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


def _find_obstacle(
    source: Checkpoint, name: str, info: TensorInfo, quant: QuantConfig
) -> str:
    """Returns why transformers could not use the quantised matrix, or ""."""
    size = info.shape[1]
    kept = _KEPT.get(source.config.get("model_type", ""), ())
    if matches(name.removesuffix(".weight"), kept):
        return "transformers keeps it in float32"
    if 0 in info.shape:
        return "empty"
    if quant.quant_type == LLM_INT8 or size % (quant.block_size or 1) == 0:
        return ""
    return f"rows of {size}, not a multiple of {quant.block_size}"
