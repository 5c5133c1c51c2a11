"""The contract of grouped_matmul_blockwise: each group's product with its own matrix.

The products themselves are those of `test_matmul_blockwise`, whose tolerance holds
here. These tests check which rows meet which matrix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matmul_blockwise import FORMATS, check, decode, normal

from jaxbnb_kernels.grouped_matmul_blockwise import (
    IMPLEMENTATIONS,
    grouped_matmul_blockwise,
)
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import quantize_absmax, quantize_blockwise

# Without its GPU, mosaic_gpu is emulated: test_mosaic_gpu_ampere.py. None has native
# kernels for each group.
RUNNABLE = [None, *(name for name in IMPLEMENTATIONS if name != "mosaic_gpu")]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["W", "W.T"])

GROUPS, ROWS, SIZE = 4, 96, 128


@functools.cache
def stack_of(name, double_quant=False):
    """Returns a stack of different matrices, and each of them decoded."""
    codebook = FORMATS[name]

    def quantize(matrix):
        codes, absmax = quantize_blockwise(matrix, codebook, block_size=64)
        absmax, *nested = quantize_absmax(absmax) if double_quant else (absmax,)
        return Weight(codes, absmax, tuple(nested) or None, codebook, 64, SIZE)

    stack = jax.jit(jax.vmap(quantize))(normal((GROUPS, ROWS, SIZE), seed=7))
    each = [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(GROUPS)]
    return stack, [decode(matrix, jnp.float32) for matrix in each]


@every_implementation
@both_ways
@pytest.mark.parametrize("sizes", [(3, 0, 7, 1), (0, 0, 0, 9), (0, 2, 0, 0)], ids=str)
@pytest.mark.parametrize(("name", "nested"), [("nf4", True), ("int8", False)])
def test_rows_meet_the_matrix_of_their_group(
    name, nested, sizes, transpose, implementation
):
    weight, matrices = stack_of(name, nested)
    x = normal((11, SIZE if transpose else ROWS))
    y = grouped_matmul_blockwise(
        x,
        jnp.array(sizes),
        weight,
        transpose=transpose,
        implementation=implementation,
    )
    ends = np.cumsum(sizes)
    for matrix, end, size in zip(matrices, ends, sizes, strict=True):
        rows = slice(end - size, end)
        check(y[rows], x[rows], matrix.T if transpose else matrix, jnp.float32)
    np.testing.assert_array_equal(y[ends[-1] :], 0)


@every_implementation
def test_the_gradient_is_the_product_with_the_transpose(implementation):
    weight, _ = stack_of("nf4")
    x, sizes = normal((11, SIZE)), jnp.array([3, 0, 7, 1])
    dy = normal((11, ROWS), seed=1)

    def multiply(x, transpose):
        return grouped_matmul_blockwise(
            x, sizes, weight, transpose=transpose, implementation=implementation
        )

    _, pullback = jax.vjp(lambda x: multiply(x, True), x)
    np.testing.assert_array_equal(pullback(dy)[0], multiply(dy, False))


def test_mapped_over_rows_and_groups():
    weight, _ = stack_of("nf4")
    x, sizes = normal((2, 11, SIZE)), jnp.array([[3, 0, 7, 1], [0, 5, 0, 6]])

    def multiply(x, sizes):
        return grouped_matmul_blockwise(x, sizes, weight, transpose=True)

    each = jnp.stack([multiply(*call) for call in zip(x, sizes, strict=True)])
    # XLA may sum up in another order.
    np.testing.assert_allclose(jax.vmap(multiply)(x, sizes), each, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((5, 4), int)}, TypeError, "needs a floating x"),
        ({"group_sizes": jnp.ones(GROUPS)}, TypeError, "must be integers"),
        ({"group_sizes": jnp.ones(3, int)}, ValueError, r"\(3,\) need a stack"),
        ({"x": jnp.ones((5, 4))}, ValueError, r"shape \(m, 128\)"),
        ({"x": jnp.ones((2, 5, SIZE))}, ValueError, r"got \(2, 5, 128\)"),
        ({"compute_dtype": int}, TypeError, "compute_dtype must be floating"),
        ({"implementation": "cpu"}, ValueError, "has no implementation 'cpu'"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    weight, _ = stack_of("nf4")
    call = {
        "x": jnp.ones((5, SIZE)),
        "group_sizes": jnp.ones(GROUPS, int),
        "weight": weight,
        "transpose": True,
    }
    with pytest.raises(error, match=message):
        grouped_matmul_blockwise(**(call | change))
