"""The int8 product for Hopper, on machines without one.

The compiled kernels are emulated instruction by instruction. Without outliers they
equal the specification bit for bit, and with them they are within the tolerance of
test_matmul_int8.py. The tests also count instructions, cover which calls the kernels
serve, and check that the program around them does not depend on values.
"""

import functools
import math
import re

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
from kernel_checks import lowered_for, operations_of
from test_matmul_int8 import THRESHOLD, check, inputs

from jaxbnb_kernels import config
from jaxbnb_kernels._mosaic_gpu import pallas
from jaxbnb_kernels.matmul_int8 import (
    matmul_int8,
    mosaic_gpu_kernel,
    quantize_rows,
    reference,
)
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_product as product_kernel
from jaxbnb_kernels.matmul_int8 import mosaic_gpu_kernel_rows as rows

BFLOAT16 = np.dtype(jnp.bfloat16)


def weight(n, k, leading=()):
    return jax.jit(quantize_rows)(inputs((*leading, n, k), seed=7) / 10)


def matmul(x, codes, col_scale, threshold=THRESHOLD, implementation="mosaic_gpu"):
    return matmul_int8(
        x,
        codes,
        col_scale,
        outlier_threshold=threshold,
        compute_dtype=BFLOAT16 if x.dtype == jnp.float32 else None,
        implementation=implementation,
    )


# The compiled kernels.


@functools.cache
def compiled(m, n, k, dtype, threshold, config=None, sets=(), count=()):
    """Returns the compiled function, and its kernels by name."""
    run = functools.partial(
        mosaic_gpu_kernel.matmul,
        outlier_threshold=threshold,
        compute_dtype=BFLOAT16 if dtype == "float32" else np.dtype(dtype),
        config=config,
    )
    leading = (1,) * len(sets) + count
    program, kernels = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        # A new function: a kernel is reported only when it is compiled.
        lambda *args: run(*args),
        jax.ShapeDtypeStruct((*sets, *count, m, k), dtype),
        jax.ShapeDtypeStruct((*leading, n, k), jnp.int8),
        jax.ShapeDtypeStruct((*leading, n), jnp.float32),
    )
    name = re.compile(r"\.entry (\w+)_mosaic_gpu_kernel")
    return run, program, {name.search(kernel.ptx)[1]: kernel for kernel in kernels}


def emulate_kernels(patch, kernels):
    """Replaces kernels by the emulated compiled ones."""

    def kernel(body, *, out_type, grid, **_):
        def run(*arrays):
            buffers = [np.array(a).reshape(-1).view(np.uint8) for a in arrays]
            # Elements that are never written stay 0xA5.
            written = [
                np.full(t.size * np.dtype(t.dtype).itemsize, 0xA5, np.uint8)
                for t in out_type
            ]
            *others, y, x = grid.values()
            ptx_emulator.run(
                kernels[body.__name__].ptx,
                [*buffers, *written],
                grid=(x, y, math.prod(others)),
                # Parts differ in length, and have outliers in different tiles.
                together=math.prod(others) == 1,
            )
            return [
                jnp.asarray(w.view(t.dtype).reshape(t.shape))
                for w, t in zip(written, out_type, strict=True)
            ]

        return run

    patch.setattr(pallas, "kernel", kernel)


# m, n, k, dtype, threshold, config, sets of rows per matrix, matrices, outliers.
CASES = {
    "a row": (1, 72, 384, "bfloat16", 6.0, None, (), (), [0, 3, 384]),
    "no threshold": (1, 72, 384, "bfloat16", 0.0, None, (), (), [0]),
    # The rows of W do not fill whole tiles. The columns have two parts, of four and of
    # five tiles.
    "two parts": (13, 200, 1152, "bfloat16", 6.0, None, (), (), [0, 5]),
    "parts without": (13, 200, 1152, "bfloat16", 0.0, None, (), (), [0]),
    "many rows": (65, 128, 256, "float16", 6.0, None, (), (), [0, 40]),
    "float32": (3, 128, 256, "float32", 6.0, None, (), (), [0, 9]),
    # Its chunks of 2,048 columns overlap.
    "long rows": (
        1,
        64,
        2176,
        "float16",
        6.0,
        product_kernel.Config(8, 64, 1),
        (),
        (),
        [2],
    ),
    "sets and a stack": (2, 64, 256, "bfloat16", 6.0, None, (3,), (2,), [4]),
    # The kernel quantises, and XLA multiplies.
    "more rows": (5, 64, 256, "bfloat16", 6.0, None, (2,), (), [0, 7]),
}


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES)
def test_emulated(case, monkeypatch):
    m, n, k, dtype, threshold, _, sets, count, numbers = CASES[case]
    if case == "more rows":
        monkeypatch.setattr(mosaic_gpu_kernel, "MOST_TOKENS", 9)
    run, program, kernels = compiled(*CASES[case][:8])
    for kernel in kernels.values():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0
        assert kernel.remarks == []
    if case != "more rows":
        # This holds for any number of outliers.
        assert not {"while", "conditional", "gather"} & set(operations_of(program))
        assert set(kernels) == {"quantize_rows", "matmul_int8"}
    emulate_kernels(monkeypatch, kernels)
    w = weight(n, k, count)
    shaped = [a.reshape((1,) * len(sets) + a.shape) for a in w]
    compute_dtype = "bfloat16" if dtype == "float32" else dtype
    for outliers in numbers:
        leading = list(np.ndindex(*sets, *count))
        xs = [inputs((m, k), outliers, seed=i) for i in range(len(leading))]
        x = jnp.stack(xs).reshape(*sets, *count, m, k).astype(dtype)
        (y,) = run(x, *shaped)
        assert y.shape == (*sets, *count, m, n)
        for at in leading:
            of_w = [a[at[len(sets) :]] for a in w]
            check(y[at], x[at], of_w, threshold, compute_dtype)
            if not outliers:
                # The sums of integers and the roundings are the same.
                spec = SPECIFICATION(x[at], *of_w, threshold, np.dtype(compute_dtype))
                np.testing.assert_array_equal(as_float(y[at]), as_float(spec))


SPECIFICATION = jax.jit(reference.matmul, static_argnums=(3, 4))


def as_float(x):
    return np.asarray(x).astype(np.float32)


def test_the_decoder_of_every_byte(monkeypatch):
    """A unit matrix of outliers shows each byte in each place, with three scales."""
    m, n, dtype = 128, 256, "bfloat16"
    run, _, kernels = compiled(m, n, m, dtype, THRESHOLD)
    emulate_kernels(monkeypatch, kernels)
    row, column = np.indices((n, m))
    codes = jnp.asarray((row + 37 * column) % 256 - 128, jnp.int8)
    scale = jnp.asarray(np.resize(np.float32([1, 0.37, 1e-3]), n))
    (y,) = run(jnp.asarray(8 * np.eye(m), dtype), codes, scale)
    decoded = reference.decode(codes, scale, np.dtype(dtype))
    np.testing.assert_array_equal(as_float(y).T, 8 * as_float(decoded))


EXTREMES = [np.nan, np.inf, -np.inf, 3e38, 1.2e-38, -5.999, 6.0, -0.0]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_rows_of_extremes(threshold, monkeypatch):
    """Codes and scales agree bit for bit, even for zeros; so do finite products."""
    m, k = 14, 256
    _, _, kernels = compiled(2 * m, 64, k, "float32", threshold, None, (5,))
    emulate_kernels(monkeypatch, kernels)
    x = np.array(inputs((m, k)))
    for i, extreme in enumerate(EXTREMES):
        # Tiny values are surrounded by zeros.
        x[i] *= abs(extreme) > 1 or extreme != extreme
        x[i, 7 * i] = extreme
    x[len(EXTREMES)] = 0
    x[len(EXTREMES) + 1] *= 1e37
    x = jnp.asarray(x)
    columns = reference.columns_of(reference.is_outlier(x, threshold))
    codes, scale = rows.quantize(
        x[None, None],
        columns[None, None] if threshold else None,
        threshold,
        None,
        m,
    )[:2]
    want_codes, want_scale, _ = jax.jit(reference.quantize_inliers, static_argnums=1)(
        x, threshold
    )
    np.testing.assert_array_equal(scale[0], want_scale)
    finite = np.isfinite(want_scale)
    assert finite.tolist().count(False) == (1 if threshold else 3)
    np.testing.assert_array_equal(codes[0][finite], want_codes[finite])


# A thread holds 64 sums of integers, 64 of outliers, and W's codes twice.
def test_what_the_compiler_makes_of_a_large_product():
    m = 64
    _, program, kernels = compiled(m, 4096, 14336, "bfloat16", THRESHOLD)
    for kernel in kernels.values():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0
        assert kernel.remarks == []
    product = kernels["matmul_int8"]
    assert product.registers <= 255
    # A tile has four products of 32 columns with two times 64 rows. Its outliers have
    # eight of 16. Each occurs once in the program.
    assert (product.count("IGMMA"), product.count("HGMMA")) == (8, 16)
    # Each of a thread's 128 weights takes two instructions to become float32, one to
    # scale, a half to round, and a half for the rest.
    assert len(product.loop) <= 6 * 128
    quantise = kernels["quantize_rows"]
    # Each multiprocessor holds at least two warpgroups.
    assert quantise.registers <= 128
    assert len(quantise.sass) <= 24 * 14336 / 128
    # x's codes and outliers, and the parts of the sums, are not copied.
    assert not {"while", "conditional", "copy"} & set(operations_of(program))
    config = product_kernel.heuristic(m, 4096, 14336)
    assert config == product_kernel.Config(m, 128, 8)
    of_x, of_sums = m * 14336 * (1 + 2), m * 4096 * config.split_k * (4 + 4)
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary <= of_x + of_sums + 4 * 14336 + 4096


def test_without_outliers_a_tile_is_a_few_instructions():
    """The loop has several tiles with eight products each."""
    _, _, kernels = compiled(8, 4096, 14336, "bfloat16", 0.0)
    product = kernels["matmul_int8"]
    assert product.remarks == []
    assert product.registers <= 128
    tiles = sum(name.startswith("IGMMA") for name in product.loop) / 8
    # A thread reads its 128 weights 16 bytes at a time. The other instructions compute
    # addresses and move a tile of x.
    assert len(product.loop) <= 0.7 * 128 * tiles


# Calls that it serves.


def kernels_in(fn, *args):
    """Returns the operations that a function runs as kernels on Hopper."""
    text = lowered_for(hopper_compiler.mesh(), fn, *args)
    found = re.findall(r"custom_call @mosaic_gpu.*?(matmul_int8|quantize_rows)", text)
    assert text.count("custom_call @mosaic_gpu") == len(found)
    return found


BOTH = ["quantize_rows", "matmul_int8"]


def test_few_rows_are_multiplied_by_the_kernel_and_many_by_xla():
    w = weight(64, 256)
    for shape in [(256,), (8, 256), (2, 64, 256)]:
        x = jnp.ones(shape, jnp.bfloat16)
        assert kernels_in(matmul, x, *w) == BOTH
    assert kernels_in(matmul, jnp.ones((129, 256)), *w) == BOTH[:1]


@pytest.mark.parametrize(
    ("x", "n", "options", "reason"),
    [
        (np.ones((8, 192), np.float32), 64, {}, "a multiple of 128 columns"),
        (np.ones((8, 2**15 + 128), jnp.bfloat16), 1, {}, "at most 32768"),
        (np.ones((0, 256), jnp.bfloat16), 64, {}, "not support empty arrays"),
        (np.ones((8, 256), jnp.bfloat16), 0, {}, "not support empty arrays"),
        (np.ones((8, 256), jnp.float8_e5m2), 64, {}, "not support float8_e5m2"),
        (
            np.ones((8, 256), np.float32),
            64,
            {"compute_dtype": np.float32},
            "outliers in 16 bits; got compute_dtype float32",
        ),
        (np.ones((8, 256), np.float32), 64, {}, "this is lowered for cpu"),
    ],
    ids=["columns", "long rows", "no rows", "no columns", "float8", "float32", "a CPU"],
)
def test_what_is_not_served(x, n, options, reason):
    codes, scale = np.zeros((n, x.shape[1]), np.int8), np.zeros(n, np.float32)
    options = {"compute_dtype": BFLOAT16} | options
    with pytest.raises(NotImplementedError, match=reason):
        matmul_int8(
            x, codes, scale, outlier_threshold=6, implementation="mosaic_gpu", **options
        )


def test_without_a_threshold_any_compute_dtype_is_served():
    def run(x, *w):
        return matmul_int8(x, *w, outlier_threshold=0, implementation="mosaic_gpu")

    assert kernels_in(run, jnp.ones((8, 256)), *weight(64, 256)) == BOTH


def test_one_matrix_of_many_x_is_not_repeated():
    xs = jnp.ones((2, 3, 4, 256), jnp.bfloat16)
    fn = jax.vmap(jax.vmap(matmul, (0, None, None)), (0, None, None))
    text = lowered_for(hopper_compiler.mesh(), fn, xs, *weight(192, 256))
    _, call = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    # Rows of x are side by side, a multiple of the tile, with one matrix.
    assert "tensor<1x32x256xi8>" in call
    assert "tensor<1x192x256xi8>" in call


def test_the_gradient_is_that_of_every_implementation():
    x = jnp.ones((8, 256), jnp.bfloat16)

    def loss(x, *w):
        return jnp.sum(jnp.sin(matmul(x, *w).astype(jnp.float32)))

    assert kernels_in(jax.grad(loss), x, *weight(64, 256)) == BOTH


def test_switched_off_the_cpu_has_the_same_numbers(monkeypatch):
    codes, scale = weight(64, 128, (2, 3))
    x = jnp.stack([inputs((5, 128), 3, seed=i) for i in range(6)]).reshape(2, 3, 5, 128)
    x = x.astype(jnp.float16)

    def transformed():
        # A new function, because traces are cached.
        def run(x, codes, scale):
            return matmul(x, codes, scale, implementation=None)

        @jax.jit
        def all_of(x, codes, scale):
            one = codes[0, 0], scale[0, 0]
            return (
                run(x, *one),
                jax.vmap(run, (None, 0, 0))(x[0, 0], codes[0], scale[0]),
                jax.vmap(jax.vmap(run), (0, None, None))(x, codes[0], scale[0]),
            )

        args = x, codes, scale
        return str(jax.make_jaxpr(all_of)(*args)), all_of(*args)

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    jaxpr, expected = transformed()
    assert "choose_implementation" not in jaxpr
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    jaxpr, got = transformed()
    assert "choose_implementation" in jaxpr
    # XLA chooses the order of the same sums of up to 128 terms, which are rounded.
    for a, b in zip(got, expected, strict=True):
        a, b = as_float(a), as_float(b)
        np.testing.assert_allclose(a, b, rtol=2**-10, atol=1e-5 * np.abs(b).max())
