"""quantize, dequantize and the pytree between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxbnb
from jaxbnb.core import formats

# Formats that store scales have a file of their own.
QUANT_TYPES = [name for name in formats.CODEBOOKS if name not in formats.SCALED]
# Formats with blocks; llm_int8 has its own tests.
BLOCKWISE = [name for name in QUANT_TYPES if name != "llm_int8"]

every_blockwise_type = pytest.mark.parametrize("quant_type", BLOCKWISE)
every_type = pytest.mark.parametrize("quant_type", QUANT_TYPES)
plain_and_double = pytest.mark.parametrize(
    "double_quant", [False, True], ids=["plain", "double"]
)


def normal(shape, dtype=jnp.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x, dtype)


def assert_same(got, want):
    """Compares two QuantizedArrays leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- The layout.


@every_blockwise_type
@plain_and_double
def test_children(quant_type, double_quant):
    q = jaxbnb.quantize(
        jnp.abs(normal((3, 5, 101))), quant_type, double_quant=double_quant
    )
    stored = 51 if quant_type in ("nf4", "fp4", "int4") else 101
    assert (q.codes.shape, q.absmax.shape) == ((3, 5, stored), (3, 5, 2))
    assert q.codes.dtype == (jnp.int8 if quant_type == "int8" else jnp.uint8)
    assert q.double_quant == double_quant
    if double_quant:
        assert (q.nested_absmax.shape, q.offset.shape) == ((3, 1), (3,))
        assert q.nested_absmax.dtype == q.offset.dtype == jnp.float32
        assert q.absmax.dtype == jnp.uint8
    else:
        assert q.nested_absmax is None
        assert q.offset is None
        assert q.absmax.dtype == jnp.float32
    assert (q.shape, q.ndim, q.size) == ((3, 5, 101), 3, 1515)
    assert (q.dtype, q.axis, q.axis_size) == (np.dtype("float32"), -1, 101)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
@plain_and_double
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_axes(quant_type, axis, double_quant):
    """Blocks along an axis equal moving it last, blocking and moving it back."""
    x = normal((4, 6, 10))
    kwargs = {"block_size": 4, "double_quant": double_quant}
    q = jaxbnb.quantize(x, quant_type, axis=axis, **kwargs)
    last = jaxbnb.quantize(jnp.moveaxis(x, axis, -1), quant_type, **kwargs)
    assert q.shape == x.shape
    assert q.axis == (axis if axis < 0 else axis - 3)
    np.testing.assert_array_equal(
        q.dequantize(), jnp.moveaxis(last.dequantize(), -1, axis)
    )


@pytest.mark.parametrize("shape", [(0,), (5,), (0, 4), (4, 0), (1, 1), (2, 3, 4, 5)])
@plain_and_double
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_any_rank(shape, double_quant, quant_type):
    x = normal(shape)
    q = jaxbnb.quantize(x, quant_type, double_quant=double_quant)
    assert (q.shape, q.ndim, q.size) == (x.shape, x.ndim, x.size)
    assert q.dequantize().shape == x.shape
    assert (q.bits_per_param == 0) == (x.size == 0)


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "bits"),
    [
        # An absmax has 32 bits per 64 elements; nested, 8 bits and 32 per 256 absmax.
        ("nf4", False, 4 + 32 / 64),
        ("nf4", True, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**18),
        ("int8", False, 8 + 32 / 64),
        ("dynamic8", True, 8 + 8 / 64 + 32 / (64 * 256) + 32 / 2**18),
    ],
)
def test_memory(quant_type, double_quant, bits):
    q = jaxbnb.quantize(normal((512, 512)), quant_type, double_quant=double_quant)
    assert q.bits_per_param == bits
    assert q.nbytes == bits * 2**18 / 8
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))


def test_repr():
    q = jaxbnb.quantize(normal((256, 512)), "nf4", double_quant=True)
    assert repr(q) == (
        "QuantizedArray(nf4, shape=(256, 512), dtype=float32, axis=-1, block_size=64, "
        "double_quant=True, 66.0 KiB, 4.13 bits/param)"
    )
    small = jaxbnb.quantize(normal((4,), jnp.bfloat16), "int8")
    assert "dtype=bfloat16" in repr(small)
    assert "8 B, 16.00 bits/param" in repr(small)


# --- The numbers.


@every_type
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_returns_the_dtype_that_was_quantised(quant_type, dtype):
    x = jnp.abs(normal((4, 128), dtype))
    q = jaxbnb.quantize(x, quant_type)
    assert q.dtype == dtype
    assert q.dequantize().dtype == dtype
    exact = q.dequantize(jnp.float32)
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(q.dequantize(), exact.astype(dtype))
    np.testing.assert_array_equal(jaxbnb.dequantize(q, jnp.float32), exact)
    # The error is at most half the widest gap between two levels, times the absmax.
    gap = {
        "nf4": 0.152,
        "fp4": 1 / 6,
        "int4": 0.5 / 7,
        "int8": 0.5 / 127,
        "llm_int8": 0.5 / 127,
        "fp8_e4m3": 16 / 448,
        "fp8_e5m2": 4096 / 57344,
    }.get(quant_type, 0.0071)
    size = 128 if quant_type == "llm_int8" else 64
    absmax = jnp.max(x.astype(jnp.float32).reshape(4, -1, size), axis=-1)
    bound = jnp.repeat(absmax, size, axis=-1) * gap * 1.001
    assert jnp.all(jnp.abs(exact - x.astype(jnp.float32)) <= bound)


@every_blockwise_type
@plain_and_double
def test_zeros_stay_exact(quant_type, double_quant):
    x = jnp.abs(normal((4, 128))).at[:, ::3].set(0.0).at[2].set(0.0)
    q = jaxbnb.quantize(x, quant_type, double_quant=double_quant)
    np.testing.assert_array_equal(q.dequantize()[:, ::3], 0.0)
    np.testing.assert_array_equal(q.dequantize()[2], 0.0)
    if not double_quant:
        np.testing.assert_array_equal(q.absmax[2], 0.0)


@every_blockwise_type
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_non_finite_input_never_becomes_finite(quant_type, value):
    x = jnp.abs(normal((4, 128))).at[1, 70].set(value)
    finite = np.isfinite(jaxbnb.quantize(x, quant_type).dequantize())
    expected = np.ones((4, 128), bool)
    expected[1, 64:] = False
    np.testing.assert_array_equal(finite, expected)
    double = jaxbnb.quantize(x, quant_type, double_quant=True).dequantize()
    assert not np.any(np.isfinite(double))


@pytest.mark.parametrize("shape", [(3, 40, 130), (5, 3), (7,), (0, 4), (4, 0)], ids=str)
def test_llm_int8_has_one_absmax_a_row(shape):
    x = normal(shape)
    q = jaxbnb.quantize(x, "llm_int8")
    n = shape[-1]
    assert (q.codes.shape, q.codes.dtype) == (shape, jnp.int8)
    assert (q.absmax.shape, q.absmax.dtype) == ((*shape[:-1], min(n, 1)), jnp.float32)
    assert (q.shape, q.double_quant) == (shape, False)
    assert q.block_size >= n
    assert q.block_size % 2 == 0
    if n:
        np.testing.assert_array_equal(q.absmax[..., 0], jnp.max(jnp.abs(x), axis=-1))
    assert q.dequantize().shape == shape
    moved = jaxbnb.quantize(jnp.moveaxis(x, -1, 0), "llm_int8", axis=0)
    np.testing.assert_array_equal(moved.codes, q.codes)
    np.testing.assert_array_equal(moved.absmax, q.absmax)
    # The bound is half a level of each row, plus a rounding of each factor.
    bound = 0.5001 / 127 * jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    assert jnp.all(jnp.abs(q.dequantize() - x) <= bound)


def test_llm_int8_keeps_zeros_and_what_is_not_finite():
    x = normal((5, 64)).at[:, ::3].set(0.0).at[2].set(0.0)
    x = x.at[0, 7].set(jnp.nan).at[1, 7].set(-jnp.inf)
    decoded = jaxbnb.quantize(x, "llm_int8").dequantize()
    assert not np.any(np.isfinite(decoded[:2]))
    np.testing.assert_array_equal(decoded[3:, ::3], 0.0)
    np.testing.assert_array_equal(decoded[2], 0.0)
    assert np.all(np.isfinite(decoded[2:]))


def test_a_stack_is_quantised_matrix_by_matrix():
    x = normal((3, 40, 130)) * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    q = jaxbnb.quantize(x, "nf4", double_quant=True)
    for i in range(3):
        alone = jaxbnb.quantize(x[i], "nf4", double_quant=True)
        np.testing.assert_array_equal(q[i].codes, alone.codes)
        # Their means may sum in another order: 120 roundings.
        np.testing.assert_allclose(
            q[i].dequantize(), alone.dequantize(), rtol=120 * 2**-24
        )


# --- A pytree.


def test_leaves_and_their_paths():
    q = jaxbnb.quantize(normal((4, 128)), "nf4", double_quant=True)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    assert paths == [".codes", ".absmax", ".nested_absmax", ".offset"]
    assert len(jax.tree.leaves(jaxbnb.quantize(normal((4, 128)), "nf4"))) == 2


@plain_and_double
def test_indexing_the_batch_axes(double_quant):
    x = normal((2, 3, 4, 70))
    q = jaxbnb.quantize(x, "nf4", axis=-2, double_quant=double_quant)
    full = q.dequantize()
    assert q[...] is q
    assert q[()] is q
    for index in (
        1,
        -1,
        (1, 2),
        (1, ...),
        slice(1),
        (slice(None), 1),
        np.array([1, 0]),
    ):
        np.testing.assert_array_equal(q[index].dequantize(), full[index])
    for index in ((0, 0, 0), (0, 0, 0, 0), None, (..., 0), (0, None)):
        with pytest.raises(
            IndexError, match=r"has 2 batch axes to index, .*dequantize"
        ):
            q[index]
    with pytest.raises(IndexError, match="has 0 batch axes"):
        jaxbnb.quantize(normal((4, 128)), "nf4")[0]
    with pytest.raises(IndexError, match="has 0 batch axes"):
        jaxbnb.quantize(normal((128,)), "nf4")[0]


@plain_and_double
@pytest.mark.parametrize("axis", [-1, -2])
def test_vmap_and_scan_over_a_stack(double_quant, axis):
    q = jaxbnb.quantize(normal((3, 6, 70)), "fp4", axis=axis, double_quant=double_quant)
    full = q.dequantize()

    def dequantize(q):
        assert q.shape == (6, 70)
        return q.dequantize()

    np.testing.assert_array_equal(jax.vmap(dequantize)(q), full)
    scanned = jax.lax.scan(lambda _, q: (None, dequantize(q)), None, q)[1]
    np.testing.assert_array_equal(scanned, full)


@plain_and_double
def test_vmap_of_quantize_is_quantize_of_the_stack(double_quant):
    x = normal((3, 6, 70))
    q = jaxbnb.quantize(x, "nf4", double_quant=double_quant)
    mapped = jax.vmap(lambda x: jaxbnb.quantize(x, "nf4", double_quant=double_quant))(x)
    assert mapped.shape == q.shape
    np.testing.assert_array_equal(mapped.codes, q.codes)
    np.testing.assert_allclose(mapped.dequantize(), q.dequantize(), rtol=1e-6)


def test_jit_takes_and_returns_it_without_compiling_twice():
    traces = []

    @jax.jit
    def identity(q):
        traces.append(q.shape)
        return q

    q = jaxbnb.quantize(normal((4, 128)), "nf4", double_quant=True)
    assert_same(identity(identity(q)), q)
    assert traces == [(4, 128)]
    identity(jaxbnb.quantize(normal((4, 128), seed=1), "nf4", double_quant=True))
    assert len(traces) == 1


@plain_and_double
def test_eval_shape(double_quant):
    def quantize(x):
        return jaxbnb.quantize(x, "nf4", axis=-2, double_quant=double_quant)

    shape = jax.ShapeDtypeStruct((100, 6), jnp.bfloat16)
    abstract = jax.eval_shape(quantize, shape)
    concrete = quantize(normal((100, 6), jnp.bfloat16))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    assert abstract.shape == (100, 6)
    assert abstract.nbytes == concrete.nbytes
    assert repr(abstract) == repr(concrete)
    decoded = jax.eval_shape(lambda q: q.dequantize(), abstract)
    assert (decoded.shape, decoded.dtype) == ((100, 6), jnp.bfloat16)


@pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("int8", False)]
)
def test_an_abstract_array_is_quantised_to_an_abstract_one(quant_type, double_quant):
    def quantize(x):
        return jaxbnb.quantize(x, quant_type, axis=-2, double_quant=double_quant)

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.bfloat16, sharding=sharding)
    got, want = quantize(x), jax.eval_shape(quantize, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    # Four devices can divide the bytes, but not the single block.
    assert got.codes.sharding.spec == PartitionSpec(None, None, "data")
    assert got.absmax.sharding.spec == PartitionSpec(None, None, None)
    decoded = got.dequantize()
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    with pytest.raises(TypeError, match="codes in float32, not uint8"):
        jax.tree.map(lambda x: x / 2, jaxbnb.quantize(jnp.ones(4), "nf4")).dequantize()


@pytest.mark.parametrize("leaf", [PartitionSpec("data"), None, True, "label"], ids=str)
def test_a_tree_map_may_put_anything_in_place_of_the_arrays(leaf):
    q = jaxbnb.quantize(normal((4, 128)), "nf4")
    mapped = jax.tree.map(lambda _: leaf, q)
    assert mapped.codes == mapped.absmax == leaf
    assert repr(mapped) == f"QuantizedArray(nf4, codes={leaf!r})"


def test_donation_and_device_put():
    q = jaxbnb.quantize(normal((4, 128)), "nf4")
    moved = jax.device_put(q, jax.devices()[1])
    assert_same(moved, q)
    assert moved.codes.devices() == {jax.devices()[1]}


@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), PartitionSpec(None, "data")], ids=["rows", "blocks"]
)
def test_one_spec_shards_codes_and_absmax(spec):
    """The spec divides rows, or whole blocks along the blocked axis."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = normal((16, 1024))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    want = jaxbnb.quantize(x, "nf4")
    assert_same(jaxbnb.quantize(sharded, "nf4"), want)
    q = jax.device_put(want, NamedSharding(mesh, spec))
    assert q.codes.sharding.spec == q.absmax.sharding.spec == spec
    np.testing.assert_array_equal(q.dequantize(), want.dequantize())


# --- Errors.


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (np.ones(64, np.int32), "int32"),
        (np.ones(64, np.complex64), "complex64"),
        (np.ones(64, bool), "bool"),
        ([1.0, 2.0], "list"),
        (1.0, "float"),
    ],
)
def test_wrong_dtypes(x, got):
    message = f"floating dtype, got {got}; cast it first"
    with pytest.raises(TypeError, match=re.escape(message)):
        jaxbnb.quantize(x, "nf4")


def test_wrong_arguments():
    x = normal((4, 128))
    with pytest.raises(
        ValueError, match="quant_type 'nf5' is not known; choose one of"
    ):
        jaxbnb.quantize(x, "nf5")
    with pytest.raises(ValueError, match="positive even int, commonly 64; got 7"):
        jaxbnb.quantize(x, "nf4", block_size=7)
    with pytest.raises(ValueError, match="at least one axis to block; got a scalar"):
        jaxbnb.quantize(jnp.float32(1), "nf4")
    for axis in (2, -3):
        message = rf"axis {axis} is out of range for an array of shape \(4, 128\)"
        with pytest.raises(ValueError, match=message):
            jaxbnb.quantize(x, "nf4", axis=axis)


# Treescope walks through NumPy's modules, including names that NumPy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_notebooks_show_the_array_that_it_stands_for():
    q = jaxbnb.quantize(jnp.ones((256, 64)), "nf4", double_quant=True)
    for shown in (q, jax.eval_shape(lambda: q)):
        text = treescope.render_to_text(shown)
        assert "shape=(256, 64)" in text
        assert "bits_per_param=4.1" in text
        assert "offset=" in text
    assert "offset=" not in treescope.render_to_text(
        jaxbnb.quantize(jnp.ones(4), "nf4")
    )
    # A tree_map may put other objects in the place of arrays.
    masked = treescope.render_to_text(jax.tree.map(lambda _: True, q))
    assert "codes=True" in masked


def test_it_is_no_array_and_says_so():
    with pytest.raises(TypeError, match=r"shape \(4,\) was used as an array; decode"):
        np.asarray(jaxbnb.quantize(jnp.ones(4), "nf4"))


def test_a_cast_says_what_to_do():
    q = jaxbnb.quantize(jnp.ones((2, 64)), "nf4")
    assert not hasattr(q, "astype")
    with pytest.raises(AttributeError, match=r"dequantize\(dtype\).*cast_floating\(q"):
        q.astype(jnp.bfloat16)


def test_a_sign_is_never_lost():
    """NaN and -0 have none to lose; a tracer is not known."""
    for x in (jnp.array([1.0, -1e-30]), np.array([[-np.inf]], np.float32)):
        with pytest.raises(ValueError, match="no negative levels, and x has negative"):
            jaxbnb.quantize(x, formats.UNSIGNED)
    good = jnp.array([1.0, -0.0, jnp.nan])
    q = jaxbnb.quantize(good, formats.UNSIGNED)
    traced = jax.jit(lambda x: jaxbnb.quantize(x, formats.UNSIGNED))(good)
    np.testing.assert_array_equal(q.codes, traced.codes)
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    assert jaxbnb.quantize(shape, formats.UNSIGNED).shape == (4,)


@pytest.mark.peers
def test_tensors_are_refused():
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.ones(2, 64))
    with pytest.raises(TypeError, match=r"got torch.float32; make it a NumPy array"):
        jaxbnb.quantize(tensor, "nf4")
