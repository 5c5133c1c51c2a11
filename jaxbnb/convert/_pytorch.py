"""PyTorch's own files of weights: a zip archive whose pickle is not to be trusted.

torch reads them, without running what a pickle may ask for, and maps the bytes rather
than reading them all.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    QuantizedTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.core.extras import import_extra

# By the names of torch's dtypes.
_DTYPES: Final = {
    f"torch.{np.dtype(dtype).name}": np.dtype(dtype)
    for dtype in (
        *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
        *(np.int64, np.int32, np.int16, np.int8),
        *(np.uint8, np.bool_),
    )
}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a ``pytorch_model.bin``, in its order.

    Raises:
        ImportError: torch is not installed.
        CheckpointError: it is no such file, is damaged, or asks to run code.
        UnsupportedCheckpointError: made by a torch before 1.6, or a dtype or layout
            that NumPy does not have.
    """
    return {name: _info(path, name, value) for name, value in _load(path).items()}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads one tensor; the file is mapped for this read only."""
    tensors = _load(path)
    if name not in tensors:
        raise MissingTensorError(f"{path} changed: it has no tensor {name!r} any more")
    info, tensor = _info(path, name, tensors[name]), tensors[name].contiguous()
    if info.dtype == ml_dtypes.bfloat16:
        import torch

        # NumPy has no bfloat16 of torch's, but it has its bits.
        tensor = tensor.view(torch.int16)
    # A copy: the mapping ends with this function.
    return np.array(tensor.numpy()).view(info.dtype)


def _load(path: Path) -> dict[str, Any]:
    torch = import_extra("torch", needed_by=f"reading {path.name}")
    if not _is_zip(path):
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"\x80\x02":
            raise UnsupportedCheckpointError(
                f"{path} was saved by torch before 1.6, or is a bare pickle, which is "
                "not read because it may hold code. Save it again as safetensors"
            )
        raise CheckpointError(
            f"{path} is truncated or no file of torch's: it is no zip archive; "
            "download it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                # torch compresses nothing; what is compressed may be a bomb.
                raise CheckpointError(f"{path} is compressed, which torch never does")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own text has colours, and advice that would run the code.
        named = re.search(r"(?a:GLOBAL ([\w.]{1,100}))", str(error))
        wanted = f" and asks for {named[1].rstrip('.')}" if named else ""
        raise CheckpointError(
            f"{path} holds more than tensors{wanted}, which could run code when it is "
            "read, so it is not read. If it is your file, save model.state_dict() "
            "instead, or safetensors. If it is a stranger's, do not use this checkpoint"
        ) from error
    except CheckpointError:
        raise
    # Whatever torch raises on a damaged file: it has no error of its own for that.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, no state_dict")
    strange = [
        key
        for key, value in found.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"{path} is no plain state_dict: {str(strange[:5])[:200]} are not tensors "
            "under names. Save model.state_dict() itself"
        )
    return found


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _info(path: Path, name: str, tensor: Any) -> TensorInfo:
    strided = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
    if str(tensor.dtype).startswith(("torch.float8", "torch.float4")):
        raise QuantizedTensorError(path, name, str(tensor.dtype))
    dtype = _DTYPES.get(str(tensor.dtype))
    if dtype is None or not strided or tensor.device.type != "cpu":
        raise UnsupportedCheckpointError(
            f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}; jaxbnb reads dense tensors of {sorted(_DTYPES)}"
        )
    info = TensorInfo(tuple(tensor.shape), dtype)
    # By strides of zero a file of some bytes can say that it holds terabytes.
    if info.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {info.shape} has more elements than the "
            "file has for it; save it again after .contiguous()"
        )
    return info
