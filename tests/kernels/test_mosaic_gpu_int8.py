"""The int8 product for Hopper, on machines without one.

The compiled kernels, emulated instruction by instruction: without outliers bit for bit
the specification, with them within the tolerance of test_matmul_int8.py. What the
compiler made of them, which calls they serve, and that what surrounds them depends on
no value.
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
from kernel_checks import operations_of
from test_matmul_int8 import THRESHOLD, check, inputs

from jaxbnb_kernels import _pallas
from jaxbnb_kernels.matmul_int8 import (
    fused,
    matmul_int8,
    mosaic_gpu,
    quantize_rows,
    reference,
    rows,
)

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
    """The function, compiled, and its kernels by name."""
    run = functools.partial(
        mosaic_gpu.matmul_kernel,
        outlier_threshold=threshold,
        compute_dtype=BFLOAT16 if dtype == "float32" else np.dtype(dtype),
        config=config,
    )
    leading = (1,) * len(sets) + count
    program, kernels = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        # A function of its own: a kernel is reported when it is compiled.
        lambda *args: run(*args),
        jax.ShapeDtypeStruct((*sets, *count, m, k), dtype),
        jax.ShapeDtypeStruct((*leading, n, k), jnp.int8),
        jax.ShapeDtypeStruct((*leading, n), jnp.float32),
    )
    name = re.compile(r"\.entry (\w+)_mosaic_gpu_kernel")
    return run, program, {name.search(kernel.ptx)[1]: kernel for kernel in kernels}


def emulate_kernels(patch, kernels):
    """From here on, kernels are those compiled ones, emulated."""

    def kernel(body, *, out_type, grid, **_):
        def run(*arrays):
            buffers = [np.array(a).reshape(-1).view(np.uint8) for a in arrays]
            # What is not written is found out.
            written = [
                np.full(t.size * np.dtype(t.dtype).itemsize, 0xA5, np.uint8)
                for t in out_type
            ]
            *others, y, x = grid.values()
            ptx_emulator.run(
                kernels[body.__name__].ptx,
                [*buffers, *written],
                grid=(x, y, math.prod(others)),
                # Parts are of different lengths, and have outliers in other tiles.
                together=math.prod(others) == 1,
            )
            return [
                jnp.asarray(w.view(t.dtype).reshape(t.shape))
                for w, t in zip(written, out_type, strict=True)
            ]

        return run

    patch.setattr(_pallas, "kernel", kernel)


# m, n, k, dtype, threshold, config, sets of rows of one matrix, matrices, outliers.
CASES = {
    "a row": (1, 72, 384, "bfloat16", 6.0, None, (), (), [0, 3, 384]),
    "no threshold": (1, 72, 384, "bfloat16", 0.0, None, (), (), [0]),
    # Rows of W that are no whole tiles; two parts of the columns, of four tiles and of
    # five.
    "two parts": (13, 200, 1152, "bfloat16", 6.0, None, (), (), [0, 5]),
    "parts without": (13, 200, 1152, "bfloat16", 0.0, None, (), (), [0]),
    "many rows": (65, 128, 256, "float16", 6.0, None, (), (), [0, 40]),
    "float32": (3, 128, 256, "float32", 6.0, None, (), (), [0, 9]),
    # Chunks of 2,048 columns overlap.
    "long rows": (1, 64, 2176, "float16", 6.0, fused.Config(8, 64, 1), (), (), [2]),
    "sets and a stack": (2, 64, 256, "bfloat16", 6.0, None, (3,), (2,), [4]),
    # Quantised by the kernel, multiplied by XLA.
    "more rows": (65, 64, 256, "bfloat16", 6.0, None, (2,), (), [0, 7]),
}


@pytest.mark.parametrize("case", CASES)
def test_emulated(case, monkeypatch):
    m, n, k, dtype, threshold, config, sets, count, numbers = CASES[case]
    run, program, kernels = compiled(*CASES[case][:8])
    for kernel in kernels.values():
        assert kernel.spilled_bytes == kernel.stack_bytes == 0
        assert kernel.remarks == []
    if case != "more rows":
        # However many outliers there are.
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
                # Sums of integers, and the same roundings.
                spec = SPECIFICATION(x[at], *of_w, threshold, np.dtype(compute_dtype))
                np.testing.assert_array_equal(as_float(y[at]), as_float(spec))


SPECIFICATION = jax.jit(reference.matmul, static_argnums=(3, 4))


def as_float(x):
    return np.asarray(x).astype(np.float32)


EXTREMES = [np.nan, np.inf, -np.inf, 3e38, 1e-45, 1.2e-38, -5.999, 6.0, -0.0]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_rows_of_extremes(threshold, monkeypatch):
    """Codes and scales bit for bit, of zeros too; the product where it is finite."""
    m, k = 14, 256
    _, _, kernels = compiled(2 * m, 64, k, "float32", threshold, None, (5,))
    emulate_kernels(monkeypatch, kernels)
    x = np.array(inputs((m, k)))
    for i, extreme in enumerate(EXTREMES):
        # Those that are tiny lie among zeros.
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
