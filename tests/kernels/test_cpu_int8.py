"""The native LLM.int8 product, for each instruction set that this processor has.

Sums of integers are exact, and the four float32 operations after them are NumPy's. So
without outliers the result equals NumPy's bit for bit. With outliers, another product
is added: K products summed in float32 in any order, of numbers that are rounded as in
the oracle, and one more rounding.
"""

import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import INT8_ISAS, alone, check_threads, library, using
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_matmul_int8 import numpy_rows

from jaxbnb_kernels import config, native
from jaxbnb_kernels.matmul_int8 import cpu_kernel, matmul_int8

THRESHOLD = 6.0
DTYPES = ["float32", "bfloat16", "float16"]
TARGET = cpu_kernel.TARGET
every_isa = pytest.mark.parametrize("isa", INT8_ISAS)


def draw(m, n, k, outliers=0, dtype="float32", seed=0):
    """Returns x, all int8 codes, and scales. Outliers are in different columns."""
    random = np.random.default_rng(seed)
    x = np.clip(random.standard_normal((m, k)), -5, 5).astype(np.float32)
    if m:
        rows = random.integers(m, size=outliers)
        x[rows, random.permutation(k)[:outliers]] = random.uniform(6, 60, outliers)
    codes = random.integers(-128, 128, (n, k), np.int8)
    scale = np.exp(random.standard_normal(n)).astype(np.float32)
    return x.astype(jnp.dtype(dtype)), codes, scale


def multiply(x, codes, scale, threshold=THRESHOLD, compute_dtype=None):
    """Calls the kernel with the instruction set in use."""
    library()
    compute_dtype = np.dtype(compute_dtype or x.dtype)
    return _multiply(
        x, codes, scale, outlier_threshold=threshold, compute_dtype=compute_dtype
    )


@functools.partial(jax.jit, static_argnames=("outlier_threshold", "compute_dtype"))
def _multiply(*arrays, **options):
    (product,) = cpu_kernel.matmul(*arrays, **options)
    return product


def expected(x, codes, scale, threshold):
    """Returns the integer product as float32, and where the outlier columns are."""
    x = x.astype(np.float32)
    is_large = np.abs(x) >= (threshold or np.inf)
    columns = is_large.any(axis=0)
    x_codes, row_scale = numpy_rows(np.where(is_large, np.float32(0), x))
    # Exact in float64: at most 2^20 terms below 2^14.
    sums = np.where(columns, 0, x_codes).astype(np.float64) @ codes.T.astype(np.float64)
    unit = np.float32(1 / 127**2)
    return sums.astype(np.float32) * (row_scale[:, None] * scale) * unit, columns


def check(y, x, codes, scale, threshold=THRESHOLD, compute_dtype=None):
    """Compares y with NumPy's; see the docstring of this file."""
    integers, columns = expected(x, codes, scale, threshold)
    assert (y.dtype, y.shape) == (x.dtype, integers.shape)
    if not columns.any():
        np.testing.assert_array_equal(np.asarray(y), integers.astype(x.dtype))
        return
    compute_dtype = jnp.dtype(compute_dtype or x.dtype)
    steps = (scale * np.float32(1 / 127))[:, None]
    matrix = (codes[:, columns] * steps).astype(compute_dtype).astype(np.float64).T
    outliers = x[:, columns].astype(compute_dtype).astype(np.float64)
    want = integers + outliers @ matrix
    info = jnp.finfo(y.dtype)
    terms = np.abs(outliers) @ np.abs(matrix)
    tolerance = 2**-24 * (len(matrix) * terms + np.abs(want))
    tolerance += 2.0 ** -(info.nmant + 1) * np.abs(want) * (1 + 2**-8)
    tolerance += float(info.smallest_subnormal)
    error = np.abs(np.asarray(y).astype(np.float64) - want)
    assert np.all(error <= tolerance), (error / tolerance).max()


@every_isa
@pytest.mark.parametrize("m", [*range(1, 10), 16, 17, 33, 70, 530])
def test_tokens(m, isa):
    """Each number of tokens has tiles of its own."""
    for outliers in (0, 5):
        for dtype in ("float32", "bfloat16"):
            arrays = draw(m, 150, 300, outliers, dtype)
            with using(isa):
                y = multiply(*arrays)
            check(y, *arrays)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_dtypes(compute_dtype, dtype, isa):
    for m in (3, 20):
        arrays = draw(m, 48, 192, 9, dtype)
        with using(isa):
            y = multiply(*arrays, compute_dtype=compute_dtype)
        check(y, *arrays, compute_dtype=compute_dtype)


@every_isa
@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 80),
    n=st.integers(0, 300),
    k=st.integers(0, 700),
    outliers=st.sampled_from([0, 0, 1, 70, 700]),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, THRESHOLD]),
)
def test_shapes(m, n, k, outliers, dtype, threshold, isa):
    arrays = draw(m, n, k, min(outliers, k) if m else 0, dtype)
    with using(isa):
        y = multiply(*arrays, threshold=threshold)
    check(y, *arrays, threshold=threshold)


@every_isa
@pytest.mark.parametrize("m", [1, 5, 17])
def test_the_longest_sums(m, isa):
    """The most products that the API allows fill int32."""
    k = 133_144
    signs = np.where(np.arange(k) % 7, 1, -1).astype(np.float32)
    for x, codes in (
        (np.ones(k), np.full(k, 127)),
        (np.ones(k), np.full(k, -127)),
        (signs, signs * 127),
        (signs, signs * -127),
        (np.ones(k), np.where(np.arange(k) % 2, -128, 127)),
    ):
        x = np.broadcast_to(x.astype(np.float32), (m, k))
        codes = np.broadcast_to(codes.astype(np.int8), (2, k))
        scale = np.ones(2, np.float32)
        with using(isa):
            y = multiply(x, codes, scale)
        check(y, x, codes, scale)


@every_isa
@pytest.mark.parametrize("m", [4, 37])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_tokens_stay_in_their_rows(value, m, isa):
    arrays = draw(m, 90, 200)
    x = arrays[0].copy()
    x[1, 3] = value
    for threshold in (0, THRESHOLD):
        with using(isa):
            y = np.array(multiply(x, *arrays[1:], threshold=threshold))
        assert not np.isfinite(y[1]).any()
        # With a threshold, the column of an infinity is left to floating point.
        assert np.isfinite(np.delete(y, 1, axis=0)).all()


@pytest.mark.parametrize("magnitude", [2.0**-119, 1e-35, 1e30, 2.0**120])
def test_tokens_of_extreme_magnitude(magnitude):
    """127 / scale leaves the range of float32 at either end of it."""
    ratios = np.linspace(-1, 1, 65, dtype=np.float32)
    x, codes = np.float32(magnitude) * ratios[None], np.eye(65, dtype=np.int8)
    # The result is of ordinary magnitude.
    y = multiply(x, codes, np.full(65, 1 / magnitude, np.float32), threshold=0)
    # Half of one of 127 steps. Some roundings of float32 decide where x is near a half.
    ratio = np.asarray(y)[0].astype(np.float64) * 127
    np.testing.assert_allclose(ratio, ratios, rtol=0, atol=0.5001 / 127)


@pytest.mark.parametrize("threshold", [0, THRESHOLD])
@pytest.mark.parametrize("shape", [(40, 128), (7, 33)], ids=["aligned", "unaligned"])
def test_matrices_and_what_they_share(shape, threshold):
    """Each example has its own outlier columns."""
    library()
    sets = [draw(5, *shape, count, seed=count) for count in (0, 3, 30)]
    x, codes, scale = (np.stack(arrays) for arrays in zip(*sets, strict=True))
    call = functools.partial(
        matmul_int8, outlier_threshold=threshold, implementation="cpu"
    )
    each = jax.jit(jax.vmap(call))(x, codes, scale)
    shared = jax.jit(jax.vmap(call, (0, None, None)))(x, codes[1], scale[1])
    for i, arrays in enumerate(sets):
        check(each[i], *arrays, threshold=threshold)
        check(shared[i], arrays[0], codes[1], scale[1], threshold=threshold)


@pytest.mark.parametrize(
    ("specs", "threshold", "collectives"),
    [
        ((P("data", None), P(), P()), 0, set()),
        ((P(), P("data", None), P("data")), 0, set()),
        ((P("data", None), P("model", None), P("model")), 0, set()),
        # All rows decide which columns have outliers.
        ((P("data", None), P("model", None), P("model")), THRESHOLD, {"all-gather"}),
    ],
    ids=["tokens", "columns", "both", "outliers"],
)
def test_divided(specs, threshold, collectives):
    library()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays = draw(8, 32, 64, 3)
    divided = (
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(arrays, specs, strict=True)
    )
    call = functools.partial(
        matmul_int8, outlier_threshold=threshold, implementation="cpu"
    )
    compiled = jax.jit(call).lower(*divided).compile()
    text = compiled.as_text()
    assert TARGET in text
    sent = re.findall(r" (all-[a-z]+|collective-permute)\(", text)
    assert set(sent) == collectives
    check(jax.jit(call)(*arrays), *arrays, threshold=threshold)


def test_the_kernel_runs_by_itself_except_where_xla_has_tiles(monkeypatch):
    library()
    arrays = draw(5, 40, 128)

    def is_native(**options):
        call = functools.partial(matmul_int8, outlier_threshold=THRESHOLD, **options)
        return TARGET in jax.jit(call).lower(*arrays).as_text()

    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    with config.override(cpu="always"):
        assert is_native()
    with config.override(cpu="never"):
        assert not is_native()
    monkeypatch.setattr(native, "instruction_set", lambda: "amx")
    with config.override(cpu="always"):
        assert not is_native()
        assert is_native(implementation="cpu")


def digest_of_results():
    """A digest of products of each kind, with this process's threads."""
    digest = hashlib.sha256()
    for m in (1, 9, 100):
        for dtype in ("float32", "bfloat16"):
            y = multiply(*draw(m, 500, 704, 40, dtype))
            digest.update(np.asarray(y).tobytes())
    return digest.hexdigest()


@alone
def test_numbers_do_not_depend_on_threads():
    check_threads("test_cpu_int8", digest_of_results())
