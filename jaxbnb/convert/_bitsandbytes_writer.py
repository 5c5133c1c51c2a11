"""Writes quantised kernels as the arrays that bitsandbytes stores."""

import json
from typing import Any

import numpy as np

from jaxbnb.convert._bitsandbytes_weights import (
    CODEBOOKS,
    NESTED_BLOCK_SIZE,
    STATE_INFIX,
)
from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.formats import LLM_INT8
from jaxbnb.core.parts import check_parts
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED


def plan_arrays(
    name: str, info: TensorInfo, config: QuantConfig
) -> dict[str, TensorInfo]:
    """Returns the arrays of a weight ``(out, in)`` quantised to ``config``.

    The JSON of its state is padded with spaces, so that its length is known before its
    values are.
    """
    rows, size = info.shape
    uint8, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    if config.quant_type == LLM_INT8:
        module = name.removesuffix("weight")
        return {
            name: TensorInfo(info.shape, np.dtype(np.int8)),
            f"{module}SCB": TensorInfo((rows,), float32),
            f"{module}weight_format": TensorInfo((), uint8),
        }
    assert config.block_size is not None
    blocks = rows * size // config.block_size
    infos = {
        f"{name}.absmax": TensorInfo(
            (blocks,), uint8 if config.double_quant else float32
        ),
        f"{name}.quant_map": TensorInfo((16,), float32),
    }
    if config.double_quant:
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        infos[f"{name}.nested_absmax"] = TensorInfo((nested,), float32)
        infos[f"{name}.nested_quant_map"] = TensorInfo((256,), float32)
    # The repr of a float has at most 24 characters.
    text = _make_state(info, config, offset=-1.2345678901234567e-300)
    infos[f"{name}{STATE_INFIX}{config.quant_type}"] = TensorInfo((len(text),), uint8)
    infos[name] = TensorInfo((rows * size // 2, 1), uint8)
    return infos


def make_arrays(name: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    """Returns the arrays that `plan_arrays` announces, from a kernel ``(in, out)``."""
    check_parts(q)
    size, rows = q.shape
    codes, absmax = np.asarray(q.codes), np.asarray(q.absmax)
    if q.quant_type == LLM_INT8:
        module = name.removesuffix("weight")
        return {
            name: codes,
            f"{module}SCB": absmax.reshape(-1),
            f"{module}weight_format": np.zeros((), np.uint8),
        }
    info = TensorInfo((rows, size), np.dtype(q.dtype))
    config = QuantConfig(q.quant_type, q.block_size, q.double_quant)
    offset = None if q.offset is None else float(q.offset)
    arrays = {
        f"{name}.absmax": absmax.reshape(-1),
        f"{name}.quant_map": CODEBOOKS[q.quant_type],
    }
    if q.nested_absmax is not None:
        arrays[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax).reshape(-1)
        arrays[f"{name}.nested_quant_map"] = DYNAMIC8_SIGNED
    key = f"{name}{STATE_INFIX}{q.quant_type}"
    length = plan_arrays(name, info, config)[key].shape[0]
    text = _make_state(info, config, offset).ljust(length)
    arrays[key] = np.frombuffer(text, np.uint8)
    arrays[name] = codes.reshape(-1, 1)
    return arrays


def _make_state(info: TensorInfo, config: QuantConfig, offset: float | None) -> bytes:
    fields: dict[str, Any] = {
        "quant_type": config.quant_type,
        "blocksize": config.block_size,
        "dtype": info.dtype.name,
        "shape": list(info.shape),
    }
    if config.double_quant:
        fields |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return json.dumps(fields).encode()
