"""One matrix after the other, each with all rows; those without rows are not decoded.

Static shapes do not say how many rows a group has. A loop decodes one matrix at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxbnb_kernels.grouped_matmul_blockwise.reference import group_of_rows
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.matmul_blockwise import xla as of_one


def matmul(
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " groups"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
) -> Float[Array, "m n"]:
    """See `grouped_matmul_blockwise`."""
    multiply = functools.partial(
        of_one.matmul, transpose=transpose, compute_dtype=compute_dtype
    )
    columns = weight.codes.shape[-2] if transpose else weight.size
    return one_by_one(multiply, x, group_sizes, weight, columns)


def one_by_one(
    multiply: Callable[..., Float[Array, "m n"]],
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " groups"],
    matrices: Any,
    columns: int,
) -> Float[Array, "m n"]:
    """Calls ``multiply(x, matrix)`` for the matrix of each group that has rows.

    Args:
        multiply: product of all rows with a matrix.
        x: rows, sorted by group.
        group_sizes: number of rows of each group.
        matrices: pytree of arrays with a leading axis for the groups.
        columns: columns of the result.
    """
    group = group_of_rows(group_sizes, len(x))

    def add(y, scanned):
        number, size, matrix = scanned

        def multiply_rows(y):
            return jnp.where(group[:, None] == number, multiply(x, matrix), y)

        return jax.lax.cond(size > 0, multiply_rows, lambda y: y, y), None

    numbers = jnp.arange(len(group_sizes))
    y = jnp.zeros((len(x), columns), x.dtype)
    return jax.lax.scan(add, y, (numbers, group_sizes, matrices))[0]
