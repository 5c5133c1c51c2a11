"""grouped_matmul: rows with a quantised matrix for each group of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxbnb.core import formats
from jaxbnb.core._product import as_weight
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.parts import check_parts
from jaxbnb_kernels.grouped_matmul_blockwise import grouped_matmul_blockwise


def grouped_matmul(
    x: Float[Array, "m k"],
    group_sizes: Integer[Array, " groups"],
    q: QuantizedArray,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "m n"]:
    """Multiplies rows, sorted by group, with the matrix of their group.

    On a GPU with kernels, one launch reads the matrices of those groups that have rows.
    Elsewhere a loop decodes one matrix at a time. The product is differentiable in
    ``x``, as that of `jaxbnb.matmul`.

    Args:
        x: array ``(m, k)``, sorted by group.
        group_sizes: number of rows of each group. Rows after the last group give zeros.
        q: stack ``(groups, k, n)``, blocked along either of its last axes.
        compute_dtype: dtype of both operands in the product, which accumulates in
            float32; None for the dtype of ``x``.
        implementation: "xla", "reference", "mosaic_gpu" (kernels for GPUs), or None to
            choose.

    Returns:
        The product ``(m, n)``, in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not multiply.
        TypeError: the dtype of ``x`` is not floating, ``q`` is not a QuantizedArray, or
            its parts were cast or averaged.
        NotImplementedError: ``q`` is in ``llm_int8``, which rounds ``x`` too.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from jaxbnb.core.grouped import grouped_matmul
        >>> matrices = jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])
        >>> q = jaxbnb.quantize(matrices, "int8", axis=-2)
        >>> grouped_matmul(jnp.ones((3, 4)), jnp.array([2, 1]), q)[:, 0].tolist()
        [1.0, 1.0, 2.0]
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"grouped_matmul multiplies by a QuantizedArray, got {type(q).__name__}"
        )
    check_parts(q)
    if q.ndim != 3 or q.axis < -2:
        raise ValueError(
            "grouped_matmul needs a stack of matrices, blocked along one of its last "
            f"two axes; got shape {q.shape} blocked along axis {q.axis}"
        )
    if formats.choose_outlier_threshold(q.quant_type, None) is not None:
        raise NotImplementedError(
            f"{q.quant_type} rounds the rows of x to integers as well; call "
            "jaxbnb.matmul for each matrix"
        )
    return grouped_matmul_blockwise(
        jnp.asarray(x),
        group_sizes,
        as_weight(q),
        transpose=q.axis == -2,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )
