"""The specification: multiply all rows with each matrix, keep those of its group."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.matmul_blockwise import reference as of_one


def matmul(
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " groups"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
) -> Float[Array, "m n"]:
    """See `grouped_matmul_blockwise`."""
    columns = weight.codes.shape[-2] if transpose else weight.size
    y = jnp.zeros((len(x), columns), x.dtype)
    group = group_of_rows(group_sizes, len(x))
    for number in range(len(group_sizes)):
        matrix = jax.tree.map(lambda a, number=number: a[number], weight)
        of_group = of_one.matmul(x, matrix, transpose, compute_dtype)
        y = jnp.where(group[:, None] == number, of_group, y)
    return y


def group_of_rows(
    group_sizes: Int32[Array, " groups"], num_rows: int
) -> Int32[Array, " rows"]:
    """Returns the group of each row; the number of groups for rows after the last."""
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(num_rows), side="right").astype(jnp.int32)
