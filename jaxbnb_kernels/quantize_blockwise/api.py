"""quantize_blockwise and dequantize_blockwise: arguments, checks, implementation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jaxbnb_kernels import _selection
from jaxbnb_kernels.quantize_blockwise import kernels, reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": kernels,
    "cpu": kernels,
    "xla": xla,
    "reference": reference,
}


def quantize_blockwise(
    x: Float[Array, "*batch n"],
    codebook: np.ndarray | None,
    *,
    block_size: int,
    implementation: str | None = None,
) -> tuple[Integer[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    r"""Quantises blocks of ``block_size`` elements along the last axis.

    .. math::
        a_b = \max_{i \in b} |x_i|, \qquad
        c_i = \arg\min_c \left| \mathrm{codebook}_c - x_i / a_b \right|

    A tie between two levels goes to the lower one. Zero gets the level zero. A block
    with a non-finite element has a non-finite absmax, so it never decodes to finite
    values. The last block may be short.

    Args:
        x: float32, bfloat16 or float16 array; computation is in float32.
        codebook: 16 levels (two codes a byte, first element in the high nibble),
            256 levels (a byte each), or None for linear int8, ``round(127 x / a)``.
        block_size: elements that share one absmax.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu" (a
            kernel for GPUs, for codebooks and for blocks of 32, 64, ... 4096),
            or None to choose.

    Returns:
        ``(codes, absmax)``: uint8 codes ``(*batch, ceil(n / 2))`` or ``(*batch, n)``
        (int8 where the codebook is None), and float32 absmax
        ``(*batch, ceil(n / block_size))``.

    Raises:
        TypeError: ``x`` is not of a floating dtype.
        ValueError: ``x`` is a scalar, ``block_size`` is not a positive even number, or
            the codebook has neither 16 nor 256 levels.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.codebooks import NF4
        >>> codes, absmax = quantize_blockwise(jnp.array([0., -2., 2., 1.]), NF4,
        ...                                    block_size=4)
        >>> [hex(c) for c in codes.tolist()], absmax.tolist()
        (['0x70', '0xfc'], [2.0])
    """
    _check(codebook, block_size)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"quantize_blockwise needs a floating dtype, got {x.dtype}; "
            "cast it, e.g. x.astype(jnp.float32)"
        )
    if x.ndim == 0:
        raise ValueError("quantize_blockwise needs at least one axis; got a scalar")
    functions = {name: module.quantize for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "quantize_blockwise", functions, implementation, x, codebook, block_size
    )


def dequantize_blockwise(
    codes: Integer[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    codebook: np.ndarray | None,
    *,
    block_size: int,
    size: int,
    nested: tuple[Float32[Array, "*outer nested"], Float32[Array, "*outer"]]
    | None = None,
    zero_point: UInt8[Array, "*batch blocks"] | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "*batch {size}"]:
    """Decodes the result of `quantize_blockwise`.

    Multiplies level and absmax in float32, and rounds once to ``dtype``. A zero point
    is subtracted from the level before.

    Args:
        codes: codes from `quantize_blockwise`.
        absmax: one number per block: float32, or uint8 if nested.
        codebook: codebook that the codes index.
        block_size: elements that share one absmax.
        size: elements of the last axis (an odd count leaves half a byte unused).
        nested: ``(nested_absmax, offset)`` of a doubly quantised array, from
            `quantize_absmax`; or None.
        zero_point: number per block that is subtracted from its levels, in the shape of
            ``absmax``; or None. No kernel supports it.
        dtype: dtype of the result.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu" (a
            kernel for GPUs, for codebooks and for blocks of 32, 64, ... 4096),
            or None to choose.

    Returns:
        ``(*batch, size)`` of ``dtype``.

    Raises:
        ValueError: the shapes of ``codes`` and ``absmax`` do not match ``size``, or
            the shapes in ``nested`` or of ``zero_point`` do not match ``absmax``.
        TypeError: ``dtype`` is not floating, or ``absmax`` is uint8 but not nested, or
            nested but not uint8.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.codebooks import NF4
        >>> codes, absmax = jnp.array([0x70, 0xff], jnp.uint8), jnp.array([2.])
        >>> dequantize_blockwise(codes, absmax, NF4, block_size=4, size=4).tolist()
        [0.0, -2.0, 2.0, 2.0]
    """
    _check(codebook, block_size)
    stored = size if codebook is None or len(codebook) == 256 else -(-size // 2)
    want_codes = (*codes.shape[:-1], stored)
    want_absmax = (*codes.shape[:-1], -(-size // block_size))
    if codes.shape != want_codes or absmax.shape != want_absmax:
        raise ValueError(
            f"{size} elements in blocks of {block_size} have codes {want_codes} and "
            f"absmax {want_absmax}; got {codes.shape} and {absmax.shape}"
        )
    if (absmax.dtype == jnp.uint8) != (nested is not None):
        raise TypeError(
            f"absmax is uint8 where it is nested, and only there; got {absmax.dtype} "
            f"with nested={'None' if nested is None else '(nested_absmax, offset)'}"
        )
    if nested is not None:
        matrices = absmax.shape[:-2]
        per_matrix = math.prod(absmax.shape[len(matrices) :])
        want = (*matrices, -(-per_matrix // reference.NESTED_BLOCK_SIZE)), matrices
        if (got := tuple(x.shape for x in nested)) != want:
            raise ValueError(
                f"absmax of shape {absmax.shape} have nested_absmax {want[0]} and "
                f"offset {want[1]}; got {', '.join(map(str, got))}"
            )
    if zero_point is not None and zero_point.shape != absmax.shape:
        raise ValueError(
            f"absmax of shape {absmax.shape} have as many zero points; got "
            f"{zero_point.shape}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dequantize to a floating dtype; got {jnp.dtype(dtype)}")
    functions = {name: module.dequantize for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "dequantize_blockwise",
        functions,
        implementation,
        codes,
        absmax,
        nested,
        codebook,
        block_size,
        size,
        jnp.dtype(dtype),
        zero_point,
    )


def _check(codebook: np.ndarray | None, block_size: int) -> None:
    if codebook is not None and len(codebook) not in (16, 256):
        raise ValueError(f"a codebook has 16 or 256 levels; got {len(codebook)}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be a positive even number; got {block_size}")
