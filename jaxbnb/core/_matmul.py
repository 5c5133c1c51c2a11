"""The product with a QuantizedArray."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb.core import _formats
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise


def matmul(
    x: Float[Array, "*batch k"],
    q: QuantizedArray,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """``x @ q`` for a quantised matrix, which is decoded as it is used.

    Differentiable in ``x``. ``q`` is frozen: its cotangent is zero, and the residual
    that the backward pass keeps of it is its codes, not a decoded copy.

    Args:
        x: ``(..., k)``. With a stack of matrices, ``(*batch, m, k)`` with its batch
            axes.
        q: ``(k, n)``, blocked along either axis, or a stack ``(*batch, k, n)``.
        compute_dtype: dtype of both operands in the product, which accumulates in
            float32; None for that of ``x``.
        implementation: "xla", "reference", "mosaic_gpu" (kernels for Hopper GPUs), or
            None to choose.

    Returns:
        ``(..., n)`` in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not multiply.
        TypeError: ``x`` is not of a floating dtype, or ``q`` not a QuantizedArray.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> w = jax.random.normal(jax.random.key(0), (128, 32))
        >>> x = jax.random.normal(jax.random.key(1), (5, 128))
        >>> q = jaxbnb.quantize(w, "int8", axis=-2)
        >>> bool(jnp.allclose(jaxbnb.matmul(x, q), x @ q.dequantize(), atol=1e-4))
        True
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
    batch = q.shape[:-2]
    if batch:
        if x.ndim != q.ndim or x.shape[:-2] != batch:
            raise ValueError(
                f"a stack of matrices {q.shape} multiplies an x of shape "
                f"{(*batch, 'm', q.shape[-2])}; got {x.shape}"
            )
        return jax.vmap(
            lambda x, q: matmul(
                x, q, compute_dtype=compute_dtype, implementation=implementation
            )
        )(x, q)
    if x.ndim == 0 or x.shape[-1] != q.shape[0]:
        raise ValueError(
            f"shapes do not multiply: x {x.shape} by {q.shape}; the last axis of x "
            f"must be {q.shape[0]}"
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
