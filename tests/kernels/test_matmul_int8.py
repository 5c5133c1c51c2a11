"""The contract of matmul_int8: codes bit for bit, the product in float64.

The tolerance. Codes and scales are rounded exactly as in the oracle, and the sum of
integers is exact. Four roundings follow: the sum to float32, the product of the scales,
and two more products. The product over the outlier columns is a float32 sum of K
terms, in any order: K 2^-24 sum |x w|. One rounding adds the two, and one is to the
dtype of x.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unsupported import or_skip

from jaxbnb_kernels.matmul_int8 import (
    IMPLEMENTATIONS,
    matmul_int8,
    outlier_columns,
    quantize_rows,
)
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise

THRESHOLD = 6.0
K, N = 300, 40

# Without its GPU, mosaic_gpu is emulated: test_mosaic_gpu_int8.py.
RUNNABLE = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)
every_dtype = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: jnp.dtype(d).name
)
# No outliers, one, some in one gather of 128, more than that, all.
OUTLIERS = [0, 1, 7, 150, K]


def inputs(shape, outliers=0, seed=0, dtype=jnp.float32):
    """Draws normal values below the threshold, and an outlier in random columns."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.standard_normal(shape), -5, 5).astype(np.float32)
    columns = rng.permutation(shape[-1])[:outliers]
    if outliers:
        rows = x.reshape(-1, shape[-1])
        at = rng.integers(len(rows), size=outliers)
        rows[at, columns] = rng.uniform(6, 60, outliers)
    return jnp.asarray(x, dtype)


@functools.cache
def make_weight(n=N, k=K):
    return jax.jit(quantize_rows)(inputs((n, k), seed=7) / 10)


def numpy_rows(x):
    """Computes quantize_rows in NumPy's float32, for rows of ordinary magnitude."""
    scale = np.max(np.abs(x), axis=-1, initial=0)
    with np.errstate(divide="ignore"):
        factor = np.float32(127) * (np.float32(1) / scale)
    factor = np.where(scale > 0, factor, np.float32(0))
    return np.rint(x * factor[..., None]).astype(np.int8), scale


@functools.partial(jax.jit, static_argnums=2)
def _decode(codes, scale, dtype):
    size = codes.shape[1]
    # Each row is one block; an empty row does not have any.
    return dequantize_blockwise(
        codes, scale[:, None][:, :size], None, block_size=4096, size=size, dtype=dtype
    )


def decode(codes, scale, dtype):
    """Decodes the matrix in `dtype`, and returns it as float64."""
    return np.asarray(_decode(codes, scale, jnp.dtype(dtype))).astype(np.float64)


def expected(x, weight, threshold, compute_dtype):
    """Returns the product, and its tolerance before the last rounding."""
    codes, col_scale = (np.asarray(a) for a in weight)
    x32 = np.asarray(x.astype(jnp.float32))
    large = np.abs(x32) >= threshold if threshold else np.zeros(x.shape, bool)
    columns = large.any(axis=tuple(range(x.ndim - 1)))
    x_codes, row_scale = numpy_rows(np.where(large, np.float32(0), x32))
    sums = np.where(columns, 0, x_codes).astype(np.float64) @ codes.astype(np.float64).T
    inliers = sums * row_scale.astype(np.float64)[..., None] * col_scale / 127**2
    x64 = np.asarray(x.astype(compute_dtype)).astype(np.float64) * columns
    matrix = decode(codes, col_scale, compute_dtype).T
    outliers = x64 @ matrix
    terms = np.abs(x64) @ np.abs(matrix)
    error = 4 * np.abs(inliers) + x.shape[-1] * terms + np.abs(inliers + outliers)
    return inliers + outliers, 2**-24 * error


def check(y, x, weight, threshold=THRESHOLD, compute_dtype=None):
    want, tolerance = expected(x, weight, threshold, compute_dtype or x.dtype)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    # One rounding to the result's dtype, or half of its smallest number.
    info = jnp.finfo(y.dtype)
    tolerance = tolerance * 1.01 + 2.0 ** -(info.nmant + 1) * np.abs(want)
    tolerance = tolerance + float(info.smallest_subnormal)
    error = np.abs(np.asarray(y).astype(np.float64) - want)
    assert np.all(error <= tolerance), (error / tolerance).max()


@functools.cache
def _compiled(**kwargs):
    return jax.jit(functools.partial(matmul_int8, **kwargs))


@or_skip
def product(x, weight, threshold=THRESHOLD, **kwargs):
    return _compiled(outlier_threshold=threshold, **kwargs)(x, *weight)


@pytest.mark.parametrize(
    "shape", [(5, 64), (2, 3, 61), (64,), (0, 64), (3, 0)], ids=str
)
@every_dtype
def test_rows(shape, dtype):
    """Codes and scales equal float32 arithmetic bit for bit."""
    x = inputs(shape, dtype=dtype)
    codes, scale = jax.jit(quantize_rows)(x)
    want_codes, want_scale = numpy_rows(np.asarray(x.astype(jnp.float32)))
    assert (codes.dtype, scale.dtype) == (jnp.int8, jnp.float32)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(scale, want_scale)


def test_rows_round_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, 126]]


def test_rows_of_extreme_magnitude():
    """127 / scale leaves the range of float32 at either end of it."""
    ratios = np.linspace(-1, 1, 64, dtype=np.float32)
    want = np.rint(127.0 * ratios.astype(np.float64))
    for magnitude in (2.0**-119, 1e-35, 1.0, 1e30, 2.0**127):
        codes, scale = quantize_rows(jnp.asarray(np.float32(magnitude) * ratios))
        assert float(scale) == np.float32(magnitude)
        # If x is near a half, 3 roundings may decide.
        assert np.max(np.abs(np.asarray(codes) - want)) <= 1
        assert np.mean(np.asarray(codes) != want) < 0.05
    codes, scale = quantize_rows(jnp.zeros((2, 4)))
    assert not np.any(codes)
    assert not np.any(scale)


@every_implementation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad, implementation):
    x = inputs((3, K)).at[1, 5].set(bad)
    _, scale = quantize_rows(x)
    assert np.isfinite(scale).tolist() == [True, False, True]
    for threshold in (0, THRESHOLD):
        y = product(
            x, make_weight(), threshold=threshold, implementation=implementation
        )
        assert not np.any(np.isfinite(y[1]))
        # An infinity is an outlier in a separate column; a NaN affects its row.
        assert np.all(np.isfinite(y[::2]))


def test_outlier_columns():
    x = np.zeros((2, 3, 5), np.float32)
    x[0, 1, 0], x[1, 2, 3], x[0, 0, 4] = 6.0, -7.0, np.nextafter(np.float32(6), 0)
    for dtype in (jnp.float32, jnp.float16):
        columns = outlier_columns(jnp.asarray(x, dtype), 6.0)
        # In float16, the float32 below 6 becomes 6.
        assert columns.tolist() == [True, False, False, True, dtype == jnp.float16]
    assert not np.any(outlier_columns(jnp.asarray(x), 0))
    assert outlier_columns(jnp.array([1.0, -9.0]), 6.0).tolist() == [False, True]


@every_implementation
@every_dtype
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_product(outliers, dtype, implementation):
    x = inputs((9, K), outliers, dtype=dtype)
    assert np.sum(outlier_columns(x, THRESHOLD)) == outliers
    y = product(x, make_weight(), implementation=implementation)
    check(y, x, make_weight())


@every_implementation
@pytest.mark.parametrize("outliers", [0, 7])
def test_without_a_threshold_all_columns_are_alike(outliers, implementation):
    x = inputs((9, K), outliers)
    y = product(x, make_weight(), threshold=0, implementation=implementation)
    check(y, x, make_weight(), threshold=0)


def test_outliers_are_worth_it():
    """A row with a 60 has scale 60, which leaves 5 levels a side to the rest."""
    x = inputs((64, K)).at[:, 11].set(60.0)
    matrix = decode(*make_weight(), jnp.float32)
    exact = np.asarray(x).astype(np.float64) @ matrix.T
    apart, together = (
        np.sqrt(np.mean((product(x, make_weight(), t) - exact) ** 2)) for t in (6.0, 0)
    )
    # Each of 300 x has a uniform rounding error of s/127/sqrt(12), and w a root mean
    # square of 0.1. The scale s of a row is 60 or about 3.
    np.testing.assert_allclose(together, 60 / 127 / 12**0.5 * 0.1 * K**0.5, rtol=0.1)
    assert apart < together / 10


@every_implementation
@pytest.mark.parametrize("compute_dtype", [jnp.bfloat16, jnp.float16])
def test_compute_dtype(compute_dtype, implementation):
    """It applies to the outliers' product; integers do not depend on it."""
    x = inputs((9, K), 7)
    y = product(
        x, make_weight(), compute_dtype=compute_dtype, implementation=implementation
    )
    check(y, x, make_weight(), compute_dtype=compute_dtype)


@every_implementation
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (1, 1)], ids=str)
def test_batch_axes_of_x(batch, implementation):
    outliers = 7 if np.prod(batch) else 0
    x = inputs((*batch, K), outliers)
    y = product(x, make_weight(), implementation=implementation)
    check(y, x, make_weight())


@every_implementation
@pytest.mark.parametrize(
    "shape", [(0, 64), (3, 0), (1, 1), (2, 127), (2, 129)], ids=str
)
def test_shapes_of_the_matrix(shape, implementation):
    x = inputs((5, shape[1]), shape[1] // 2)
    weight = make_weight(*shape)
    check(product(x, weight, implementation=implementation), x, weight)


def test_long_sums_are_exact():
    """Codes are all 127; a float32 sum of more than 1040 products would round."""
    k = 4099
    x = jnp.ones((2, k)).at[:, 0].set(0.5)
    weight = jax.jit(quantize_rows)(jnp.ones((3, k)))
    y = product(x, weight, threshold=0)
    want = (127 * (k - 1) + 64) * 127 / 127**2
    # Roundings: the sum to float32 and two products; the scales' product is 1.
    np.testing.assert_allclose(y, want, rtol=3 * 2**-24)


@every_implementation
@every_dtype
@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_gradient_is_dy_times_the_decoded_matrix(threshold, dtype, implementation):
    x, dy = inputs((5, K), 7, dtype=dtype), inputs((5, N), seed=1, dtype=dtype)
    _, vjp = jax.vjp(
        lambda x: product(
            x, make_weight(), threshold=threshold, implementation=implementation
        ),
        x,
    )
    (dx,) = vjp(dy)
    matrix = decode(*make_weight(), dtype)
    dy64 = np.asarray(dy).astype(np.float64)
    tolerance = N * 2**-24 * (np.abs(dy64) @ np.abs(matrix))
    tolerance += 2.0 ** -(jnp.finfo(dtype).nmant + 1) * np.abs(dy64 @ matrix)
    tolerance += float(jnp.finfo(dtype).smallest_subnormal)
    assert dx.dtype == dtype
    error = np.abs(np.asarray(dx).astype(np.float64) - dy64 @ matrix)
    assert np.all(error <= tolerance)


def test_the_weight_gets_no_gradient():
    codes, scale = make_weight()
    x = inputs((5, K), 7)
    grad = jax.grad(lambda s: jnp.sum(matmul_int8(x, codes, s, outlier_threshold=6.0)))
    np.testing.assert_array_equal(grad(scale), 0)


@every_implementation
def test_the_residual_is_the_codes(implementation):
    def residuals(x, codes, scale):
        _, vjp = jax.vjp(
            lambda x: matmul_int8(
                x,
                codes,
                scale,
                outlier_threshold=THRESHOLD,
                implementation=implementation,
            ),
            x,
        )
        return jax.tree.leaves(vjp)

    kept = or_skip(jax.eval_shape)(residuals, inputs((5, K)), *make_weight())
    assert {(leaf.shape, leaf.dtype.name) for leaf in kept} == {
        ((N, K), "int8"),
        ((N,), "float32"),
    }


@every_implementation
def test_under_vmap_remat_and_scan(implementation):
    """Each example has its own outliers, and each layer its own matrix."""
    xs = jnp.stack([inputs((5, K), n, seed=n) for n in (0, 3, 200)])
    weight = make_weight()
    call = functools.partial(
        matmul_int8, outlier_threshold=THRESHOLD, implementation=implementation
    )

    @jax.checkpoint
    def total(x):
        y = call(x, *weight)
        return jnp.sum(y), y

    grads, ys = or_skip(jax.jit(jax.vmap(jax.grad(total, has_aux=True))))(xs)
    for x, y, grad in zip(xs, ys, grads, strict=True):
        check(y, x, weight)
        want = np.broadcast_to(decode(*weight, jnp.float32).sum(axis=0), grad.shape)
        np.testing.assert_allclose(grad, want, rtol=0, atol=N * 2**-24 * N)

    stacked = jax.vmap(quantize_rows)(inputs((3, K, K), seed=9) / 17)
    x, ys = jax.jit(
        lambda x: jax.lax.scan(lambda x, w: (call(x, *w), call(x, *w)), x, stacked)
    )(xs[1])
    inputs_of = [xs[1], *ys[:-1]]
    for i in range(3):
        check(ys[i], inputs_of[i], jax.tree.map(lambda leaf, i=i: leaf[i], stacked))


def test_without_outliers_the_matrix_is_never_decoded():
    """Nothing has its size except the codes, and XLA multiplies those."""
    jaxpr = jax.make_jaxpr(functools.partial(matmul_int8, outlier_threshold=0))(
        inputs((5, K)), *make_weight()
    )
    assert f"{N},{K}" in str(jaxpr)
    assert f"f32[{N},{K}]" not in str(jaxpr)


def test_errors():
    codes, scale = make_weight()
    x = inputs((2, K))
    call = functools.partial(matmul_int8, outlier_threshold=THRESHOLD)
    with pytest.raises(TypeError, match="matmul_int8 needs a floating x, got int32"):
        call(jnp.ones((2, K), jnp.int32), codes, scale)
    with pytest.raises(TypeError, match="codes of int8, got uint8"):
        call(x, codes.astype(jnp.uint8), scale)
    with pytest.raises(ValueError, match=r"got \(40, 300\) and \(40, 1\)"):
        call(x, codes, scale[:, None])
    for shape in ((2, N), ()):
        with pytest.raises(ValueError, match="the last axis of x must be 300"):
            call(jnp.ones(shape), codes, scale)
    with pytest.raises(TypeError, match="compute_dtype must be floating, got int8"):
        call(x, codes, scale, compute_dtype=jnp.int8)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        call(x, codes, scale, implementation="cuda")
    for threshold in (-1.0, np.nan):
        with pytest.raises(ValueError, match="outlier_threshold must be positive"):
            matmul_int8(x, codes, scale, outlier_threshold=threshold)
        with pytest.raises(ValueError, match="outlier_threshold must be positive"):
            outlier_columns(x, threshold)
    with pytest.raises(TypeError, match="quantize_rows needs a floating x"):
        quantize_rows(codes)
    with pytest.raises(ValueError, match="got a scalar"):
        quantize_rows(jnp.float32(1))
    long = jax.ShapeDtypeStruct((1, 133_145), jnp.int8)
    with pytest.raises(ValueError, match="at most 133144 products; got 133145"):
        jax.eval_shape(call, jnp.zeros((1, 133_145)), long, jnp.zeros(1))
