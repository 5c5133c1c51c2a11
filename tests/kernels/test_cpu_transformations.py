"""Native CPU kernels within a mesh, shard_map, an export and the compilation cache.

Numbers are small integers and powers of two, so sums are exact in any order, and any
division of the arrays computes the same bits.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import library
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbnb_kernels import config
from jaxbnb_kernels.attend_dense import attend_dense
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.embed_blockwise import embed_blockwise
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_dense import matmul_dense
from jaxbnb_kernels.matmul_int8 import matmul_int8
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from jaxbnb_kernels.update_8bit import Moment, Rule, update_8bit

INTEGERS = np.arange(-8, 8, dtype=np.float32)
ROWS, WHOLE = P("data"), P()
DECODED = {"block_size": 64, "size": 128, "dtype": jnp.float32}
MOMENTUM = Rule(
    advance=lambda s, g, old: (0.5 * old[0] + g,),
    direction=lambda s, g, old, new: new[0],
    finish=lambda s, update, param: -s * update,
)


def draw(*shape, low=-2, high=3, dtype="float32"):
    values = np.random.default_rng(0).integers(low, high, shape)
    return jnp.asarray(values, jnp.dtype(dtype))


def weight(rows=16):
    codes = draw(rows, 64, low=0, high=256, dtype="uint8")
    return Weight(codes, 2.0 ** draw(rows, 2), None, INTEGERS, 64, 128)


def gradient(x, w, dy):
    return jax.vjp(lambda x: matmul_blockwise(x, w, transpose=True), x)[1](dy)[0]


def multiply_int8(x, codes, scale):
    options = {"outlier_threshold": 0.0, "compute_dtype": jnp.bfloat16}
    return matmul_int8(x, codes, scale, **options)


def step(grad, param, codes, absmax):
    moments = [Moment(codes, absmax, True)]
    param, (new,) = update_8bit(
        MOMENTUM, jnp.float32(0.5), grad, moments, param, block_size=64
    )
    return param, new.codes, new.absmax


BITS = draw(16, 64, low=0, high=256, dtype="uint8")
# What is called, its arguments, and which of them are divided by rows.
CALLS = {
    "matmul_blockwise": (
        functools.partial(matmul_blockwise, transpose=True),
        (draw(16, 128), weight()),
        (ROWS, WHOLE),
    ),
    "matmul_blockwise, its gradient": (
        gradient,
        (draw(16, 128), weight(), draw(16, 16)),
        (ROWS, WHOLE, ROWS),
    ),
    # Each row has an absmax of 127, so that scales are powers of two.
    "matmul_int8": (
        multiply_int8,
        (
            draw(16, 128).at[:, 0].set(127),
            draw(16, 128, dtype="int8"),
            jnp.full(16, 127.0),
        ),
        (ROWS, WHOLE, WHOLE),
    ),
    "matmul_dense": (
        matmul_dense,
        (draw(16, 128, dtype="bfloat16"), draw(128, 16, dtype="bfloat16")),
        (ROWS, WHOLE),
    ),
    "quantize_4bit": (
        functools.partial(quantize_blockwise, codebook=NF4, block_size=64),
        (draw(16, 128),),
        (ROWS,),
    ),
    "dequantize_blockwise": (
        functools.partial(dequantize_blockwise, codebook=NF4, **DECODED),
        (BITS, jnp.ones((16, 2))),
        (ROWS, ROWS),
    ),
    "embed_blockwise": (
        embed_blockwise,
        (draw(16, low=-20, high=20, dtype="int32"), weight()),
        (ROWS, WHOLE),
    ),
    "update_8bit": (
        step,
        (draw(16, 64), draw(16, 64), BITS, jnp.ones((16, 1))),
        (ROWS,) * 4,
    ),
    "attend_dense": (
        functools.partial(attend_dense, scale=1.0),
        (
            draw(8, 4, 2, 8, dtype="bfloat16"),
            draw(8, 6, 1, 8, dtype="bfloat16"),
            draw(8, 6, 1, 8, dtype="bfloat16"),
            jnp.ones((1, 4, 6), bool),
        ),
        (ROWS, ROWS, ROWS, WHOLE),
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def target_of(name):
    return f'"jaxbnb_cpu_{name.split(",")[0]}"'


def mesh_of_all():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def compile_and_run(function, args, **options):
    compiled = jax.jit(function, **options).lower(*args).compile()
    return compiled(*args), compiled.as_text()


@pytest.fixture(autouse=True)
def needs_library():
    library()


@every_call
def test_on_a_mesh(name):
    """Each device calls the kernel. A look-up of rows is not divided, and XLA's."""
    function, args, specs = CALLS[name]
    expected, text = compile_and_run(function, args)
    assert target_of(name) in text
    mesh = mesh_of_all()
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    args = jax.device_put(args, shardings)
    got, text = compile_and_run(function, args, in_shardings=shardings)
    assert (target_of(name) in text) == (name != "embed_blockwise")
    assert_same(got, expected)


@every_call
def test_within_shard_map(name):
    function, args, specs = CALLS[name]
    mapped = jax.shard_map(function, mesh=mesh_of_all(), in_specs=specs, out_specs=ROWS)
    got, text = compile_and_run(mapped, args)
    assert target_of(name) in text
    assert_same(got, jax.jit(function)(*args))


@every_call
def test_exported(name):
    """An exported program is XLA's code: it may run where kernels are missing."""
    function, args, _ = CALLS[name]
    exported = jax.export.export(jax.jit(function))(*args)
    assert "jaxbnb_cpu" not in exported.mlir_module()
    with config.override(cpu="never"):
        expected, text = compile_and_run(function, args)
    assert "jaxbnb_cpu" not in text
    assert_same(jax.jit(exported.call)(*args), expected)


@pytest.fixture
def events():
    """What JAX records."""
    found = []

    def record(event, **_):
        found.append(event)

    jax.monitoring.register_event_listener(record)
    yield found
    jax.monitoring.unregister_event_listener(record)


@every_call
def test_compiled_once(name, events, tmp_path):
    """The next process, which has no program in memory, finds it in JAX's cache."""
    function, args, _ = CALLS[name]
    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {option: getattr(jax.config, option) for option in options}
    try:
        for option, value in options.items():
            jax.config.update(option, value)
        results = []
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()
            events.clear()
            results.append(compile_and_run(function, args))
    finally:
        for option, value in before.items():
            jax.config.update(option, value)
        compilation_cache.reset_cache()
    assert "/jax/compilation_cache/cache_hits" in events
    assert "/jax/compilation_cache/cache_misses" not in events
    assert all(target_of(name) in text for _, text in results)
    assert_same(results[0][0], results[1][0])
