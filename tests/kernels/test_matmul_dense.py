"""The contract of matmul_dense: the product, its derivative, and where a kernel runs.

Products of numbers of 16 bits are exact in float32. So the tolerance is K sums in
float32 in any order, and one rounding of the result.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import ISAS, library, using
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbnb_kernels import config
from jaxbnb_kernels.matmul_dense import matmul_dense

both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["W", "W.T"])
TARGET = "jaxbnb_cpu_matmul_dense"


def draw(*shape, seed=0, dtype="bfloat16"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.dtype(dtype))


def check(y, x, weight):
    """Compares y with the product in float64; see the docstring of this file."""
    x, weight = (np.asarray(a, np.float64) for a in (x, weight))
    expected, terms = x @ weight, np.abs(x) @ np.abs(weight)
    rounding = 2.0 ** -(jnp.finfo(y.dtype).nmant + 1) + 2**-24
    tolerance = len(weight) * 2**-24 * terms + rounding * np.abs(expected) + 1e-37
    assert y.shape == expected.shape
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert np.all(error <= tolerance), (error / tolerance).max()


# Few tokens; less than a group, a strip or a tile; and several panels of each kind.
SIZES = [(1, 5, 3), (4, 70, 130), (7, 33, 65), (40, 64, 32), (70, 600, 300)]


@both_ways
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_float32", [False, True], ids=["x", "float32 x"])
@pytest.mark.parametrize("isa", ISAS)
def test_product_of_the_kernel(isa, is_float32, dtype, transpose):
    with using(isa):
        library()
        for m, rows, size in SIZES:
            weight = draw(rows, size, seed=1, dtype=dtype)
            x_dtype = "float32" if is_float32 else dtype
            x = draw(m, size if transpose else rows, seed=2, dtype=x_dtype)
            y = matmul_dense(x, weight, transpose=transpose, implementation="cpu")
            assert y.dtype == x.dtype
            # Rounded to the dtype of the matrix, whatever that of the result.
            check(y, x.astype(dtype), weight.T if transpose else weight)


@both_ways
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_product_of_xla(dtype, transpose):
    weight = draw(70, 40, seed=1, dtype=dtype)
    x = draw(2, 3, 40 if transpose else 70, dtype=dtype)
    y = matmul_dense(x, weight, transpose=transpose)
    rows = x.reshape(6, -1)
    check(y.reshape(6, -1), rows, weight.T if transpose else weight)


@both_ways
@pytest.mark.parametrize(("rows", "size"), [(8, 8), (8, 24), (24, 8)])
def test_derivative(rows, size, transpose):
    """All integers are small, so that every sum and result is exact."""
    rng = np.random.default_rng(0)
    k, n = (size, rows) if transpose else (rows, size)
    x, weight, dy = (
        jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)
        for shape in ((3, 5, k), (rows, size), (3, 5, n))
    )
    _, pull_back = jax.vjp(
        lambda *args: matmul_dense(*args, transpose=transpose), x, weight
    )
    _, want = jax.vjp(lambda x, w: x @ (w.T if transpose else w), x, weight)
    jax.tree.map(np.testing.assert_array_equal, pull_back(dy), want(dy))
    _, pull_back = jax.vjp(
        lambda *args: matmul_dense(*args, transpose=transpose),
        x.astype(jnp.float32),
        weight,
    )
    dx, dweight = pull_back(dy.astype(jnp.float32))
    assert (dx.dtype, dweight.dtype) == (jnp.float32, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, (dx, dweight), want(dy))


def test_a_frozen_matrix_keeps_no_input():
    x, weight = draw(6, 40), draw(40, 24)
    for function, args, shapes in (
        (lambda x: matmul_dense(x, weight), (x,), {(40, 24)}),
        (matmul_dense, (x, weight), {(40, 24), (6, 40)}),
    ):
        _, pull_back = jax.vjp(function, *args)
        kept = {leaf.shape for leaf in jax.tree.leaves(pull_back) if leaf.ndim}
        assert kept == shapes


def test_mapped():
    """Over rows that share a matrix, and over matrices."""
    library()
    x, weights = draw(3, 2, 40), draw(3, 40, 24)
    mapped = jax.jit(
        jax.vmap(lambda x, w: matmul_dense(x, w, implementation="cpu"), (0, None))
    )
    check(mapped(x, weights[0]).reshape(6, 24), x.reshape(6, 40), weights[0])
    mapped = jax.jit(jax.vmap(lambda x, w: matmul_dense(x, w, implementation="cpu")))
    for y, *arrays in zip(mapped(x, weights), x, weights, strict=True):
        check(y, *arrays)


@pytest.mark.parametrize(
    ("specs", "collectives"),
    [
        ((P("data", None), P()), set()),
        ((P(), P(None, "data")), set()),
        ((P("data", None), P(None, "model")), set()),
        ((P(None, "data"), P("data", None)), {"all-reduce"}),
    ],
    ids=["tokens", "columns", "both", "a sum"],
)
def test_divided(specs, collectives):
    """Each device computes its part, and only sums are sent."""
    library()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, weight = draw(8, 64), draw(64, 32, seed=1)
    x, weight = (
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip((x, weight), specs, strict=True)
    )
    multiply = jax.jit(lambda x, w: matmul_dense(x, w, implementation="cpu"))
    text = multiply.lower(x, weight).compile().as_text()
    assert TARGET in text
    sent = re.findall(r" (all-[a-z]+|collective-permute)\(", text)
    assert set(sent) == collectives
    check(multiply(x, weight), x, weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernel_runs_for_16_bits(dtype):
    library()
    x, weight = draw(6, 40, dtype=dtype), draw(40, 24, dtype=dtype)
    with config.override(cpu="always"):
        assert TARGET in jax.jit(matmul_dense).lower(x, weight).as_text()


def test_float32_is_multiplied_by_xla():
    library()
    x, weight = draw(6, 40, dtype="float32"), draw(40, 24, dtype="float32")
    assert TARGET not in jax.jit(matmul_dense).lower(x, weight).as_text()
    message = "multiplies bfloat16 and float16, got float32"
    with pytest.raises(NotImplementedError, match=message):
        matmul_dense(x, weight, implementation="cpu")


def test_gradient_of_the_matrix_transposes_no_array_of_all_tokens():
    """XLA on a CPU copies both operands of a product that sums over two axes."""

    def count(multiply):
        def gradient(x, weight, dy):
            return jax.vjp(lambda w: multiply(x, w), weight)[1](jnp.tanh(dy))[0]

        shapes = (4, 128, 16), (16, 384), (4, 128, 384)
        args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        text = jax.jit(gradient).lower(*args).compile().as_text()
        return len(re.findall(r"= f32\[384,512\]", text))

    assert count(jnp.matmul) > 0
    assert count(matmul_dense) == 0


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (draw(2, 3), draw(4, 5), ValueError, r"axis of x must be 4 .* got \(2, 3\)"),
        (draw(2, 4), draw(2, 4, 5), ValueError, r"a matrix; got shape \(2, 4, 5\)"),
        (draw(2, 4), draw(4, 5, dtype="float32"), TypeError, "bfloat16 and float32"),
    ],
)
def test_wrong_arguments(x, weight, error, message):
    with pytest.raises(error, match=message):
        matmul_dense(x, weight)
