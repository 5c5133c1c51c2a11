"""convert_checkpoint: any checkpoint that we open, to a Hugging Face folder."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert import _huggingface, _safetensors
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError
from jaxbnb.convert._gguf_tokenizer import save_tokenizer
from jaxbnb.convert._open import open_checkpoint
from jaxbnb.core._files import atomic_folder

Progress = Callable[[int, int, str], object]

DTYPES: Final[dict[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_FLOATS: Final = (*DTYPES.values(), np.dtype(np.float64))
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Elements cast at a time: 16 MiB of float32, however large the tensor.
_CHUNK: Final = 2**22


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Writes a checkpoint as a Hugging Face folder, one tensor in memory at a time.

    ``dst`` appears only when it is complete: it holds config.json, one
    model.safetensors, and the tokenizer that the source has.

    Args:
        src: what `open_checkpoint` opens.
        dst: the folder to make; nothing, or an empty folder, is there.
        dtype: "float32", "bfloat16" or "float16" for the floating tensors; None keeps
            each as it is (quantised GGUF tensors become float32).
        progress: called as ``progress(done_bytes, total_bytes, name)`` as bytes of the
            tensor ``name`` are written.

    Returns:
        ``dst``, opened.

    Raises:
        ValueError: ``dtype`` is none of these.
        CheckpointError: the source cannot be read, or has finite values beyond the
            range of ``dtype``.
        FileExistsError: ``dst`` is there already.
        OSError: writing failed, e.g. on a full disk. Nothing is left behind.

    Example:
        >>> convert_checkpoint("m.gguf", "m", dtype="bfloat16")  # doctest: +SKIP
        Checkpoint('m', 'llama', 272 tensors, 269.1 MB)
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype!r}")
    source = open_checkpoint(src)
    if dtype is not None and "quantization_config" in source.config:
        raise UnsupportedCheckpointError(
            f"{source.path} is quantised; casting its codes and scales to {dtype} "
            "would ruin them. Leave dtype out to copy it as it is"
        )
    tensors = _cast_infos(source.tensors, dtype)
    with atomic_folder(dst) as folder:
        _safetensors.write_file(
            folder / _huggingface.WEIGHTS,
            tensors,
            _reporting(source, tensors, progress),
        )
        text = json.dumps(_config(source.config, dtype), indent=2, ensure_ascii=False)
        (folder / _huggingface.CONFIG).write_text(text + "\n", encoding="utf-8")
        _carry_tokenizer(source, folder)
    return open_checkpoint(dst)


def _cast_infos(
    tensors: Mapping[str, TensorInfo], dtype: str | None
) -> dict[str, TensorInfo]:
    if dtype is None:
        return dict(tensors)
    return {
        name: TensorInfo(info.shape, DTYPES[dtype]) if info.dtype in _FLOATS else info
        for name, info in tensors.items()
    }


def _reporting(
    source: Checkpoint, tensors: Mapping[str, TensorInfo], progress: Progress | None
) -> Callable[[str], Iterator[np.ndarray]]:
    """What to write of a tensor, piece by piece, with a report after each."""
    total, done = sum(info.nbytes for info in tensors.values()), 0

    def chunks(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        flat = source.read(name).reshape(-1)
        for first in range(0, flat.size, _CHUNK):
            chunk = _cast(
                source, name, flat[first : first + _CHUNK], tensors[name].dtype
            )
            yield chunk
            done += chunk.nbytes
            if progress is not None:
                progress(done, total, name)

    return chunks


def _cast(
    source: Checkpoint, name: str, values: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Rounds to ``dtype``; a finite value never becomes infinite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    lost = np.isfinite(values) & ~np.isfinite(cast)
    if lost.any():
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has {values[lost][0]:.4g}, beyond "
            f"{dtype.name}'s largest, {float(ml_dtypes.finfo(dtype).max):.4g}; convert "
            "it to another dtype"
        )
    return cast


def _config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config of the new folder; transformers 5 says dtype, 4 said torch_dtype."""
    if dtype is None:
        return config
    return config | {"dtype" if "dtype" in config else "torch_dtype": dtype}


def _carry_tokenizer(source: Checkpoint, folder: Path) -> None:
    if source.path.is_dir():
        for name in _TOKENIZER_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        return
    try:
        save_tokenizer(source.path, folder)
    except (ImportError, UnsupportedCheckpointError) as error:
        warnings.warn(f"wrote no tokenizer: {error}", stacklevel=3)
