"""Kernels on a mesh with automatic axes: each device computes its part.

The tests run on CPUs, with XLA's stand-in for each kernel. Numbers are small integers
and powers of two, so sums are exact in any order.
"""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels.codebooks import FP4, NF4
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_blockwise import kernels as matmul_kernels
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu as matmul_mosaic_gpu
from jaxbnb_kernels.matmul_int8 import kernels as int8_kernels
from jaxbnb_kernels.matmul_int8 import matmul_int8
from jaxbnb_kernels.matmul_int8 import mosaic_gpu as int8_mosaic_gpu
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from jaxbnb_kernels.quantize_blockwise import kernels as quantize_kernels
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu as quantize_mosaic_gpu
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit
from jaxbnb_kernels.update_8bit import kernels as update_kernels
from jaxbnb_kernels.update_8bit import mosaic_gpu as update_mosaic_gpu

INTEGERS = np.arange(-8, 8, dtype=np.float32)


# Shapes of the arrays in each call of a stand-in.
CALLS = []


def stand_in(portable):
    def call(*arrays, **static):
        CALLS.append([x.shape for x in arrays])
        return portable(*arrays, **static)

    return call


# The same objects in each test, because traces are cached.
STAND_INS = {
    kernel: stand_in(portable)
    for kernel, portable in (
        (matmul_mosaic_gpu.MATMUL, matmul_kernels._matmul_portable),
        (int8_mosaic_gpu.MATMUL, int8_kernels._matmul_portable),
        (quantize_mosaic_gpu.QUANTIZE, quantize_kernels._quantize_portable),
        (quantize_mosaic_gpu.DEQUANTIZE, quantize_kernels._dequantize_portable),
        (update_mosaic_gpu.UPDATE, update_kernels._update_portable),
    )
}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    monkeypatch.setattr(_selection, "_targets", lambda *args: ([], None))
    monkeypatch.setattr(_selection.Kernel, "load", lambda kernel: STAND_INS[kernel])
    CALLS.clear()
    return CALLS


def on_mesh(function, specs, *args, shape=(4, 2)):
    """Calls a function with divided arguments: ``(results, names of collectives)``.

    A spec divides those arrays of its argument that have as many axes.
    """
    names = ("data", "model") if len(shape) == 2 else ("data",)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    shardings = tuple(
        jax.tree.map(
            lambda x, s=spec: NamedSharding(mesh, P(*s) if x.ndim == len(s) else P()),
            arg,
        )
        for arg, spec in zip(args, specs, strict=True)
    )
    lowered = jax.jit(function, in_shardings=shardings).lower(*args)
    # Only the partitioner's calls count.
    CALLS.clear()
    compiled = lowered.compile()
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute)\("
    collectives = set(re.findall(pattern, compiled.as_text()))
    return compiled(*jax.device_put(args, shardings)), collectives


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def weight(rows=64, size=256, leading=(), nested=False):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (*leading, rows, size // 2), np.uint8)
    absmax = np.exp2(rng.integers(0, 3, (*leading, rows, size // 64)))
    absmax = jnp.asarray(absmax, jnp.float32)
    if not nested:
        return Weight(jnp.asarray(codes), absmax, None, INTEGERS, 64, size)
    absmax, *of_absmax = quantize_absmax(absmax)
    return Weight(jnp.asarray(codes), absmax, tuple(of_absmax), INTEGERS, 64, size)


def rows_of_x(*shape):
    x = np.random.default_rng(1).integers(-2, 3, shape)
    return jnp.asarray(x, jnp.float32)


DATA, MODEL, COLUMNS = ("data", None), ("model", None), (None, "model")
NONE = (None, None)
BOTH = (("data", "model"), None)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("transpose", "of_x", "of_w", "part_of_x", "part_of_codes", "collectives"),
    [
        (True, DATA, NONE, (4, 256), (64, 128), set()),
        (True, DATA, MODEL, (4, 256), (32, 128), set()),
        (True, DATA, COLUMNS, (4, 128), (64, 64), {"all-reduce"}),
        (True, ("data", "model"), COLUMNS, (4, 128), (64, 64), {"all-reduce"}),
        (True, NONE, BOTH, (16, 256), (8, 128), set()),
        # Both are divided by the same axis, so x is gathered.
        (True, DATA, DATA, (16, 256), (16, 128), {"all-gather"}),
        (False, DATA, NONE, (4, 64), (64, 128), set()),
        (False, DATA, MODEL, (4, 32), (32, 128), {"all-reduce"}),
        (False, DATA, COLUMNS, (4, 64), (64, 64), set()),
    ],
)
def test_products(
    transpose, of_x, of_w, part_of_x, part_of_codes, collectives, nested, parts
):
    w = weight(nested=nested)
    x = rows_of_x(16, 256 if transpose else 64)

    def multiply(x, w):
        return matmul_blockwise(x, w, transpose=transpose)

    expected = multiply(x, w)
    y, found = on_mesh(multiply, (of_x, of_w), x, w)
    assert parts[-1][:2] == [part_of_x, part_of_codes]
    # The absmax stay nested if each device has the whole matrix.
    is_whole = part_of_codes == w.codes.shape
    assert len(parts[-1]) == (5 if nested and is_whole else 3)
    if not nested:
        assert_same(y, expected)
        assert found == collectives
        return
    # These are 256 sums of scales of at most 4, which were rounded twice.
    np.testing.assert_allclose(y, expected, rtol=0, atol=256 * 16 * 4 * 4 * 2.0**-24)
    assert found >= collectives


def test_blocks_are_not_cut(parts):
    """Two devices share an axis of three blocks of 64 and a shorter one."""
    for size in (192, 96):
        w, x = weight(size=size), rows_of_x(16, size)

        def multiply(x, w):
            return matmul_blockwise(x, w, transpose=True)

        y, _ = on_mesh(multiply, (("data", "model"), NONE), x, w)
        assert parts[-1][:2] == [(4, size), (64, size // 2)]
        assert_same(y, multiply(x, w))


def test_batched_products(parts):
    """Experts have their own devices; a matrix is shared by all examples."""
    w, x = weight(leading=(8,)), rows_of_x(8, 16, 256)

    def multiply(x, w):
        return jax.vmap(lambda x, w: matmul_blockwise(x, w, transpose=True))(x, w)

    experts = "data", None, None
    y, collectives = on_mesh(multiply, (experts, experts), x, w)
    assert parts[-1] == [(2, 16, 256), (2, 64, 128), (2, 64, 4)]
    assert not collectives
    assert_same(y, multiply(x, w))

    w = weight()

    def shared(x, w):
        return jax.vmap(lambda x: matmul_blockwise(x, w, transpose=True))(x)

    y, collectives = on_mesh(shared, (experts, MODEL), x, w)
    assert parts[-1] == [(2, 16, 256), (1, 32, 128), (1, 32, 4)]
    assert not collectives
    assert_same(y, shared(x, w))


def test_gradients(parts):
    """Data divides the rows of x, and both products are divided."""
    w, x = weight(), rows_of_x(16, 256)

    def both(x, w):
        y, vjp = jax.vjp(lambda x: matmul_blockwise(x, w, transpose=True), x)
        return y, *vjp(y)

    got, collectives = on_mesh(both, (DATA, NONE), x, w)
    assert not collectives
    assert {shapes[0] for shapes in parts[-2:]} == {(4, 256), (4, 64)}
    assert_same(got, both(x, w))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_products(threshold, parts):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, (64, 256)), jnp.int8)
    scale = jnp.full(64, 127.0)
    x = rows_of_x(16, 256).at[:, 0].set(4.0).at[3, 17].set(8.0)

    def multiply(x, codes, scale):
        return matmul_int8(
            x,
            codes,
            scale,
            outlier_threshold=threshold,
            compute_dtype=jnp.bfloat16,
        )

    specs = DATA, MODEL, ("model",)
    y, collectives = on_mesh(multiply, specs, x, codes, scale)
    # All rows of x decide whether a column has outliers.
    rows = 16 if threshold else 4
    assert parts[-1] == [(rows, 256), (32, 256), (32,)]
    assert collectives == ({"all-gather"} if threshold else set())
    expected = multiply(x, codes, scale)
    # Sums of 256 terms are multiplied by factors in another order.
    np.testing.assert_allclose(y, expected, rtol=8 * 2.0**-24, atol=2.0**-8)


@pytest.mark.parametrize("spec", [DATA, COLUMNS, ("model", "data")])
def test_encoding_and_decoding(spec, parts):
    x = np.random.default_rng(0).standard_normal((16, 256), np.float32)
    x = jnp.asarray(x).at[0, 0].set(jnp.nan)

    def encode(x):
        return quantize_blockwise(x, NF4, block_size=64)

    def decode(codes, absmax):
        options = {"block_size": 64, "size": 256, "dtype": np.dtype(np.float32)}
        return dequantize_blockwise(codes, absmax, NF4, **options)

    sizes = {"data": 4, "model": 2, None: 1}
    rows, columns = (d // sizes[s] for d, s in zip((16, 256), spec, strict=True))
    encoded, collectives = on_mesh(encode, (spec,), x)
    assert parts[-1] == [(rows, columns)]
    assert not collectives
    expected = encode(x)
    assert_same(encoded, expected)

    decoded, collectives = on_mesh(decode, (spec, spec), *expected)
    assert parts[-1] == [(rows, columns // 2), (rows, columns // 64)]
    assert not collectives
    assert_same(decoded, decode(*expected))


def test_decoding_what_is_nested(parts):
    w = weight(nested=True)

    def decode(w):
        options = {"block_size": 64, "size": 256, "dtype": np.dtype(np.float32)}
        return dequantize_blockwise(
            w.codes, w.absmax, INTEGERS, nested=w.nested, **options
        )

    decoded, _ = on_mesh(decode, (DATA,), w)
    assert parts[-1] == [(16, 128), (16, 4)]
    # Levels are at most 8 and scales at most 4, and they are rounded twice.
    np.testing.assert_allclose(decoded, decode(w), rtol=0, atol=8 * 4 * 4 * 2.0**-24)


MOMENTUM = Rule(
    advance=lambda s, g, old: (0.5 * old[0] + g,),
    direction=lambda s, g, old, new: new[0],
    finish=lambda s, update, param: -s * update,
)


@pytest.mark.parametrize(
    ("shape", "spec", "part", "blocks"),
    [
        ((16, 512), DATA, (4, 512), (4, 2)),
        ((16, 512), COLUMNS, (16, 256), (16, 1)),
        # Four devices share two blocks, so half of the axis divides them.
        ((16, 512), (None, "data"), (16, 256), (16, 1)),
        # Blocks have 16 rows, and each of two devices has two blocks.
        ((64, 16), MODEL, (32, 16), (2, 1)),
        ((64, 16), (None, "model"), (64, 16), (4, 1)),
        # A single block.
        ((4, 8, 8), ("data", None, None), (4, 8, 8), (1, 1, 1)),
        ((4, 8, 256), ("data", "model", None), (1, 4, 256), (1, 4, 1)),
    ],
)
def test_steps(shape, spec, part, blocks, parts):
    rng = np.random.default_rng(0)
    grad, param = (
        jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for _ in range(2)
    )
    codes = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
    absmax = jnp.ones(absmax_shape(shape, 256))

    def step(grad, param, codes, absmax):
        moments = [Moment(codes, absmax, True)]
        param, (new,) = update_8bit(
            MOMENTUM, jnp.float32(0.5), grad, moments, param, block_size=256
        )
        return param, new

    args = grad, param, codes, absmax
    specs = spec, spec, spec, NONE[:1] * len(shape)
    got, _ = on_mesh(step, specs, *args)
    assert parts[-1][1:] == [part, part, part, blocks]
    assert_same(got, step(*args))


def test_mapped_steps(parts):
    """Each parameter has its own device and its own scalars."""
    rng = np.random.default_rng(0)
    grad = jnp.asarray(rng.integers(-4, 5, (8, 4, 256)), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 256, grad.shape), jnp.uint8)
    rates = jnp.exp2(jnp.arange(8.0))

    def step(rate, grad, codes):
        moments = [Moment(codes, jnp.ones((4, 1)), True)]
        return update_8bit(MOMENTUM, rate, grad, moments, grad, block_size=256)

    args = rates, grad, codes
    specs = ("data",), ("data", None, None), ("data", None, None)
    got, _ = on_mesh(jax.vmap(step), specs, *args)
    assert parts[-1][0] == (2, 1)
    assert parts[-1][1:4] == [(2, 4, 256)] * 3
    assert_same(got, jax.vmap(step)(*args))


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 4), (2, 1)])
def test_meshes(shape, parts):
    x, w = rows_of_x(16, 256), weight()

    def multiply(x, w):
        return matmul_blockwise(x, w, transpose=True)

    specs = (DATA, NONE) if len(shape) == 1 else (("data", "model"), COLUMNS)
    y, _ = on_mesh(multiply, specs, x, w, shape=shape)
    data, model = (*shape, 1)[:2]
    assert parts[-1][0] == (16 // data, 256 // model)
    assert_same(y, multiply(x, w))


@pytest.mark.parametrize("is_compiled", [True, False], ids=["jit", "eager"])
def test_an_explicit_mesh(is_compiled, parts):
    """It works within `jax.sharding.auto_axes`, and on replicated arrays."""
    x, w = rows_of_x(16, 256), weight()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def multiply(x, w):
        return matmul_blockwise(x, w, transpose=True)

    def run(function, x, w):
        if not is_compiled:
            return function(x, w)
        lowered = jax.jit(function).lower(x, w)
        parts.clear()
        return lowered.compile()(x, w)

    expected = multiply(x, w)
    with jax.set_mesh(mesh):
        whole, of_rows = (NamedSharding(mesh, P(*spec)) for spec in ((), ("data",)))
        w = jax.device_put(w, whole)
        y = run(multiply, jax.device_put(x, whole), w)
        assert parts[-1] == [(16, 256), (64, 128), (64, 4)]
        assert_same(y, expected)

        auto = jax.sharding.auto_axes(multiply, out_sharding=P("data"))
        y = run(auto, jax.device_put(x, of_rows), w)
        assert parts[-1] == [(2, 256), (64, 128), (64, 4)]
    assert y.sharding.spec == P("data", None)
    assert_same(y, expected)


def test_sums_of_parts_are_rounded_once():
    """Each half of the sum exceeds float16, and they cancel."""
    codes = jnp.full((64, 128), 0xFF, jnp.uint8)
    w = Weight(codes, jnp.full((64, 4), 64.0), None, INTEGERS, 64, 256)
    x = jnp.ones((16, 256), jnp.float16).at[:, 128:].set(-1).at[:, 0].set(2)

    def multiply(x, w):
        return matmul_blockwise(x, w, transpose=True)

    y, _ = on_mesh(multiply, ((None, "model"), COLUMNS), 4 * x, w)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(y, 4 * 7 * 64)


def test_what_is_on_one_device(parts):
    """A callback's results have a sharding without a mesh."""
    x, w = rows_of_x(16, 256), weight()

    def multiply(x, w):
        x = jax.pure_callback(lambda x: x, x, x)
        return matmul_blockwise(x, w, transpose=True)

    y, _ = on_mesh(multiply, (NONE, MODEL), x, w)
    assert_same(y, matmul_blockwise(x, w, transpose=True))


def test_nothing_to_divide(parts):
    codes, absmax = jnp.zeros((4, 0), jnp.uint8), jnp.zeros((4, 0))

    def decode(codes, absmax):
        return dequantize_blockwise(
            codes, absmax, NF4, block_size=64, size=0, dtype=np.dtype(np.float32)
        )

    assert on_mesh(decode, (DATA, DATA), codes, absmax)[0].shape == (4, 0)


def test_programs_of_other_codebooks_are_told_apart():
    """JAX's cache of programs compares more than an address."""

    def text(codebook):
        encode = functools.partial(quantize_blockwise, codebook=codebook, block_size=64)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        of_rows = NamedSharding(mesh, P("data"))
        lowered = jax.jit(lambda x: encode(x), in_shardings=of_rows).lower(
            jnp.ones((16, 256))
        )
        return re.sub(r'backend_config = "\d+"', "", lowered.as_text())

    assert text(NF4) != text(FP4)


def test_meshes_of_halves():
    assert dict(_partition.mesh_of(8).shape) == {"half0": 2, "half1": 2, "half2": 2}
    assert _partition.mesh_of(6) is None


def test_what_is_not_divided(parts):
    """XLA runs a program for three devices, and one within part of a mesh."""
    x, w = rows_of_x(15, 256), weight()

    def multiply(x, w, implementation=None):
        return matmul_blockwise(x, w, transpose=True, implementation=implementation)

    expected = multiply(x, w)
    parts.clear()
    y, _ = on_mesh(multiply, (DATA, NONE), x, w, shape=(3,))
    assert_same(y, expected)
    kernel = functools.partial(multiply, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"among 2, 4, 8, \.\.\. devices"):
        on_mesh(kernel, (DATA, NONE), x, w, shape=(3,))

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    within = jax.shard_map(
        lambda x: kernel(x, w),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(NotImplementedError, match="over all axes of the mesh"):
        jax.jit(within)(x[:12])
    with pytest.raises(NotImplementedError, match="in what is exported"):
        export(kernel, mesh, x[:12], w)
    assert not parts


def export(function, mesh, *args):
    replicated = NamedSharding(mesh, P())
    return jax.export.export(jax.jit(function, in_shardings=replicated))(*args)
