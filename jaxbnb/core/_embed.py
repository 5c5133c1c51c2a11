"""embed: looks up rows of a QuantizedArray."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxbnb.core._product import as_weight
from jaxbnb.core._quantized_array import QuantizedArray
from jaxbnb.core.parts import check_parts
from jaxbnb_kernels.embed_blockwise import embed_blockwise


def embed(
    ids: Integer[Array, "*batch"],
    q: QuantizedArray,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch features"]:
    """Returns ``q.dequantize(dtype)[ids]``, but decodes only those rows.

    Ids work as in ``jnp.take``: a negative one counts from the end, and one that is out
    of range gives a row of NaN. ``q`` is frozen: nothing is differentiated.

    Args:
        ids: indices, of any integer dtype.
        q: a matrix ``(num_embeddings, features)``, blocked along its last axis.
        dtype: dtype of the result; None for the dtype that was quantised.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu", or
            None to choose.

    Returns:
        The rows, ``(*batch, features)``.

    Raises:
        TypeError: ``ids`` are not integers, ``q`` is not a QuantizedArray, or its parts
            were cast or averaged.
        ValueError: ``q`` is not a matrix, or blocked along its first axis.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> table = jax.random.normal(jax.random.key(0), (1000, 64))
        >>> q = jaxbnb.quantize(table, "int8")
        >>> rows = jaxbnb.core.embed(jnp.array([[3, 999]]), q)
        >>> rows.shape, bool(jnp.all(rows[0, 0] == q.dequantize()[3]))
        ((1, 2, 64), True)
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"embed looks rows of a QuantizedArray up, got {type(q).__name__}; make "
            "one with jaxbnb.quantize, or use jnp.take"
        )
    if q.ndim != 2 or q.axis != -1:
        raise ValueError(
            "embed needs a matrix blocked along its last axis, so that a row is whole "
            f"blocks; got shape {q.shape} blocked along axis {q.axis}"
        )
    check_parts(q)
    return embed_blockwise(
        jnp.asarray(ids),
        as_weight(q),
        dtype=q.dtype if dtype is None else dtype,
        implementation=implementation,
    )
