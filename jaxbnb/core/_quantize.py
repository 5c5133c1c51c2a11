"""quantize and dequantize: arrays to QuantizedArray and back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxbnb.core import formats
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core._scaled import quantize_scaled
from jaxbnb.core.parts import apply_or_eval_shape, is_divided, shard_like
from jaxbnb_kernels.matmul_int8 import quantize_rows
from jaxbnb_kernels.quantize_blockwise import quantize_absmax, quantize_blockwise


def quantize(
    x: Float[Array, "*shape"],
    quant_type: str,
    *,
    block_size: int | None = None,
    axis: int = -1,
    double_quant: bool = False,
) -> QuantizedArray:
    """Quantises ``x`` in blocks along ``axis``; see `QuantizedArray` for the layout.

    Leading axes are batch axes: a stack of matrices is quantised matrix by matrix. The
    last block of an axis may be short. Quantise the kernel of a dense layer,
    ``(in, out)``, along ``axis=-2``, the axis that products sum over. It then has the
    bytes that bitsandbytes makes of the torch weight whenever
    ``in % block_size == 0``.

    A non-finite element makes the absmax of its block non-finite, and so the whole
    block; with ``double_quant``, the whole matrix. It never becomes finite.

    Args:
        x: float32, bfloat16, float16 or float64; computed in float32. A
            ``jax.ShapeDtypeStruct`` gives an abstract result.
        quant_type: 4-bit format "nf4", "fp4" or "int4" (linear), or 8-bit format "int8"
            (linear), "fp8_e4m3", "fp8_e5m2", "dynamic8", "dynamic8_unsigned" (for
            non-negative values) or "llm_int8". The last is linear with one absmax for
            the whole axis and rounds like bitsandbytes; `jaxbnb.matmul` multiplies it
            as integers. The formats of other libraries' checkpoints store scales:
            "mxfp4", "nvfp4", "int4_scaled", "int8_scaled", "uint4" and "uint8" (with
            zero points) and "fp8_scaled".
        block_size: number of elements that share an absmax, even; None for 64, or what
            the format has: 32 for ``mxfp4``, 16 for ``nvfp4``, 128 for ``fp8_scaled``.
            Must be None for ``llm_int8``.
        axis: axis that blocks run along.
        double_quant: quantise the absmax too, to 8 bits in blocks of 256; not for
            ``llm_int8``, or formats that store scales.

    Raises:
        TypeError: ``x`` is not a floating-point array.
        ValueError: unknown ``quant_type``, bad ``block_size`` or ``double_quant``,
            ``axis`` out of range; or ``x`` has negative values, and ``quant_type`` no
            level for them. Under `jax.jit`, where values are not known, they become 0.

    Example:
        >>> import jax, jaxbnb
        >>> x = jax.random.normal(jax.random.key(0), (8, 1024, 512))
        >>> q = jaxbnb.quantize(x, "nf4", axis=-2, double_quant=True)
        >>> q.shape, q[0].shape, round(q.bits_per_param, 3), q.nbytes
        ((8, 1024, 512), (1024, 512), 4.127, 2163744)

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023 (nf4).
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021 (dynamic8).
        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale, 2022 (llm_int8).
        Micikevicius et al., FP8 Formats for Deep Learning, 2022 (fp8).
        Rouhani et al., OCP Microscaling Formats (MX) Specification, 2023 (mxfp4).
    """
    formats.codebook(quant_type)
    block_size = formats.choose_block_size(quant_type, block_size)
    formats.check_double_quant(quant_type, double_quant)
    if isinstance(x, QuantizedArray):
        raise TypeError(f"x is quantised already, {x}; decode it with dequantize()")
    is_torch = type(x).__module__.partition(".")[0] == "torch"
    if is_torch or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = getattr(x, "dtype", type(x).__name__)
        todo = "cast it first, e.g. with jnp.asarray(x, jnp.float32)"
        if hasattr(x, "unbox"):
            todo = "take it out of its box first, with flax.linen.unbox"
        elif is_torch:
            todo = "make it a NumPy array first, with x.detach().float().cpu().numpy()"
        raise TypeError(
            f"quantize needs an array of a floating dtype, got {got}; {todo}"
        )
    if x.ndim == 0:
        raise ValueError("quantize needs at least one axis to block; got a scalar")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of shape {x.shape}")
    axis = axis - x.ndim if axis >= 0 else axis
    is_known = not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
    if quant_type == formats.UNSIGNED and is_known and bool(jnp.any(x < 0)):
        raise ValueError(
            f"{quant_type!r} has no negative levels, and x has negative values; use "
            "'dynamic8'"
        )
    settings = quant_type, block_size, axis, double_quant
    if is_divided(x):
        return _quantize_divided(x, *settings)
    quantized = apply_or_eval_shape(lambda x: _quantize(x, *settings), x)
    return shard_like(quantized, x)


def dequantize(
    q: QuantizedArray, dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*shape"]:
    """Decodes a quantised array; the same as ``q.dequantize(dtype)``.

    Args:
        q: quantised array, as `quantize` returns it.
        dtype: dtype of the result; None for the dtype that was quantised.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> jaxbnb.dequantize(jaxbnb.quantize(jnp.ones(4), "int8"), jnp.bfloat16)
        Array([1, 1, 1, 1], dtype=bfloat16)
    """
    return q.dequantize(dtype)


def _quantize_divided(
    x: Array, quant_type: str, block_size: int | None, axis: int, double_quant: bool
) -> QuantizedArray:
    """Quantises an array on a mesh to the same bits, and divides its parts likewise."""
    home: Any = x.sharding
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)

    def find_shardings(function: Callable[[Any], Any], x: Any) -> Any:
        shapes = shard_like(jax.eval_shape(function, x), like)
        return jax.tree.map(lambda part: part.sharding, shapes)

    def encode(x):
        return _quantize(x, quant_type, block_size, axis, False)

    q = jax.jit(encode, out_shardings=find_shardings(encode, x))(x)
    if not double_quant:
        return q
    # The mean of divided absmax would add up the devices' sums, and round differently.
    everywhere = NamedSharding(home.mesh, PartitionSpec())
    absmax, nested_absmax, offset = quantize_absmax(
        jax.device_put(q.absmax, everywhere)
    )
    q = dataclasses.replace(
        q, absmax=absmax, nested_absmax=nested_absmax, offset=offset
    )
    return jax.device_put(q, find_shardings(lambda q: q, q))


# Jitted even when called eagerly. Op by op, each step of the encoder would hold a
# temporary, and it would take twenty times as long.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    x: Array, quant_type: str, block_size: int | None, axis: int, double_quant: bool
) -> QuantizedArray:
    rows = jnp.moveaxis(x, axis, -1)
    static: Any = {
        "quant_type": quant_type,
        "axis": axis,
        "axis_size": x.shape[axis],
        "dtype": np.dtype(x.dtype),
    }
    if quant_type in formats.SCALED and block_size is not None:
        parts = quantize_scaled(rows, quant_type, block_size)
        return QuantizedArray(offset=None, block_size=block_size, **parts, **static)
    if block_size is None:
        size = x.shape[axis]
        block_size = formats.whole_axis_block_size(size)
        codes, scale = quantize_rows(rows)
        # An empty row does not have any block.
        absmax = scale[..., None][..., :size]
    else:
        codes, absmax = quantize_blockwise(
            rows, formats.codebook(quant_type), block_size=block_size
        )
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = quantize_absmax(absmax)
    return QuantizedArray(
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        block_size=block_size,
        **static,
    )
