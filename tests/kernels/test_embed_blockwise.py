"""embed_blockwise: looking up rows, for every format and any ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unsupported import or_skip

from jaxbnb_kernels import embed_blockwise as op
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED, FP4, NF4
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import quantize_absmax, quantize_blockwise

pytestmark = pytest.mark.matrix

# Compiled, because op by op it takes ten times as long.
embed_blockwise = or_skip(
    jax.jit(op.embed_blockwise, static_argnames=("dtype", "implementation"))
)
# test_mosaic_gpu.py emulates mosaic_gpu.
RUNNABLE = [name for name in op.IMPLEMENTATIONS if name != "mosaic_gpu"]
every_implementation = pytest.mark.parametrize("implementation", RUNNABLE)

CODEBOOKS = {
    "nf4": NF4,
    "fp4": FP4,
    "int8": None,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
}


@functools.cache
def weight(name="nf4", rows=300, size=96, block_size=32, double_quant=False, seed=0):
    x = jax.random.normal(jax.random.key(seed), (rows, size))
    x = jnp.abs(x) if name == "dynamic8_unsigned" else x
    codes, absmax = jax.jit(
        lambda x: quantize_blockwise(x, CODEBOOKS[name], block_size=block_size)
    )(x)
    nested = None
    if double_quant:
        absmax, *rest = jax.jit(quantize_absmax)(absmax)
        nested = tuple(rest)
    return Weight(codes, absmax, nested, CODEBOOKS[name], block_size, size)


@pytest.mark.parametrize("double_quant", [False, True], ids=["float32", "nested"])
@pytest.mark.parametrize("name", CODEBOOKS)
# Whole blocks, a short last block, an odd number of elements, less than a block.
@pytest.mark.parametrize("size", [96, 80, 33, 5])
@pytest.mark.parametrize("implementation", RUNNABLE[:-1])
def test_the_rows_are_those_of_the_decoded_matrix(
    implementation, name, size, double_quant
):
    w = weight(name, size=size, double_quant=double_quant)
    ids = jnp.array([[0, 1, 299], [7, 7, -1], [-300, 150, 2]])
    got = embed_blockwise(ids, w, implementation=implementation)
    expected = embed_blockwise(ids, w, implementation="reference")
    assert got.shape == (3, 3, size)
    np.testing.assert_array_equal(got, expected)


@every_implementation
@pytest.mark.parametrize("double_quant", [False, True], ids=["float32", "nested"])
def test_rows_that_are_not_there_are_nan(implementation, double_quant):
    ids = jnp.array([300, -301, 2**31 - 1, -(2**31), 299])
    got = embed_blockwise(
        ids, weight(double_quant=double_quant), implementation=implementation
    )
    assert np.isnan(got[:4]).all()
    assert np.isfinite(got[4]).all()


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32])
def test_ids_of_any_integer_dtype(dtype, implementation):
    embed = functools.partial(embed_blockwise, implementation=implementation)
    ids = jnp.array([0, 5, 100], dtype)
    expected = embed(ids.astype(jnp.int32), weight())
    np.testing.assert_array_equal(embed(ids, weight()), expected)


@every_implementation
def test_ids_that_int32_does_not_hold_are_not_there(implementation):
    ids = jnp.array([2**32 - 1], jnp.uint32)
    got = embed_blockwise(ids, weight(), implementation=implementation)
    assert np.isnan(got).all()


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_result_is_rounded_once(dtype, implementation):
    embed = functools.partial(embed_blockwise, implementation=implementation)
    ids = jnp.arange(10)
    exact = embed(ids, weight())
    got = embed(ids, weight(), dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(exact.astype(dtype), np.float32)
    )


@every_implementation
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_any_number_of_ids(shape, implementation):
    ids = jnp.zeros(shape, jnp.int32)
    got = embed_blockwise(ids, weight(), implementation=implementation)
    assert got.shape == (*shape, 96)


def test_it_decodes_the_rows_that_are_looked_up_only():
    w = weight(rows=4096, size=1024, double_quant=True)
    matrix = 4096 * 1024 * 4
    ids = jnp.arange(8)
    run = jax.jit(lambda ids, w: embed_blockwise(ids, w))
    compiled = run.lower(ids, w).compile()
    # The bound is eight rows in float32 and their codes, a few times over.
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * 8 * 1024 * 4 < matrix


def test_nothing_is_differentiated():
    w = weight()

    def total(absmax):
        changed = Weight(w.codes, absmax, None, w.codebook, w.block_size, w.size)
        return jnp.sum(embed_blockwise(jnp.arange(4), changed))

    np.testing.assert_array_equal(jax.grad(total)(w.absmax), 0 * w.absmax)


@every_implementation
def test_mapped_over_ids_and_matrices(implementation):
    embed = functools.partial(embed_blockwise, implementation=implementation)
    ids = jnp.array([[0, 3], [299, -1], [5, 5]])
    got = jax.vmap(lambda ids: embed(ids, weight()))(ids)
    np.testing.assert_array_equal(got, embed(ids, weight()))
    pair = weight(), weight(seed=1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    got = jax.vmap(embed)(ids[:2], stacked)
    for row, i, w in zip(got, ids, pair, strict=False):
        np.testing.assert_array_equal(row, embed(i, w))


def test_bad_arguments():
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        embed_blockwise(jnp.ones(3), weight())
    with pytest.raises(TypeError, match="floating dtype; got int32"):
        embed_blockwise(jnp.arange(3), weight(), dtype=jnp.int32)
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        embed_blockwise(jnp.arange(3), weight(), implementation="triton")
