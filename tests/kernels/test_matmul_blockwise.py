"""The contract of matmul_blockwise: the product with the decoded matrix, in float64.

The tolerance. Both operands are decoded and rounded to `compute_dtype` exactly as in
the oracle. The sum of K products in float32, in any order, is off by at most
K 2^-24 sum |x w|. The result is rounded to the dtype of x (once; twice if it passes
through float32 first). Nothing else is allowed: a sum in bfloat16 would be off by 2^-9,
hundreds of times more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unsupported import or_skip

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, FP4, NF4
from jaxbnb_kernels.matmul_blockwise import IMPLEMENTATIONS, Weight, matmul_blockwise
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)

pytestmark = pytest.mark.matrix

FORMATS = {"nf4": NF4, "fp4": FP4, "int8": None, "dynamic8": DYNAMIC8_SIGNED}

# Without its GPU, mosaic_gpu is emulated: test_mosaic_gpu_matmul.py.
RUNNABLE = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
every_format = pytest.mark.parametrize("name", FORMATS)
both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["W", "W.T"])


def normal(shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x, dtype)


@functools.cache
def make_weight(name, rows, size, block_size=64, double_quant=False):
    @jax.jit
    def quantize(matrix):
        codes, absmax = quantize_blockwise(matrix, FORMATS[name], block_size=block_size)
        nested = None
        if double_quant:
            absmax, *nested = quantize_absmax(absmax)
            nested = tuple(nested)
        return Weight(codes, absmax, nested, FORMATS[name], block_size, size)

    return quantize(normal((rows, size), seed=7))


def decode(weight, dtype):
    """Decodes the matrix in `dtype`, and returns it as float64."""
    return np.asarray(_decode(weight, jnp.dtype(dtype))).astype(np.float64)


@functools.partial(jax.jit, static_argnums=1)
def _decode(weight, dtype):
    return dequantize_blockwise(
        weight.codes,
        weight.float_absmax(),
        weight.codebook,
        block_size=weight.block_size,
        size=weight.size,
        dtype=dtype,
        implementation="reference",
    )


def check(y, x, matrix, compute_dtype):
    """Compares y with x @ matrix; see the docstring of this file."""
    x64 = np.asarray(x.astype(compute_dtype)).astype(np.float64)
    expected = x64 @ matrix
    terms = np.abs(x64) @ np.abs(matrix)
    k = matrix.shape[0]
    rounding = 2.0 ** -(jnp.finfo(y.dtype).nmant + 1) + 2**-24
    tolerance = (k * 2**-24) * terms + rounding * np.abs(expected) + 1e-37
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y).astype(np.float64) - expected)
    assert np.all(error <= tolerance), (error / tolerance).max()


@functools.cache
def compiled_product(**kwargs):
    return jax.jit(lambda x, w: matmul_blockwise(x, w, **kwargs))


@or_skip
def product(x, weight, **kwargs):
    return compiled_product(**kwargs)(x, weight)


@every_implementation
@every_format
@both_ways
@pytest.mark.parametrize("size", [192, 101], ids=["whole blocks", "ragged, odd"])
def test_product(size, transpose, name, implementation):
    weight = make_weight(name, 48, size)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x = normal((5, matrix.shape[0]))
    y = product(x, weight, transpose=transpose, implementation=implementation)
    check(y, x, matrix, jnp.float32)


@every_implementation
@both_ways
@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [
        (jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, None),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, None),
        (jnp.float16, jnp.bfloat16),
    ],
)
def test_dtypes(dtype, compute_dtype, name, transpose, implementation):
    weight = make_weight(name, 48, 192)
    matrix = decode(weight, compute_dtype or dtype)
    matrix = matrix.T if transpose else matrix
    x = normal((5, matrix.shape[0]), dtype=dtype)
    y = product(
        x,
        weight,
        transpose=transpose,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )
    check(y, x, matrix, compute_dtype or dtype)


@every_implementation
@both_ways
def test_double_quantised(transpose, implementation):
    weight = make_weight("nf4", 48, 192, double_quant=True)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x = normal((5, matrix.shape[0]))
    y = product(x, weight, transpose=transpose, implementation=implementation)
    check(y, x, matrix, jnp.float32)


@every_implementation
@both_ways
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)], ids=str)
def test_batch_axes_of_x(batch, transpose, implementation):
    weight = make_weight("nf4", 48, 101)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x = normal((*batch, matrix.shape[0]))
    y = product(x, weight, transpose=transpose, implementation=implementation)
    check(y, x, matrix, jnp.float32)


@every_implementation
@both_ways
@pytest.mark.parametrize("block_size", [2, 32, 512])
def test_block_sizes(block_size, transpose, implementation):
    weight = make_weight("nf4", 48, 192, block_size)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x = normal((5, matrix.shape[0]))
    y = product(x, weight, transpose=transpose, implementation=implementation)
    check(y, x, matrix, jnp.float32)


@every_implementation
@both_ways
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1)], ids=str)
def test_degenerate_matrices(shape, transpose, implementation):
    weight = make_weight("nf4", *shape)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x = normal((5, matrix.shape[0]))
    y = product(x, weight, transpose=transpose, implementation=implementation)
    check(y, x, matrix, jnp.float32)


@every_implementation
@every_format
@both_ways
def test_gradient_is_dy_times_the_transpose(transpose, name, implementation):
    weight = make_weight(name, 48, 101)
    matrix = decode(weight, jnp.float32)
    matrix = matrix.T if transpose else matrix
    x, dy = normal((5, matrix.shape[0])), normal((5, matrix.shape[1]), seed=1)
    y, vjp = jax.vjp(
        functools.partial(
            product, weight=weight, transpose=transpose, implementation=implementation
        ),
        x,
    )
    check(y, x, matrix, jnp.float32)
    (dx,) = vjp(dy)
    check(dx, dy, matrix.T, jnp.float32)


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradient_in_16_bit(dtype, implementation):
    weight = make_weight("nf4", 48, 192)
    matrix = decode(weight, dtype).T
    x, dy = normal((5, 192), dtype=dtype), normal((5, 48), seed=1, dtype=dtype)
    _, vjp = jax.vjp(
        lambda x: matmul_blockwise(
            x, weight, transpose=True, implementation=implementation
        ),
        x,
    )
    check(vjp(dy)[0], dy, matrix.T, dtype)


@every_implementation
@both_ways
@every_format
def test_the_residual_is_the_codes(name, transpose, implementation):
    """The backward pass does not keep a floating-point copy of the matrix."""
    weight = make_weight(name, 64, 192, double_quant=True)
    x = normal((5, 192 if transpose else 64))

    def residuals(x, weight):
        _, vjp = jax.vjp(
            lambda x: matmul_blockwise(
                x, weight, transpose=transpose, implementation=implementation
            ),
            x,
        )
        return jax.tree.leaves(vjp)

    kept = or_skip(jax.eval_shape)(residuals, x, weight)
    assert {leaf.shape for leaf in kept} >= {weight.codes.shape}
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # These are the nested absmax and an offset: one per 256 blocks of 64, and one.
    assert sum(leaf.size for leaf in floats) <= 64 * 192 // (64 * 256) + 2
    bits = 8 if name in ("int8", "dynamic8") else 4
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert nbytes <= 64 * 192 * (bits + 0.15) / 8


@every_implementation
def test_a_scan_over_layers_stacks_codes_only(implementation):
    """Codes and absmax of eight layers pass through; only x is stacked."""
    weight = make_weight("nf4", 128, 128)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), weight)
    x = normal((2, 128))

    def loss(x, stacked):
        def layer(x, w):
            y = matmul_blockwise(x, w, transpose=True, implementation=implementation)
            return jnp.tanh(y), None

        return jnp.sum(jax.lax.scan(layer, x, stacked)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(x, stacked)
    outputs = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars]
    outputs = [v for v in outputs if jnp.issubdtype(v.dtype, jnp.floating)]
    assert outputs
    assert max(v.size for v in outputs) < 128 * 128


@every_implementation
def test_gradient_under_checkpoint_vmap_and_jit(implementation):
    weight = make_weight("nf4", 48, 192)
    matrix = decode(weight, jnp.float32)
    xs = normal((3, 5, 192))

    def total(x):
        y = matmul_blockwise(x, weight, transpose=True, implementation=implementation)
        return jnp.sum(y)

    grads = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total))))(xs)
    for grad in grads:
        check(grad, jnp.ones((5, 48)), matrix, jnp.float32)


def test_a_stack_of_weights_under_vmap():
    weight = make_weight("nf4", 48, 192)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
    x = normal((2, 5, 192))
    y = jax.vmap(lambda x, w: matmul_blockwise(x, w, transpose=True))(x, stacked)
    for i in range(2):
        check(y[i], x[i], decode(weight, jnp.float32).T, jnp.float32)


def test_a_weight_is_a_pytree_that_compiles_once():
    """Its codebook is static, so another weight of the same format is a cache hit."""
    calls = []

    @jax.jit
    def f(x, weight):
        calls.append(None)
        return matmul_blockwise(x, weight, transpose=True)

    weight = make_weight("nf4", 48, 192)
    f(normal((5, 192)), weight)
    f(normal((5, 192)), jax.tree.map(lambda leaf: leaf, weight))
    assert len(calls) == 1
    assert len(jax.tree.leaves(make_weight("nf4", 48, 192, double_quant=True))) == 4


def test_errors():
    weight = make_weight("nf4", 48, 192)
    with pytest.raises(TypeError, match="needs a floating x, got int32"):
        matmul_blockwise(jnp.ones((2, 192), jnp.int32), weight, transpose=True)
    with pytest.raises(ValueError, match=r"must be 192 to multiply; got \(2, 48\)"):
        matmul_blockwise(jnp.ones((2, 48)), weight, transpose=True)
    with pytest.raises(ValueError, match=r"must be 48 to multiply; got \(2, 192\)"):
        matmul_blockwise(jnp.ones((2, 192)), weight, transpose=False)
    with pytest.raises(ValueError, match=r"must be 48 to multiply; got \(\)"):
        matmul_blockwise(jnp.float32(1), weight, transpose=False)
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        matmul_blockwise(jnp.ones(48), weight, transpose=False, implementation="triton")
