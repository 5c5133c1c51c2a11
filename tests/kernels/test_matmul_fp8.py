"""The contract of matmul_fp8: codes bit for bit, the product in float64.

The tolerance. Products of codes, 2 x 4 bits, are exact in float32. Their sum in any
order is off by at most K 2^-24 sum |c w|. Four roundings follow: the product of the
scales, two more products, and one to the dtype of x.
"""

import functools
import re

import hopper_compiler
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxbnb_kernels.codebooks import FP8_E4M3, FP8_E5M2, NF4
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.matmul_fp8 import IMPLEMENTATIONS, matmul_fp8, quantize_rows
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)

K, N = 200, 24
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
CODEBOOKS = {E4M3: FP8_E4M3, E5M2: FP8_E5M2}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def normal(shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x, dtype)


@functools.cache
def make_weight(dtype=E4M3, n=N, k=K, block_size=None, nested=False):
    block_size = block_size or max(2, k + k % 2)
    codes, absmax = quantize_blockwise(
        normal((n, k), 7) / 10, CODEBOOKS[dtype], block_size=block_size
    )
    more = None
    if nested:
        absmax, *more = quantize_absmax(absmax)
        more = tuple(more)
    return Weight(codes, absmax, more, CODEBOOKS[dtype], block_size, k)


def numpy_rows(x, dtype):
    """Computes quantize_rows in NumPy, for rows of ordinary magnitude."""
    scale = np.max(np.abs(x), axis=-1, initial=0).astype(np.float32)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    with np.errstate(divide="ignore"):
        factor = largest * (np.float32(1) / scale)
    factor = np.where(scale > 0, factor, np.float32(0))
    return (x * factor[..., None]).astype(dtype), scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_rows(dtype):
    """Includes every float of a row with factor 1: ties, subnormals, both signs."""
    largest = float(ml_dtypes.finfo(dtype).max)
    levels = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    levels = np.unique(levels[np.isfinite(levels)])
    middles = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(middles, np.float32(s) * np.inf) for s in (-1, 1)]
    exact = np.concatenate([levels, middles, *near])
    # Scaling by 1 / largest and back would round; scaling by a power of two does not.
    exact = exact[np.abs(exact) < 2.0 ** np.floor(np.log2(largest))]
    exact = exact / np.float32(2.0 ** np.floor(np.log2(largest)))
    for x in (np.asarray(normal((5, 300))), exact[None]):
        codes, scale = jax.jit(quantize_rows, static_argnums=1)(jnp.asarray(x), dtype)
        want_codes, want_scale = numpy_rows(x, dtype)
        np.testing.assert_array_equal(np.asarray(scale), want_scale)
        np.testing.assert_array_equal(
            np.asarray(codes).view(np.uint8), want_codes.view(np.uint8)
        )


@every_implementation
@pytest.mark.parametrize(
    ("held", "act"), [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E5M2)], ids=str
)
def test_product(implementation, act, held):
    weight = make_weight(held)
    multiply = jax.jit(
        functools.partial(matmul_fp8, act_dtype=act, implementation=implementation)
    )
    w_codes = np.asarray(weight.codes).view(held).astype(np.float64)
    unit = float(ml_dtypes.finfo(held).max) * float(ml_dtypes.finfo(act).max)
    for dtype, shape in [(jnp.float32, (2, 3, K)), (jnp.bfloat16, (K,))]:
        x = normal(shape, 1, dtype)
        y = multiply(x, weight)
        assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)
        codes, scale = numpy_rows(np.asarray(x, np.float32), act)
        codes = codes.astype(np.float64)
        scales = scale[..., None] * np.asarray(weight.absmax, np.float64)[:, 0] / unit
        bound = K * 2**-24 * (np.abs(codes) @ np.abs(w_codes.T)) * scales
        want = (codes @ w_codes.T) * scales
        eps = float(jnp.finfo(dtype).eps)
        bound += np.abs(want) * (eps / 2 + 3 * 2**-24)
        assert np.all(np.abs(np.asarray(y, np.float64) - want) <= bound)


@pytest.mark.parametrize(
    ("implementation", "nested"), [("xla", True), ("reference", False)]
)
def test_gradient(implementation, nested):
    """It is that of the product with the decoded matrix; W does not get one."""
    weight = make_weight(nested=nested)
    x, dy = normal((3, K), 1), normal((3, N), 2)

    def product(x, weight):
        return matmul_fp8(x, weight, act_dtype=E4M3, implementation=implementation)

    @jax.jit
    def run(x, weight, dy):
        y, pull = jax.vjp(product, x, weight)
        return y, *pull(dy)

    y, dx, dweight = run(x, weight, dy)
    for leaf in jax.tree.leaves(dweight):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)
    absmax = weight.float_absmax()
    matrix = dequantize_blockwise(
        weight.codes, absmax, FP8_E4M3, block_size=K, size=K, dtype=jnp.float32
    )
    bound = N * 2**-23 * (np.abs(dy) @ np.abs(matrix))
    assert np.all(np.abs(dx - dy @ matrix) <= bound)
    # The product uses the nested scales. Each x is off by half a step of e4m3, which is
    # 2^-4 of x, or 2^-10 of 448 if x is nearly zero.
    half_step = np.abs(x) * 2.0**-4 + np.abs(x).max(-1, keepdims=True) * 2.0**-10 / 448
    bound = half_step @ np.abs(matrix.T) * (1 + K * 2**-23)
    assert np.all(np.abs(y - x @ matrix.T) <= bound)


@every_implementation
def test_edges(implementation):
    multiply = jax.jit(
        functools.partial(matmul_fp8, act_dtype=E4M3, implementation=implementation)
    )
    x = np.array(normal((6, 6)))
    x[1], x[2, 3], x[3, 0] = 0.0, np.nan, np.inf
    x[4:] = x[0] * 2.0 ** np.array([[-100], [100]])
    y = np.asarray(multiply(x, make_weight(k=6, n=4)))
    assert np.all(np.isfinite(y[0]))
    assert np.all(y[1] == 0)
    assert not np.any(np.isfinite(y[2:4]))
    # The magnitude of a row only multiplies the result by a power of two.
    np.testing.assert_array_equal(y[4:], y[0] * 2.0 ** np.array([[-100], [100]]))
    assert multiply(jnp.ones((0, 6)), make_weight(k=6, n=4)).shape == (0, 4)
    empty = multiply(jnp.ones((3, 0)), make_weight(k=0, n=4))
    np.testing.assert_array_equal(empty, np.zeros((3, 4)))


def test_refusals():
    x, weight = normal((3, K)), make_weight()
    with pytest.raises(ValueError, match="one absmax for a whole row of the matrix"):
        matmul_fp8(x, make_weight(block_size=64), act_dtype=E4M3)
    with pytest.raises(ValueError, match=f"must be {K} to multiply"):
        matmul_fp8(x[:, 1:], weight, act_dtype=E4M3)
    with pytest.raises(TypeError, match=r"rounds x to one of .* got int8"):
        matmul_fp8(x, weight, act_dtype=jnp.int8)
    with pytest.raises(TypeError, match="needs a floating x, got int32"):
        matmul_fp8(jnp.ones(K, jnp.int32), weight, act_dtype=E4M3)
    with pytest.raises(TypeError, match="compute_dtype must be floating, got int8"):
        matmul_fp8(x, weight, act_dtype=E4M3, compute_dtype=jnp.int8)
    other = Weight(weight.codes, weight.absmax, None, NF4, K, K)
    with pytest.raises(ValueError, match="needs a matrix in fp8"):
        matmul_fp8(x, other, act_dtype=E4M3)
    with pytest.raises(ValueError, match="no implementation 'mosaic_gpu'"):
        matmul_fp8(x, weight, act_dtype=E4M3, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="at least one axis"):
        quantize_rows(jnp.float32(1), E4M3)


# A tile of warpgroup instructions. Without a GPU for timing, XLA would take 16 x 16.
TILE = "block_m: 64 block_n: 128 block_k: 64 num_stages: 2 num_warps: 4 num_ctas: 1"


def test_hopper_multiplies_fp8(tmp_path):
    """Its matrix units take both operands in the stored form."""
    replicated = jax.sharding.NamedSharding(
        hopper_compiler.mesh(), jax.sharding.PartitionSpec()
    )
    codes = jax.ShapeDtypeStruct((256, 512), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((256, 1), jnp.float32)
    compiled = jax.jit(
        lambda x, codes, absmax: matmul_fp8(
            x, Weight(codes, absmax, None, FP8_E4M3, 512, 512), act_dtype=E5M2
        ),
        in_shardings=replicated,
        out_shardings=replicated,
    )
    x = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16)
    compiled.lower(x, codes, absmax).compile(
        {"xla_dump_to": str(tmp_path), "xla_gpu_override_gemm_autotuner": TILE}
    )
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    products = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*", ptx))
    assert len(products) == 1
    assert products.pop().endswith(".f32.e5m2.e4m3")
