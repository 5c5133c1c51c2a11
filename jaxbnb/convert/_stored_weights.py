"""Presents the arrays of each quantised weight of a checkpoint as one tensor."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import jax
import numpy as np

from jaxbnb.convert._bitsandbytes_weights import DTYPES
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.formats import LLM_INT8

INT32: Final = (np.dtype(np.int32),)
# The dtypes that scales are stored in.
FLOATS: Final = tuple(DTYPES.values())


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight that a file stores as several arrays.

    Attributes:
        info: shape and dtype of the weight when it is decoded.
        parts: names of its arrays.
        read: reads the arrays and decodes them.
        config: format that holds the weight exactly, or None.
        read_quantized: reads the arrays as a kernel ``(in, out)`` of ``config``.
        encoding: name of a format that no ``config`` holds exactly, e.g. "gptq".
    """

    info: TensorInfo
    parts: tuple[str, ...]
    read: Callable[[], np.ndarray]
    config: QuantConfig | None = None
    read_quantized: Callable[[], QuantizedArray] | None = None
    encoding: str = ""


# What a reader of a method finds: weights by name, and tensors that none needs.
Found = tuple[dict[str, StoredWeight], list[str]]


def present(
    checkpoint: Checkpoint,
    weights: Mapping[str, StoredWeight],
    ignored: Collection[str] = (),
) -> Checkpoint:
    """Returns the checkpoint with one tensor for each weight, instead of its arrays.

    Args:
        checkpoint: tensors as they are stored.
        weights: weights by name. A weight takes the place of its first array.
        ignored: names of tensors that no weight needs.
    """
    tensors = checkpoint.tensors
    names = {part: name for name, weight in weights.items() for part in weight.parts}
    infos: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in names:
            infos.setdefault(names[name], weights[names[name]].info)
        elif name not in ignored:
            infos[name] = info

    def read(name: str) -> np.ndarray:
        return weights[name].read() if name in weights else checkpoint.read(name)

    def read_quantized(name: str) -> QuantizedArray:
        reader = weights[name].read_quantized
        assert reader is not None
        return reader()

    quantized = {n: w.config for n, w in weights.items() if w.config is not None}
    encodings = {
        name: (
            weight.encoding if weight.config is None else weight.config.quant_type,
            sum(tensors[part].nbytes for part in weight.parts if part in tensors),
        )
        for name, weight in weights.items()
    }
    return dataclasses.replace(
        checkpoint,
        tensors=types.MappingProxyType(infos),
        reader=read,
        quantized=types.MappingProxyType(quantized),
        quantized_reader=read_quantized,
        stored=checkpoint,
        encodings=types.MappingProxyType(encodings),
        metadata=types.MappingProxyType({}),
    )


def hold(
    info: TensorInfo,
    parts: tuple[str, ...],
    config: QuantConfig,
    read: Callable[[], Mapping[str, Any]],
) -> StoredWeight:
    """Makes a weight ``(out, in)`` that a format holds exactly.

    Args:
        info: shape and dtype of the weight when it is decoded.
        parts: names of its arrays.
        config: the format.
        read: reads the parts of a `QuantizedArray` of the kernel.
    """

    def read_quantized() -> QuantizedArray:
        fields: dict[str, Any] = {
            "nested_absmax": None,
            "offset": None,
            "quant_type": config.quant_type,
            "block_size": config.block_size,
            "axis": -2,
            "axis_size": info.shape[-1],
            "dtype": info.dtype,
        }
        return QuantizedArray(**fields | dict(read()))

    return StoredWeight(
        info, parts, functools.partial(decode, read_quantized), config, read_quantized
    )


def multiply_integers(weight: StoredWeight) -> StoredWeight:
    """Returns a weight in ``int8_scaled``, with a scale for each row, as ``llm_int8``.

    Products then round each row of the input, and there are no outliers.

    The absmax is 127 times the scale, which is exact for scales of 16 bits. Decoded in
    that format, elements are rounded in another order than ``weight.read`` does.
    """
    read_scaled = weight.read_quantized
    assert read_scaled is not None

    def read_quantized() -> QuantizedArray:
        q = read_scaled()
        parts: dict[str, Any] = {
            "codes": (np.asarray(q.codes) - np.uint8(128)).view(np.int8),
            "absmax": np.asarray(q.absmax) * np.float32(127),
        }
        return dataclasses.replace(q, quant_type=LLM_INT8, **parts)

    config = QuantConfig(LLM_INT8, outlier_threshold=0.0)
    return dataclasses.replace(weight, config=config, read_quantized=read_quantized)


def decode(read_quantized: Callable[[], QuantizedArray]) -> np.ndarray:
    """Decodes a kernel to a weight ``(out, in)``."""
    decoded = dataclasses.replace(read_quantized(), axis=-1).dequantize()
    return np.asarray(jax.device_get(decoded))


def read_dtype(checkpoint: Checkpoint, default: np.dtype) -> np.dtype:
    """Returns the dtype of a config's model, or a default."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return DTYPES.get(str(name), default)


class Arrays:
    """The arrays of one module in a checkpoint, which are checked before they are read.

    Args:
        checkpoint: tensors as they are stored.
        module: what the names of the arrays begin with, up to a dot or a separator.
    """

    def __init__(self, checkpoint: Checkpoint, module: str):
        self.checkpoint, self.module = checkpoint, module
        self.names: list[str] = []

    def info(self, name: str) -> TensorInfo | None:
        """Returns the shape and dtype of an array, or None if there is none."""
        return self.checkpoint.tensors.get(self.module + name)

    def require(
        self, name: str, dtypes: Collection[np.dtype], shape: tuple[int | None, ...]
    ) -> tuple[int, ...]:
        """Returns the shape of an array.

        Args:
            name: last part of its name.
            dtypes: dtypes that it may have.
            shape: size of each axis; None for any positive size.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        info = self.info(name)
        self.names.append(self.module + name)
        if (
            info is None
            or info.dtype not in dtypes
            or len(info.shape) != len(shape)
            or 0 in info.shape
            or any(n not in (None, m) for n, m in zip(shape, info.shape, strict=True))
        ):
            want = " or ".join(str(dtype) for dtype in dtypes)
            sizes = ", ".join("n" if n is None else str(n) for n in shape)
            got = "missing" if info is None else f"{info.dtype}{list(info.shape)}"
            raise CheckpointError(
                f"{self.checkpoint.path}: {self.module + name!r} must be {want} of "
                f"shape [{sizes}], to agree with the config and the other arrays of "
                f"the quantised weight; it is {got}"
            )
        return info.shape

    def require_size(self, name: str, dtypes: Collection[np.dtype], size: int) -> None:
        """Raises CheckpointError unless an array of any shape has ``size`` elements."""
        info = self.info(name)
        shape = () if info is None else info.shape
        if math.prod(shape) != size:
            shape = (size,)
        self.require(name, dtypes, shape)

    def read(self, name: str) -> np.ndarray:
        """Reads an array."""
        return self.checkpoint.read(self.module + name)

    def fail(self, problem: str) -> CheckpointError:
        """Returns an error that names the module."""
        name = self.module.rstrip("._")
        return CheckpointError(f"{self.checkpoint.path}: {name!r} {problem}")
