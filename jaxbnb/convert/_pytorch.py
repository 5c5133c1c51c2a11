"""PyTorch's files of weights: zip archives with a pickle, which cannot be trusted.

torch reads them with ``weights_only``, so that the pickle cannot run code, and maps the
file instead of reading all of it.
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

# NumPy dtypes by the names of torch's dtypes.
_DTYPES: Final = {
    f"torch.{np.dtype(dtype).name}": np.dtype(dtype)
    for dtype in (
        *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
        *(np.int64, np.int32, np.int16, np.int8),
        *(np.uint8, np.bool_),
    )
}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of a ``pytorch_model.bin``, in its order.

    Raises:
        ImportError: torch is not installed.
        CheckpointError: the file is of another kind, is damaged, or asks to run code.
        UnsupportedCheckpointError: the file was written by a torch before 1.6, or has a
            dtype or layout that NumPy lacks.
    """
    return {name: _check(path, name, value) for name, value in _load(path).items()}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """Reads one tensor; the file is mapped for this read only."""
    tensors = _load(path)
    if name not in tensors:
        raise MissingTensorError(f"{path} has changed: tensor {name!r} is gone")
    info, tensor = _check(path, name, tensors[name]), tensors[name].contiguous()
    if info.dtype == ml_dtypes.bfloat16:
        import torch

        # torch cannot convert bfloat16 to NumPy, but it can convert its bits.
        tensor = tensor.view(torch.int16)
    # A copy, because the mapping ends with this function.
    return np.array(tensor.numpy()).view(info.dtype)


def _load(path: Path) -> dict[str, Any]:
    torch = import_extra("torch", needed_by=f"reading {path.name}")
    if not _is_zip(path):
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"\x80\x02":
            raise UnsupportedCheckpointError(
                f"{path} was saved by torch before 1.6, or is a bare pickle, which is "
                "not read because it may contain code. Save it again as safetensors"
            )
        raise CheckpointError(
            f"{path} is truncated or was not written by torch: it is not a zip "
            "archive; download it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                # torch does not compress. A compressed file may be a zip bomb.
                raise CheckpointError(
                    f"{path} is compressed, but torch never compresses its files; do "
                    "not use this checkpoint"
                )
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's message has colours, and advice that would run the code.
        named = re.search(r"(?a:GLOBAL ([\w.]{1,100}))", str(error))
        wanted = f" and asks for {named[1].rstrip('.')}" if named else ""
        raise CheckpointError(
            f"{path} contains more than tensors{wanted}, which could run code, so it "
            "is not read. If it is your file, save model.state_dict() instead, or "
            "safetensors. If it is a stranger's, do not use this checkpoint"
        ) from error
    except CheckpointError:
        raise
    # torch has no specific error for a damaged file, and may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} contains a {type(loaded).__name__} instead of a state_dict"
        )
    strange = [
        key
        for key, value in loaded.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"{path} is not a plain state_dict: {str(strange[:5])[:200]} are not named "
            "tensors. Save model.state_dict() itself"
        )
    return loaded


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _check(path: Path, name: str, tensor: Any) -> TensorInfo:
    is_strided = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
    if str(tensor.dtype).startswith(("torch.float8", "torch.float4")):
        raise QuantizedTensorError(path, name, str(tensor.dtype))
    dtype = _DTYPES.get(str(tensor.dtype))
    if dtype is None or not is_strided or tensor.device.type != "cpu":
        raise UnsupportedCheckpointError(
            f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}; jaxbnb reads dense tensors of {sorted(_DTYPES)}"
        )
    info = TensorInfo(tuple(tensor.shape), dtype)
    # With strides of zero, a tiny file could claim to hold terabytes.
    if info.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {info.shape} has more elements than the "
            "file stores for it; save it again after .contiguous()"
        )
    return info
