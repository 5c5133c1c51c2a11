"""The product with a QuantizedArray."""

import jax
from jaxtyping import Array, Float

from jaxbnb.core._product import product
from jaxbnb.core._quantized_array import QuantizedArray


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

    The operator ``@`` calls this function with the defaults.

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
        TypeError: ``x`` is not of a floating dtype, or ``q`` is not a QuantizedArray,
            or was cast or averaged.

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
    return product(
        x,
        q,
        compute_dtype=compute_dtype,
        outlier_threshold=outlier_threshold,
        act_quant_type=act_quant_type,
        implementation=implementation,
    )
