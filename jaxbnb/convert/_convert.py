"""convert_checkpoint: converts any checkpoint to a Hugging Face folder."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.convert import (
    huggingface_folder,
    journal,
    plan,
    safetensors_files,
)
from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert._open import open_checkpoint
from jaxbnb.convert.json_files import write_json
from jaxbnb.convert.pieces import Finish, Piece, Progress, Write, write_pieces
from jaxbnb.convert.plan import HEADS_AND_EMBEDDINGS, Job, TensorReport
from jaxbnb.convert.tokenizer_files import carry_tokenizer
from jaxbnb.convert.weights import (
    cast_chunks,
    cast_whole,
    compute_powers,
    quantize_weight,
    sqnr,
)
from jaxbnb.convert.writers import BITSANDBYTES, Writer, find_writer
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.config import as_config
from jaxbnb.core.files import check_outside, resumable_folder


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quant: QuantConfig | str | None = None,
    to: str = BITSANDBYTES,
    skip: str | Sequence[str] = HEADS_AND_EMBEDDINGS,
    quantized: Mapping[str, QuantizedArray] | None = None,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> Checkpoint:
    """Writes a checkpoint as a Hugging Face folder, tensor by tensor.

    Memory holds the tensor that is being read, and the codes of the previous one, which
    are being written. ``dst`` appears only when it is complete, with config.json, one
    model.safetensors, and the tokenizer if the source has one. If the call is
    interrupted or killed, the same call resumes from the finished tensors, which are
    kept next to ``dst``, in ``.<name>.resume.partial``.

    With ``quant``, the linear layers are written as the library ``to`` writes them, and
    config.json has the ``quantization_config`` that makes transformers load them with
    it. For bitsandbytes, they are the same byte for byte. vLLM loads those of
    compressed-tensors.

    Args:
        src: a path for `open_checkpoint`.
        dst: folder to write. It must not exist, or be an empty folder.
        dtype: "float32", "bfloat16" or "float16", to cast floating-point tensors and
            decode quantised weights. With None, each tensor keeps its dtype, quantised
            GGUF tensors become float32, and weights that bitsandbytes quantised are
            copied byte for byte.
        quant: format of the linear layers, or a `jaxbnb.QuantConfig` of it; None to
            quantise nothing. bitsandbytes has "nf4", "fp4" and "llm_int8".
            compressed-tensors has "int4", "int8", "uint4", "uint8", "llm_int8",
            "mxfp4", "nvfp4", and "fp8_e4m3" with the same ``act_quant_type``. A matrix
            with rows that are not a multiple of the block size is not quantised.
        to: library that stores the quantised layers, "bitsandbytes" or
            "compressed-tensors".
        skip: modules not to quantise. Either names, each a whole dotted path or its
            last parts, or one regular expression for the whole path. By default, output
            heads and embeddings.
        quantized: kernels ``(in, out)`` by the name of their tensor, to write instead
            of what ``quant`` makes of the tensor, e.g. after `jaxbnb.calibrate`. They
            must have the format ``quant``.
        progress: called as ``progress(done_bytes, total_bytes, name)`` while the tensor
            ``name`` is written.
        report: called with the `TensorReport` of each tensor after it is written.

    Returns:
        The new checkpoint, opened.

    Raises:
        ValueError: ``dtype`` is not one of these, the library does not have ``quant``,
            there is nothing to quantise, ``quantized`` has other tensors, shapes or
            formats than would be written, or ``dst`` is inside ``src``.
        CheckpointError: the source cannot be read, or has finite values beyond the
            range of ``dtype``.
        FileExistsError: ``dst`` already exists.
        BlockingIOError: another process is writing ``dst``.
        OSError: writing failed, e.g. on a full disk. ``dst`` is not created.

    Example:
        >>> convert_checkpoint("m.gguf", "m", quant="nf4")  # doctest: +SKIP
        Checkpoint('m', 'llama', 272 tensors, 173.6 MB)
    """
    quant = None if quant is None else as_config(quant)
    source = _open_source(src, dtype)
    check_outside(src, dst)
    jobs = plan.make_jobs(source, dtype, quant, skip, to)
    writer = find_writer(to)
    quantized = {} if quantized is None else quantized
    _check_quantized(quantized, jobs)
    header, starts = _make_header(source, jobs)
    options = {"to": to, "dtype": dtype, "quant": quant, "skip": skip}
    if quantized:
        options["quantized"] = _digest(quantized)
    mark = journal.fingerprint(source.path, header, options)
    resumes = (huggingface_folder.WEIGHTS, journal.NAME)
    with resumable_folder(dst, mark=mark, resumes=resumes) as folder:
        pieces = _make_pieces(source, jobs, starts, quantized, writer)
        write_pieces(
            folder / huggingface_folder.WEIGHTS, header, pieces, progress, report
        )
        (folder / journal.NAME).unlink()
        if source.config:
            config = _make_config(source, jobs, dtype, quant, writer)
            write_json(folder / huggingface_folder.CONFIG, config)
        carry_tokenizer(source, folder)
    dst = Path(dst)
    return open_checkpoint(dst if source.config else dst / huggingface_folder.WEIGHTS)


def plan_conversion(
    src: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quant: QuantConfig | str | None = None,
    to: str = BITSANDBYTES,
    skip: str | Sequence[str] = HEADS_AND_EMBEDDINGS,
) -> list[TensorReport]:
    """Returns what `convert_checkpoint` would do with each tensor.

    Neither reads nor writes weights. Raises the same errors as `convert_checkpoint`.

    Args:
        src: a path for `open_checkpoint`.
        dtype: dtype of floating-point tensors; see `convert_checkpoint`.
        quant: format of the linear layers; see `convert_checkpoint`.
        to: library that stores them; see `convert_checkpoint`.
        skip: modules not to quantise; see `convert_checkpoint`.

    Example:
        >>> plan_conversion("SmolLM2-135M", quant="nf4")[0]  # doctest: +SKIP
        TensorReport(name='model.embed_tokens.weight', shape=(49152, 576),
                     source='bfloat16', result='bfloat16', nbytes=56623104, sqnr=None,
                     note='')
    """
    quant = None if quant is None else as_config(quant)
    jobs = plan.make_jobs(_open_source(src, dtype), dtype, quant, skip, to)
    return [job.report for job in jobs]


def _open_source(src: str | os.PathLike[str], dtype: str | None) -> Checkpoint:
    """Opens the source; without a dtype, quantised weights stay as they are stored."""
    source = open_checkpoint(src)
    return source if dtype is not None or source.stored is None else source.stored


def _make_header(
    source: Checkpoint, jobs: Sequence[Job]
) -> tuple[bytes, dict[str, int]]:
    """Returns the header of model.safetensors, and where each tensor starts."""
    infos = {name: info for job in jobs for name, info in job.outputs.items()}
    if len(infos) < sum(len(job.outputs) for job in jobs):
        raise CheckpointError(
            f"{source.path} cannot be quantised: it already has tensors with the names "
            "of the parts of quantised weights"
        )
    return safetensors_files.layout(infos, {"format": "pt", **source.metadata})


def _check_quantized(
    quantized: Mapping[str, QuantizedArray], jobs: Sequence[Job]
) -> None:
    """Raises ValueError for kernels that the planned tensors do not have room for."""
    planned = {job.report.name: job for job in jobs if job.config is not None}
    for name, q in quantized.items():
        if name not in planned:
            raise ValueError(
                f"quantized has {name!r}, which is not one of the {len(planned)} "
                "tensors that this conversion quantises"
            )
        config, shape = planned[name].config, planned[name].report.shape[::-1]
        assert config is not None
        want = config.quant_type, config.block_size, config.double_quant, shape
        got = q.quant_type, q.block_size, q.double_quant, q.shape
        if got != want or q.axis != -2:
            raise ValueError(
                f"quantized[{name!r}] is {q}; it must be {config.quant_type} of shape "
                f"{shape} with axis -2, block_size {config.block_size} and "
                f"double_quant={config.double_quant}"
            )


def _digest(quantized: Mapping[str, QuantizedArray]) -> str:
    """Returns a hash of all kernels, so that only the same ones resume."""
    total = hashlib.sha256()
    for name, q in sorted(quantized.items()):
        total.update(name.encode())
        for part in jax.tree.leaves(q):
            total.update(np.asarray(part).tobytes())
    return total.hexdigest()


def _make_pieces(
    source: Checkpoint,
    jobs: Sequence[Job],
    starts: Mapping[str, int],
    quantized: Mapping[str, QuantizedArray],
    writer: Writer,
) -> list[Piece]:
    return [
        Piece(
            job.report,
            [(starts[name], info.nbytes) for name, info in job.outputs.items()],
            functools.partial(
                _start, source, job, starts, quantized.get(job.report.name), writer
            ),
        )
        for job in jobs
    ]


def _start(
    source: Checkpoint,
    job: Job,
    starts: Mapping[str, int],
    quantized: QuantizedArray | None,
    writer: Writer,
) -> Finish:
    """Reads one tensor, and starts to quantise it if it is to be quantised."""
    name = job.report.name
    if job.config is None:
        return functools.partial(_finish_plain, source, job, starts[name])
    weight = cast_whole(source, name, source.read(name), job.dtype)
    if quantized is None:
        q, powers = quantize_weight(weight, job.config)
    else:
        q = dataclasses.replace(quantized, dtype=job.dtype)
        powers = compute_powers(jnp.asarray(weight), q.mT)

    def finish(write: Write) -> float:
        arrays = writer.make_arrays(name, q)
        for output in job.outputs:
            write(starts[output], arrays[output])
        return sqnr([powers])

    return finish


def _finish_plain(source: Checkpoint, job: Job, first: int, write: Write) -> None:
    """Casts and writes a tensor in chunks, from a byte of the file."""
    name = job.report.name
    for chunk in cast_chunks(source, name, source.read(name), job.dtype):
        write(first, chunk)
        first += chunk.nbytes


def _make_config(
    source: Checkpoint,
    jobs: Sequence[Job],
    dtype: str | None,
    quant: QuantConfig | None,
    writer: Writer,
) -> dict[str, Any]:
    """Returns the config of the new folder.

    Its field for the dtype is ``dtype`` since transformers 5, before ``torch_dtype``.
    """
    config = dict(source.config)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        config.pop("quantization_config", None)
    if quant is not None:
        if quant.compute_dtype is None:
            # Otherwise transformers computes in float32, whatever the model's dtype.
            compute_dtype = next(job.dtype for job in jobs if job.config is not None)
            quant = dataclasses.replace(quant, compute_dtype=compute_dtype)
        skip = plan.list_skipped_modules(jobs)
        config["quantization_config"] = writer.make_config(quant, skip)
    return config
