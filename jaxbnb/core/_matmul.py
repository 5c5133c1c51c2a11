"""The product with a QuantizedArray."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb.core import _formats
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_fp8 import matmul_fp8
from jaxbnb_kernels.matmul_int8 import matmul_int8


def matmul(
    x: Float[Array, "*batch k"],
    q: QuantizedArray,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """``x @ q`` for a quantised matrix, which is decoded as it is used.

    One in ``llm_int8`` is not decoded: each row of ``x`` is rounded to int8 too, and
    the integers are multiplied, but for the columns of ``x`` that have an outlier,
    which are multiplied as they are with the decoded rows of ``q``. Nor is one in fp8
    with an ``act_quant_type``, to which each row of ``x`` is then rounded.

    Differentiable in ``x``. ``q`` is frozen: its cotangent is zero, and the residual
    that the backward pass keeps of it is its codes, not a decoded copy.

    Args:
        x: ``(..., k)``. With a stack of matrices, ``(*batch, m, k)`` with its batch
            axes.
        q: ``(k, n)``, blocked along either axis, or a stack ``(*batch, k, n)``;
            ``llm_int8`` along axis -2.
        compute_dtype: dtype of both operands in the product, which accumulates in
            float32; None for that of ``x``.
        outlier_threshold: of ``llm_int8`` alone: the magnitude from which on an element
            of ``x`` makes its column one of outliers; 0 for none, None for 6.0.
        act_quant_type: of a ``q`` in fp8 alone, with one absmax for each of its
            columns: "fp8_e4m3" or "fp8_e5m2", to multiply fp8 by fp8; None to decode.
        implementation: "xla", "reference", "mosaic_gpu" (kernels for Hopper GPUs), or
            None to choose.

    Returns:
        ``(..., n)`` in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not multiply, or ``outlier_threshold`` or
            ``act_quant_type`` is not one, or not for this format.
        TypeError: ``x`` is not of a floating dtype, or ``q`` not a QuantizedArray.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> w = jax.random.normal(jax.random.key(0), (128, 32))
        >>> x = jax.random.normal(jax.random.key(1), (5, 128))
        >>> q = jaxbnb.quantize(w, "int8", axis=-2)
        >>> bool(jnp.allclose(jaxbnb.matmul(x, q), x @ q.dequantize(), atol=1e-4))
        True

    References:
        Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale, 2022.
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"matmul multiplies by a QuantizedArray, got {type(q).__name__}; "
            "make one with jaxbnb.quantize, or use jnp.matmul"
        )
    if q.ndim < 2 or q.axis < -2:
        raise ValueError(
            f"matmul needs a matrix, or a stack of them, blocked along one of its last "
            f"two axes; got shape {q.shape} blocked along axis {q.axis}"
        )
    outlier_threshold = _formats.choose_outlier_threshold(
        q.quant_type, outlier_threshold
    )
    _formats.check_act_quant_type(q.quant_type, act_quant_type)
    batch = q.shape[:-2]
    if batch:
        if x.ndim != q.ndim or x.shape[:-2] != batch:
            raise ValueError(
                f"a stack of matrices {q.shape} multiplies an x of shape "
                f"{(*batch, 'm', q.shape[-2])}; got {x.shape}"
            )
        return jax.vmap(
            lambda x, q: matmul(
                x,
                q,
                compute_dtype=compute_dtype,
                outlier_threshold=outlier_threshold,
                act_quant_type=act_quant_type,
                implementation=implementation,
            )
        )(x, q)
    if x.ndim == 0 or x.shape[-1] != q.shape[0]:
        raise ValueError(
            f"shapes do not multiply: x {x.shape} by {q.shape}; the last axis of x "
            f"must be {q.shape[0]}"
        )
    if outlier_threshold is not None:
        if q.axis != -2:
            raise ValueError(
                "a product in llm_int8 sums over the axis that shares an absmax; "
                "quantise the matrix along axis=-2"
            )
        return matmul_int8(
            jnp.asarray(x),
            q.codes,
            # The one block of a row, or 0 where it is empty.
            jnp.sum(q.absmax, axis=-1),
            outlier_threshold=outlier_threshold,
            compute_dtype=compute_dtype,
            implementation=implementation,
        )
    if act_quant_type is not None:
        if q.axis != -2 or q.absmax.shape[-1] > 1:
            raise ValueError(
                f"with act_quant_type={act_quant_type!r} each column that is summed "
                "over has one absmax; quantise the matrix along axis=-2 with a "
                f"block_size of at least {q.shape[0]}, as QuantConfig(..., "
                f"act_quant_type=...) does; got blocks of {q.block_size} along axis "
                f"{q.axis}"
            )
        return matmul_fp8(
            jnp.asarray(x),
            as_weight(q),
            act_dtype=_formats.ACT_DTYPES[act_quant_type],
            compute_dtype=compute_dtype,
            implementation=implementation,
        )
    return matmul_blockwise(
        jnp.asarray(x),
        as_weight(q),
        transpose=q.axis == -2,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )


def as_weight(q: QuantizedArray) -> Weight:
    """A matrix as the kernels take it."""
    nested = None
    if q.nested_absmax is not None and q.offset is not None:
        nested = q.nested_absmax, q.offset
    levels = _formats.codebook(q.quant_type)
    return Weight(q.codes, q.absmax, nested, levels, q.block_size, q.axis_size)
