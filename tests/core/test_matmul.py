"""jaxbnb.matmul: shapes, stacks and errors. tests/kernels checks its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb

plain_and_double = pytest.mark.parametrize(
    "double_quant", [False, True], ids=["plain", "double"]
)


def normal(shape, dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x, dtype)


def check(y, x, matrix):
    """A float32 sum is off by at most K 2^-24 sum |x w|."""
    x, matrix = np.asarray(x, np.float64), np.asarray(matrix, np.float64)
    tolerance = (matrix.shape[-2] + 1) * 2**-24 * (np.abs(x) @ np.abs(matrix))
    assert y.shape == (x @ matrix).shape
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ matrix) <= tolerance)


@plain_and_double
@pytest.mark.parametrize("axis", [-1, -2, 0, 1])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "dynamic8"])
def test_both_axes_of_a_matrix(quant_type, axis, double_quant):
    q = jaxbnb.quantize(
        normal((128, 65)), quant_type, axis=axis, double_quant=double_quant
    )
    x = normal((5, 128), seed=1)
    check(jaxbnb.matmul(x, q), x, q.dequantize())


@plain_and_double
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_stack_of_matrices(axis, double_quant):
    q = jaxbnb.quantize(
        normal((2, 3, 128, 65)), "nf4", axis=axis, double_quant=double_quant
    )
    x = normal((2, 3, 5, 128), seed=1)
    check(jaxbnb.matmul(x, q), x, q.dequantize())


@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 3, 128)], ids=str)
def test_batch_axes_of_x(shape):
    q = jaxbnb.quantize(normal((128, 65)), "nf4", axis=-2)
    x = normal(shape, seed=1)
    check(jaxbnb.matmul(x, q), x, q.dequantize())


def test_dtypes():
    q = jaxbnb.quantize(normal((128, 65)), "nf4", axis=-2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        assert jaxbnb.matmul(normal((5, 128), dtype), q).dtype == dtype
    x = normal((5, 128))
    y = jaxbnb.matmul(x, q, compute_dtype=jnp.bfloat16)
    assert y.dtype == jnp.float32
    # The operands are bfloat16, and the sum float32.
    rounded = x.astype(jnp.bfloat16), q.dequantize(jnp.bfloat16)
    check(y, *(a.astype(jnp.float32) for a in rounded))
    numpy_x = np.asarray(x)
    np.testing.assert_array_equal(jaxbnb.matmul(numpy_x, q), jaxbnb.matmul(x, q))


@plain_and_double
def test_gradient(double_quant):
    q = jaxbnb.quantize(normal((128, 65)), "nf4", axis=-2, double_quant=double_quant)
    x, dy = normal((5, 128), seed=1), normal((5, 65), seed=2)
    _, vjp = jax.vjp(lambda x: jaxbnb.matmul(x, q), x)
    check(vjp(dy)[0], dy, q.dequantize().T)


def test_the_weight_gets_no_gradient():
    q = jaxbnb.quantize(normal((128, 65)), "nf4", axis=-2)
    x = normal((5, 128), seed=1)
    grads = jax.grad(lambda q: jnp.sum(jaxbnb.matmul(x, q)), allow_int=True)(q)
    assert grads.codes.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grads.absmax, 0.0)


def test_as_layers_of_a_scan():
    """A stack goes forward and backward, one matrix per step."""
    q = jaxbnb.quantize(normal((4, 64, 64)) / 8, "nf4", axis=-2, double_quant=True)
    x = normal((5, 64), seed=1)

    def loop(x, matrices):
        for matrix in matrices:
            x = x @ matrix
        return jnp.sum(x**2)

    def scanned(x):
        y, _ = jax.lax.scan(lambda x, q: (jaxbnb.matmul(x, q), None), x, q)
        return jnp.sum(y**2)

    got = jax.jit(jax.value_and_grad(scanned))(x)
    want = jax.value_and_grad(loop)(x, q.dequantize())
    # Each way has four products of 64 terms with random signs.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want
    )


@pytest.mark.parametrize("implementation", ["xla", "reference", None])
def test_implementations(implementation):
    q = jaxbnb.quantize(normal((128, 65)), "nf4", axis=-2)
    x = normal((5, 128), seed=1)
    check(jaxbnb.matmul(x, q, implementation=implementation), x, q.dequantize())


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_operators(array):
    """``x @ q`` and ``q @ x`` are products, also in a stack and a loop over it."""
    w, x = normal((3, 64, 32)), array(normal((2, 64)))
    q = jaxbnb.quantize(w, "int8", axis=-2)
    want = jaxbnb.matmul(x, q[1])
    np.testing.assert_array_equal(x @ q[1], want)
    np.testing.assert_array_equal(jax.jit(lambda x, q: x @ q)(x, q[1]), want)
    np.testing.assert_array_equal(q[1].T @ x.T, want.T)
    np.testing.assert_array_equal(q[1].T @ x[0], jaxbnb.matmul(x[0], q[1]))
    stack = array(np.broadcast_to(x, (3, 2, 64)))
    np.testing.assert_allclose((stack @ q)[1], want, rtol=0, atol=1e-5)
    assert [each.shape for each in q] == [(64, 32)] * 3
    np.testing.assert_array_equal(list(q)[1].codes, q.codes[1])


def test_operators_that_say_what_to_do():
    q = jaxbnb.quantize(normal((3, 64, 32)), "llm_int8", axis=-2)
    with pytest.raises(ValueError, match="use mT to transpose each"):
        _ = q.T
    with pytest.raises(TypeError, match="both factors are quantised"):
        q[0] @ q[0].T
    with pytest.raises(ValueError, match="along axis=-2"):
        q[0] @ jnp.ones(32)
    with pytest.raises(ValueError, match="shapes do not multiply"):
        jnp.ones((2, 32)) @ q[0]
    with pytest.raises(IndexError, match="0 batch axes to index"):
        list(q[0])
    with pytest.raises(TypeError, match="quantised already"):
        jaxbnb.quantize(q, "nf4")


def test_refusals():
    q = jaxbnb.quantize(normal((128, 64)), "nf4", axis=-2)
    x = normal((5, 128))
    with pytest.raises(TypeError, match="got ArrayImpl; make one with"):
        jaxbnb.matmul(x, q.dequantize())
    with pytest.raises(
        ValueError, match=r"x \(5, 64\) by \(128, 64\); the last axis of x must be 128"
    ):
        jaxbnb.matmul(normal((5, 64)), q)
    with pytest.raises(ValueError, match=r"x \(\) by \(128, 64\)"):
        jaxbnb.matmul(jnp.float32(1), q)
    with pytest.raises(TypeError, match="needs a floating x, got int32"):
        jaxbnb.matmul(jnp.ones((5, 128), jnp.int32), q)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        jaxbnb.matmul(x, q, implementation="cuda")
    with pytest.raises(ValueError, match=r"needs a matrix.*got shape \(128,\)"):
        jaxbnb.matmul(x, jaxbnb.quantize(normal((128,)), "nf4"))
    deep = jaxbnb.quantize(normal((4, 128, 64)), "nf4", axis=0)
    with pytest.raises(ValueError, match="blocked along axis -3"):
        jaxbnb.matmul(normal((4, 5, 128)), deep)
    stack = jaxbnb.quantize(normal((4, 128, 64)), "nf4")
    for shape in ((5, 128), (3, 5, 128), (4, 1, 5, 128)):
        with pytest.raises(ValueError, match=r"of shape \(4, 'm', 128\); got"):
            jaxbnb.matmul(normal(shape), stack)


def test_fp8_by_fp8():
    """A stack of matrices works; other arguments raise errors."""
    config = jaxbnb.QuantConfig("fp8_e4m3", act_quant_type="fp8_e4m3")
    x, q = normal((2, 5, 128)), config.quantize_kernel(normal((2, 128, 64), seed=1))
    y = jaxbnb.matmul(x, q, act_quant_type="fp8_e4m3")
    matrix = q.dequantize()
    # Each x is off by half a step of e4m3, 2^-4 of x.
    bound = (2**-4 + 130 * 2**-24) * (np.abs(x) @ np.abs(matrix))
    assert np.all(np.abs(y - x @ matrix) <= bound)
    assert not np.allclose(y, jaxbnb.matmul(x, q), rtol=1e-3)
    for name, message in (
        ("fp8_e4m3", r"block_size of at least 128.*blocks of 64"),
        ("int8", r"quant_type must be one of.*got 'int8'"),
    ):
        q = jaxbnb.quantize(normal((128, 64)), name, axis=-2)
        with pytest.raises(ValueError, match=message):
            jaxbnb.matmul(x[0], q, act_quant_type="fp8_e4m3")


def test_compute_dtype_is_floating():
    q = jaxbnb.quantize(normal((128, 64)), "nf4", axis=-2)
    with pytest.raises(TypeError, match="compute_dtype"):
        jaxbnb.matmul(normal((5, 128)), q, compute_dtype=jnp.int32)
    with pytest.raises(TypeError, match="dtype"):
        q.dequantize(jnp.int8)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("nf4", 1),
        ("nf4", 16),
        ("nf4", 512),
        ("int8", 1),
        ("int8", 512),
        ("llm_int8", 1),
        ("llm_int8", 512),
    ],
)
def test_temporaries_are_at_most_one_matrix_in_the_compute_dtype(name, rows):
    """An output and its gradient are compiled for shapes, without any arrays."""
    size = 1024
    config = jaxbnb.QuantConfig(name, double_quant=name != "llm_int8")
    q = jax.eval_shape(lambda: config.quantize_kernel(jnp.zeros((size, size))))
    x = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16)

    def gradient(x, q, dy):
        return jax.vjp(lambda x: jaxbnb.matmul(x, q), x)[1](dy)[0]

    # The bound adds the decoded absmax and arrays as large as x: its even and odd
    # columns and the float32 result; for LLM.int8 the int32 result, x in int8 and x
    # masked.
    bound = 2 * size**2 + 4 * size**2 // 64 + 10 * x.size + 2**14
    for function, args in ((jaxbnb.matmul, (x, q)), (gradient, (x, q, x))):
        compiled = jax.jit(function).lower(*args).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= bound


def test_rows_of_an_embedding_take_no_matrix():
    q = jax.eval_shape(lambda: jaxbnb.quantize(jnp.zeros((4096, 256)), "nf4"))
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    compiled = jax.jit(jaxbnb.core.embed).lower(ids, q).compile()
    # The bound covers the rows' codes, and their elements in int32 and float32.
    assert compiled.memory_analysis().temp_size_in_bytes <= 9 * 64 * 256
