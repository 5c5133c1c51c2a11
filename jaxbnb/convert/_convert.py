"""convert_checkpoint: any checkpoint that we open, to a Hugging Face folder."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxbnb.convert import (
    _bitsandbytes_weights,
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
from jaxbnb.convert.weights import cast_chunks, cast_whole, quantize_weight, sqnr
from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.core.files import check_outside, resumable_folder


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quant: QuantConfig | str | None = None,
    skip: str | Sequence[str] = HEADS_AND_EMBEDDINGS,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> Checkpoint:
    """Writes a checkpoint as a Hugging Face folder, tensor by tensor.

    In memory are one that is read and the codes of the one before, which are written.
    ``dst`` appears only when it is complete: it holds config.json, one
    model.safetensors, and the tokenizer that the source has. Interrupted or killed, the
    same call goes on where it was: what it has written lies beside ``dst``, in
    ``.<name>.resume.partial``.

    With ``quant`` the linear layers are written as bitsandbytes writes them, and
    config.json has the ``quantization_config`` by which transformers loads them with
    bitsandbytes; the bytes are those that bitsandbytes makes of the same values.

    Args:
        src: what `open_checkpoint` opens.
        dst: the folder to make; nothing, or an empty folder, is there.
        dtype: "float32", "bfloat16" or "float16" for the floating tensors; None keeps
            each as it is (quantised GGUF tensors become float32, and what bitsandbytes
            quantised is copied byte for byte). With a dtype what is quantised is
            decoded.
        quant: format of the linear layers: "nf4", "fp4" or "llm_int8", or a
            `jaxbnb.QuantConfig` of one of them; None to quantise nothing. A matrix
            whose rows a block does not divide is left as it is.
        skip: modules not to quantise: names, each a whole dotted path or its last
            parts, or one regular expression for the whole path. Output heads and
            embeddings by default.
        progress: called as ``progress(done_bytes, total_bytes, name)`` as bytes of the
            tensor ``name`` are written.
        report: called with the `TensorReport` of each tensor once it is written.

    Returns:
        ``dst``, opened.

    Raises:
        ValueError: ``dtype`` is none of these, transformers has no such ``quant``,
            there is nothing to quantise, or ``dst`` is inside ``src``.
        CheckpointError: the source cannot be read, or has finite values beyond the
            range of ``dtype``.
        FileExistsError: ``dst`` is there already.
        BlockingIOError: another process is writing it.
        OSError: writing failed, e.g. on a full disk. Nothing is left behind.

    Example:
        >>> convert_checkpoint("m.gguf", "m", quant="nf4")  # doctest: +SKIP
        Checkpoint('m', 'llama', 272 tensors, 173.6 MB)
    """
    quant = None if quant is None else as_config(quant)
    source = _opened(src, dtype)
    check_outside(src, dst)
    jobs = plan.make(source, dtype, quant, skip)
    header, starts = _layout(source, jobs)
    options = {"to": "safetensors", "dtype": dtype, "quant": quant, "skip": skip}
    mark = journal.fingerprint(source.path, header, options)
    resumes = (huggingface_folder.WEIGHTS, journal.NAME)
    with resumable_folder(dst, mark=mark, resumes=resumes) as folder:
        pieces = _pieces(source, jobs, starts)
        write_pieces(
            folder / huggingface_folder.WEIGHTS, header, pieces, progress, report
        )
        (folder / journal.NAME).unlink()
        if source.config:
            config = _config(source, jobs, dtype, quant)
            write_json(folder / huggingface_folder.CONFIG, config)
        carry_tokenizer(source, folder)
    dst = Path(dst)
    return open_checkpoint(dst if source.config else dst / huggingface_folder.WEIGHTS)


def plan_conversion(
    src: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quant: QuantConfig | str | None = None,
    skip: str | Sequence[str] = HEADS_AND_EMBEDDINGS,
) -> list[TensorReport]:
    """What `convert_checkpoint` would do with each tensor; reads and writes no weights.

    Args:
        src: as of `convert_checkpoint`; so are the others, and what is raised.
        dtype: of the floating tensors.
        quant: format of the linear layers.
        skip: modules not to quantise.

    Example:
        >>> plan_conversion("SmolLM2-135M", quant="nf4")[0]  # doctest: +SKIP
        TensorReport(name='model.embed_tokens.weight', shape=(49152, 576),
                     source='bfloat16', result='bfloat16', nbytes=56623104, sqnr=None,
                     note='')
    """
    quant = None if quant is None else as_config(quant)
    jobs = plan.make(_opened(src, dtype), dtype, quant, skip)
    return [job.report for job in jobs]


def _opened(src: str | os.PathLike[str], dtype: str | None) -> Checkpoint:
    """The source; what is quantised, as it is stored where nothing is to be cast."""
    source = open_checkpoint(src)
    return source if dtype is not None or source.stored is None else source.stored


def _layout(source: Checkpoint, jobs: Sequence[Job]) -> tuple[bytes, dict[str, int]]:
    """Returns the header of model.safetensors, and where each tensor starts."""
    infos = {name: info for job in jobs for name, info in job.outputs.items()}
    if len(infos) < sum(len(job.outputs) for job in jobs):
        raise CheckpointError(
            f"{source.path} has tensors under the names that bitsandbytes gives the "
            "parts of others; it cannot be quantised"
        )
    return safetensors_files.layout(infos)


def _pieces(
    source: Checkpoint, jobs: Sequence[Job], starts: Mapping[str, int]
) -> list[Piece]:
    return [
        Piece(
            job.report,
            [(starts[name], info.nbytes) for name, info in job.outputs.items()],
            functools.partial(_start, source, job, starts),
        )
        for job in jobs
    ]


def _start(source: Checkpoint, job: Job, starts: Mapping[str, int]) -> Finish:
    """Starts to make of one tensor what is written of it."""
    name = job.report.name
    if job.config is None:
        return functools.partial(_finish_plain, source, job, starts[name])
    weight = cast_whole(source, name, source.read(name), job.dtype)
    q, powers = quantize_weight(weight, job.config)

    def finish(write: Write) -> float:
        made = _bitsandbytes_weights.arrays(name, q)
        for output in job.outputs:
            write(starts[output], made[output])
        return sqnr([powers])

    return finish


def _finish_plain(source: Checkpoint, job: Job, first: int, write: Write) -> None:
    """Writes a tensor in chunks, from a byte of the file."""
    name = job.report.name
    for chunk in cast_chunks(source, name, source.read(name), job.dtype):
        write(first, chunk)
        first += chunk.nbytes


def _config(
    source: Checkpoint,
    jobs: Sequence[Job],
    dtype: str | None,
    quant: QuantConfig | None,
) -> dict[str, Any]:
    """The config of the new folder; transformers 5 says dtype, 4 said torch_dtype."""
    config = dict(source.config)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        config.pop("quantization_config", None)
    if quant is not None:
        if quant.compute_dtype is None:
            # Else transformers computes in float32, whatever the model's dtype.
            made = next(job.dtype for job in jobs if job.config is not None)
            quant = dataclasses.replace(quant, compute_dtype=made)
        skip = plan.skipped_modules(jobs)
        config["quantization_config"] = quant.to_huggingface(skip=skip)
    return config
