"""The product with a quantised matrix: each format has its kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb.core import formats
from jaxbnb.core.parts import check_parts
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_fp8 import matmul_fp8
from jaxbnb_kernels.matmul_int8 import matmul_int8


def product(
    x: Float[Array, "*batch k"],
    q: Any,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    outlier_threshold: float | None = None,
    act_quant_type: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Computes `jaxbnb.matmul`. The caller has checked that ``q`` is a QuantizedArray.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> q = jaxbnb.quantize(jnp.ones((64, 2)), "int8", axis=-2)
        >>> product(jnp.ones((1, 64)), q)
        Array([[64., 64.]], dtype=float32)
    """
    check_parts(q)
    if q.ndim < 2 or q.axis < -2:
        raise ValueError(
            f"matmul needs a matrix, or a stack of them, blocked along one of its last "
            f"two axes; got shape {q.shape} blocked along axis {q.axis}"
        )
    outlier_threshold = formats.choose_outlier_threshold(
        q.quant_type, outlier_threshold
    )
    formats.check_act_quant_type(q.quant_type, act_quant_type)
    batch = q.shape[:-2]
    if batch:
        if x.ndim != q.ndim or x.shape[:-2] != batch:
            raise ValueError(
                f"a stack of matrices {q.shape} multiplies an x of shape "
                f"{(*batch, 'm', q.shape[-2])}; got {x.shape}"
            )
        return jax.vmap(
            lambda x, q: product(
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
            # The one block of a row, or 0 if the row is empty.
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
            act_dtype=formats.ACT_DTYPES[act_quant_type],
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


def as_weight(q: Any) -> Weight:
    """Returns a matrix in the form that the kernels take."""
    nested = tensor_scale = None
    if q.offset is not None:
        nested = q.nested_absmax, q.offset
    else:
        tensor_scale = q.nested_absmax
    scaled = formats.SCALED.get(q.quant_type)
    return Weight(
        q.codes,
        q.absmax,
        nested,
        formats.codebook(q.quant_type),
        q.block_size,
        q.axis_size,
        zero_point=q.zero_point,
        scale_type=None if scaled is None else scaled.scale_type,
        tensor_scale=tensor_scale,
    )
