"""embed_blockwise: arguments, checks, implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels import _selection
from jaxbnb_kernels.embed_blockwise import kernels, reference, xla
from jaxbnb_kernels.matmul_blockwise import Weight

IMPLEMENTATIONS = {
    "mosaic_gpu": kernels,
    "cpu": kernels,
    "xla": xla,
    "reference": reference,
}


def embed_blockwise(
    ids: Integer[Array, "*batch"],
    weight: Weight,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "*batch size"]:
    """Returns ``W[ids]`` for W quantised along its rows; decodes only these rows.

    As in ``jnp.take``, a negative id counts from the end, and the row of an id out of
    range is NaN. The matrix is a constant: nothing is differentiated.

    Args:
        ids: row numbers, of any integer dtype.
        weight: the matrix, ``(rows, size)``.
        dtype: dtype of the result.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu" (a
            kernel for GPUs, for the same matrices as the kernel of
            `dequantize_blockwise`, if a row is at least a tile), or None to choose.

    Returns:
        ``(*batch, size)`` of ``dtype``.

    Raises:
        TypeError: ``ids`` are not integers, or ``dtype`` is not floating.
        NotImplementedError: the requested implementation does not support these
            arguments, or not on the device that this is compiled for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.codebooks import NF4
        >>> from jaxbnb_kernels.quantize_blockwise import quantize_blockwise
        >>> codes, absmax = quantize_blockwise(jnp.eye(3, 2), NF4, block_size=2)
        >>> w = Weight(codes, absmax, None, NF4, block_size=2, size=2)
        >>> embed_blockwise(jnp.array([1, 0, -1]), w).tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"embed to a floating dtype; got {dtype}")
    # Traced ids cannot index NumPy arrays. Kernels have no derivative.
    weight = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, weight))
    functions = {name: module.embed for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "embed_blockwise", functions, implementation, ids, weight, dtype
    )
