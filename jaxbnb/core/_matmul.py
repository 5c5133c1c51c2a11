"""matmul: the product with a QuantizedArray."""

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
    """Returns ``x @ q`` for a quantised matrix, which is decoded as it is used.

    The operator ``@`` calls this function with the defaults.

    Two kinds of matrix are not decoded. With ``llm_int8``, each row of ``x`` is rounded
    to int8 too, and the integers are multiplied. Only columns of ``x`` with an outlier
    are not rounded; they are multiplied by the decoded rows of ``q``. With fp8 and an
    ``act_quant_type``, each row of ``x`` is rounded to that type, and fp8 is multiplied
    by fp8.

    The product is differentiable in ``x``. ``q`` is frozen: its cotangent is zero, and
    the backward pass keeps its codes, not a decoded copy.

    Args:
        x: array ``(..., k)``; for a stack of matrices, ``(*batch, m, k)`` with the
            batch axes of the stack.
        q: matrix ``(k, n)``, blocked along either axis, or a stack ``(*batch, k, n)``;
            ``llm_int8`` must be blocked along axis -2.
        compute_dtype: dtype of both operands in the product, which accumulates in
            float32; None for the dtype of ``x``.
        outlier_threshold: only for ``llm_int8``: smallest magnitude of an outlier in
            ``x``; 0 for no outliers, None for 6.0.
        act_quant_type: only for a ``q`` in fp8 with one absmax a column: "fp8_e4m3" or
            "fp8_e5m2", to multiply fp8 by fp8; None to decode ``q``.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu"
            (kernels for GPUs), or None to choose.

    Returns:
        The product ``(..., n)``, in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not multiply, or ``outlier_threshold`` or
            ``act_quant_type`` is invalid or does not suit this format.
        TypeError: the dtype of ``x`` is not floating, ``q`` is not a QuantizedArray, or
            its parts were cast or averaged.

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
