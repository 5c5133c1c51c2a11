"""The kernels for Hopper, on machines without one.

The tests cover which kernel is chosen, on the CPU and for absent devices. They check
numbers in three ways: jnp twins of the code below Pallas, exhaustively; the kernels
interpreted; and the compiled kernels, emulated instruction by instruction and compared
bit for bit. They also count what the compiler produced: registers, spills and
instructions per element.
"""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
from kernel_checks import avals, check_compiled, lowered_for

from jaxbnb_kernels import _cells, _records, _selection, _tiles, checks, config
from jaxbnb_kernels._mosaic_gpu import tables
from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    FP4,
    NF4,
    decision_points,
)
from jaxbnb_kernels.embed_blockwise import embed_blockwise
from jaxbnb_kernels.embed_blockwise import mosaic_gpu_kernel as embed_kernel
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    mosaic_gpu,
    mosaic_gpu_kernel,
    quantize_absmax,
    quantize_blockwise,
)

CODEBOOKS = {
    "nf4": NF4,
    "fp4": FP4,
    "dynamic8": DYNAMIC8_SIGNED,
    "dynamic8_unsigned": DYNAMIC8_UNSIGNED,
}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def dequantize(codes, absmax, name="nf4", implementation="mosaic_gpu", **options):
    """Decodes rows in blocks of 64 to bfloat16, by default."""
    per_byte = 2 if len(CODEBOOKS[name]) == 16 else 1
    options = {"block_size": 64, "dtype": jnp.bfloat16} | options
    options = {"size": codes.shape[-1] * per_byte} | options
    return dequantize_blockwise(
        codes, absmax, CODEBOOKS[name], implementation=implementation, **options
    )


def quantize(x, name="nf4", implementation="mosaic_gpu", block_size=64):
    return quantize_blockwise(
        x, CODEBOOKS[name], block_size=block_size, implementation=implementation
    )


def embed(ids, codes, absmax, name="nf4", implementation="mosaic_gpu", **options):
    """Decodes rows in blocks of 64 to bfloat16, by default."""
    options = {"block_size": 64, "dtype": jnp.bfloat16} | options
    block_size = options.pop("block_size")
    size = absmax.shape[-1] * block_size
    weight = Weight(codes, absmax, None, CODEBOOKS[name], block_size, size)
    return embed_blockwise(ids, weight, implementation=implementation, **options)


def rows_to_embed(rows=8, blocks=20):
    codes, absmax = encoded("nf4", rows * blocks, 64)
    ids = np.array([3, 0, rows - 1, 3], np.int32)
    return ids, codes.reshape(rows, -1), absmax.reshape(rows, blocks)


def encoded(name, blocks, block_size, seed=0):
    """Returns random and extreme codes and absmax, as NumPy."""
    generator = np.random.default_rng(seed)
    per_byte = 2 if len(CODEBOOKS[name]) == 16 else 1
    codes = generator.integers(0, 256, blocks * block_size // per_byte)
    absmax = generator.standard_normal(blocks).astype(np.float32)
    extremes = [np.nan, np.inf, 0.0, -0.0, 3e38, 1e-45, 1.2e-38]
    absmax[: len(extremes)] = extremes[:blocks]
    return codes.astype(np.uint8), absmax


# Which implementation runs.


def matmul(x, codes, absmax, implementation="mosaic_gpu"):
    """Multiplies flat arrays: x and W have rows of 256, W in blocks of 64."""
    codes, absmax = codes.reshape(-1, 128), absmax.reshape(-1, 4)
    weight = Weight(codes, absmax, None, NF4, block_size=64, size=256)
    x = x.reshape(-1, 256)
    return matmul_blockwise(x, weight, transpose=True, implementation=implementation)


# Each operation, and arguments for it.
OPERATIONS = {
    "matmul": (
        matmul,
        lambda: (np.ones(8 * 256, jnp.bfloat16), *encoded("nf4", 256 * 4, 64)),
    ),
    "dequantize": (dequantize, lambda: encoded("nf4", 128, 64)),
    "quantize": (quantize, lambda: (np.ones(64 * 128, np.float32),)),
    "embed": (embed, rows_to_embed),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


@every_operation
def test_off_a_gpu_the_kernel_refuses(operation):
    run, args = OPERATIONS[operation]
    message = r"compute capability 7.5, .* 12.0; this is lowered for cpu"
    with pytest.raises(NotImplementedError, match=message):
        run(*args())
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(run)(*args())


@every_operation
def test_on_another_gpu_the_kernel_refuses(operation):
    run, args = OPERATIONS[operation]
    with pytest.raises(NotImplementedError, match=r"12.0; this one's is 7.0"):
        lowered_for(hopper_compiler.mesh(gpu="v100"), run, *args())


def exported_for(kind, run, args, implementation):
    """Exports ``run`` for an absent GPU of that kind, or of an unnamed kind."""
    device = kind and jax.sharding.AbstractDevice(kind, 132, "cuda")
    described = jax.sharding.AbstractMesh((), (), abstract_device=device)
    # A new function, because traces are cached.
    jitted = jax.jit(lambda *a: run(*a, implementation=implementation))
    with jax.sharding.use_abstract_mesh(described):
        return jax.export.export(jitted, platforms=["cuda"])(*avals(*args()))


@every_operation
def test_exported_it_is_chosen_for_the_gpu_that_is_named(operation):
    run, args = OPERATIONS[operation]

    def has_kernel(kind, implementation=None):
        exported = exported_for(kind, run, args, implementation)
        return "@mosaic_gpu" in exported.mlir_module()

    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"):
        assert has_kernel(kind)
    assert not has_kernel("Tesla V100-SXM2-16GB")
    # The kernel would not run on another kind, and here the kind is unknown.
    assert not has_kernel(None)
    assert has_kernel(None, "mosaic_gpu")
    with pytest.raises(NotImplementedError, match="this one is 'Tesla P4'"):
        has_kernel("Tesla P4", "mosaic_gpu")


def test_what_is_exported_compiles_for_the_gpu():
    run, args = OPERATIONS["dequantize"]
    exported = exported_for(None, run, args, "mosaic_gpu")
    program, _ = hopper_compiler.compile_for(
        hopper_compiler.mesh(), exported.call, *avals(*args())
    )
    assert 'custom_call_target="mosaic_gpu' in program.as_text()


@every_operation
def test_where_nothing_else_is_compiled_it_is(operation):
    """`jax.disable_jit` is for watching a computation step by step."""
    run, args = OPERATIONS[operation]
    expected = run(*args(), implementation=None)
    with jax.disable_jit():
        got = run(*args(), implementation=None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (a, b)))


def test_rows_of_what_the_compiler_divides_are_not_looked_up():
    run, args = OPERATIONS["embed"]
    with pytest.raises(NotImplementedError, match="call it within shard_map"):
        lowered_for(hopper_compiler.mesh(num_devices=2), run, *args())


# JAX itself does not look up rows of a matrix on such a mesh.
@pytest.mark.parametrize("operation", ["dequantize", "quantize"])
def test_arrays_of_an_explicit_mesh_are_refused(operation):
    run, args = OPERATIONS[operation]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with (
        jax.sharding.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="call it within shard_map"),
    ):
        run(*jax.device_put(args(), sharding))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 16}, r"blocks of \(32, .* 4096\) elements here; got 16"),
        ({"block_size": 8192}, r"blocks of \(32, .* 4096\) elements here; got 8192"),
        ({"block_size": 96}, r"blocks of \(32, .* 4096\) elements here; got 96"),
        ({"dtype": jnp.float8_e4m3fn}, "not support float8_e4m3fn"),
    ],
)
def test_what_the_kernel_does_not_serve(options, message):
    block_size = options.get("block_size", 64)
    codes = jnp.zeros(block_size // 2, jnp.uint8)
    with pytest.raises(NotImplementedError, match=message):
        dequantize(codes, jnp.ones(1), **options)


def test_linear_int8_is_not_served():
    with pytest.raises(NotImplementedError, match="needs a codebook; got None"):
        dequantize_blockwise(
            jnp.zeros(64, jnp.int8),
            jnp.ones(1),
            None,
            block_size=64,
            size=64,
            implementation="mosaic_gpu",
        )


@pytest.mark.parametrize("block_size", [16, 8192, 96])
def test_what_the_encoder_does_not_serve(block_size):
    with pytest.raises(NotImplementedError, match=rf"4096\) .*; got {block_size}"):
        quantize(jnp.ones(8192), block_size=block_size)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.linspace(-1, 1, 16), "not at zero"),
        (np.linspace(0.5, 0.50001, 16), "more than 4096 cells"),
    ],
)
def test_codebooks_that_are_not_divided_into_cells(levels, message):
    with pytest.raises(NotImplementedError, match=message):
        quantize_blockwise(
            jnp.ones(64),
            levels.astype(np.float32),
            block_size=64,
            implementation="mosaic_gpu",
        )


@every_operation
def test_it_is_chosen_by_itself_on_hopper_unless_switched_off(operation, monkeypatch):
    run, args = OPERATIONS[operation]

    def text(mesh):
        # A new function, because traces are cached.
        return lowered_for(mesh, lambda *a: run(*a, implementation=None), *args())

    hopper, volta = hopper_compiler.mesh(), hopper_compiler.mesh(gpu="v100")
    two = hopper_compiler.mesh(num_devices=2)
    monkeypatch.setattr(config, "mosaic_gpu", "never")
    assert "mosaic_gpu" not in text(hopper)
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    assert "mosaic_gpu" in text(hopper)
    assert "mosaic_gpu" not in text(volta)
    # XLA picks the kernel when it divides the arrays.
    assert ("@CustomSPMDPartitioning" in text(two)) == (operation != "embed")


@every_operation
def test_by_default_it_is_chosen_where_a_record_says_that_it_passed(
    operation, monkeypatch, caplog
):
    run, args = OPERATIONS[operation]
    mesh = hopper_compiler.mesh()
    monkeypatch.setattr(config, "mosaic_gpu", "verified")
    _selection._say_once.cache_clear()

    def record(reason):
        return _records.Record(
            op=operation if operation == "quantize" else operation.removeprefix("de"),
            device_kind=mesh.devices.flat[0].device_kind,
            cuda=mesh.devices.flat[0].client.platform_version,
            jax=_records.jax_versions(),
            digest=_records.digest(),
            reason=reason,
        )

    def text(*records, **options):
        records = [dataclasses.replace(r, op=f"{r.op}_blockwise") for r in records]
        monkeypatch.setattr(_selection, "records", lambda: records)
        # A new function, because traces are cached.
        return lowered_for(mesh, lambda *a: run(*a, **options), *args())

    passed, failed = record(None), record("wrong numbers")
    assert "mosaic_gpu" in text(passed, implementation=None)
    assert not caplog.records
    for _ in range(2):
        assert "mosaic_gpu" not in text(implementation=None)
    (line,) = (r.getMessage() for r in caplog.records)
    assert line.endswith("run `jaxbnb verify-kernels`")
    assert "mosaic_gpu" not in text(failed, implementation=None)
    assert caplog.records[-1].getMessage().endswith("H100 80GB HBM3: wrong numbers")
    # A kernel that is requested by name, or switched on, runs unverified.
    assert "mosaic_gpu" in text(failed)
    with config.override(mosaic_gpu="always"):
        assert "mosaic_gpu" in text(failed, implementation=None)


@pytest.mark.parametrize("op", checks.CHECKS)
def test_a_kernel_serves_whatever_a_trial_asks_for(op, monkeypatch):
    """Each call in its checks uses a kernel when compiled for Hopper."""
    texts = []

    def lowered(function, *args):
        texts.append(lowered_for(hopper_compiler.mesh(), function, *args))
        # test_checks.py computes the numbers.
        results = jax.eval_shape(function, *args)
        return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), results)

    monkeypatch.setattr(checks, "_formats", lambda _: checks._FORMATS)
    monkeypatch.setattr(checks, "_run", lowered)
    sizes = dataclasses.replace(checks.FULL, rows=checks.BRIEF.rows)
    assert dict(checks.CHECKS[op](None, sizes))
    assert all("custom_call @mosaic_gpu" in text for text in texts)


@every_dtype
def test_switched_off_the_cpu_has_the_same_numbers(dtype, monkeypatch):
    codes, absmax = encoded("nf4", 12, 64)
    codes, absmax = codes.reshape(3, 128), absmax.reshape(3, 4)

    def transformed(codes, absmax):
        # A new function, because traces are cached.
        def run(codes, absmax):
            return dequantize(codes, absmax, implementation=None, dtype=dtype)

        def total(absmax, codes):
            decoded = run(codes, absmax)
            return jnp.sum(jnp.nan_to_num(decoded.astype(jnp.float32)) * 0.01)

        @jax.jit
        def all_of(codes, absmax):
            return (
                run(codes, absmax),
                jax.vmap(run)(codes, absmax),
                jax.vmap(run, (1, None), 1)(codes.T, absmax[0]),
                jax.lax.map(lambda row: run(*row), (codes, absmax)),
                jax.jvp(lambda a: run(codes, a), (absmax,), (jnp.ones_like(absmax),)),
            )

        @jax.jit
        def gradients_of(codes, absmax):
            of_absmax = jax.grad(total)
            return of_absmax(absmax, codes), jax.vmap(of_absmax)(absmax, codes)

        return (
            str(jax.make_jaxpr(run)(codes, absmax)),
            (run(codes, absmax), all_of(codes, absmax)),
            gradients_of(codes, absmax),
        )

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    jaxpr, expected, expected_gradients = transformed(codes, absmax)
    assert "choose_implementation" not in jaxpr
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    jaxpr, got, gradients = transformed(codes, absmax)
    assert "choose_implementation" in jaxpr
    # XLA chooses the order of sums of 64 terms up to 0.01: 64 roundings of 0.64.
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * 0.64 * 2.0**-24)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


@every_dtype
def test_switched_off_the_cpu_encodes_the_same(dtype, monkeypatch):
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(dtype)

    def transformed(x):
        def run(x):
            return quantize(x, implementation=None)

        @jax.jit
        def all_of(x):
            largest = jax.grad(lambda x: jnp.sum(run(x)[1]))
            return run(x), jax.vmap(run, 1, 1)(x.T), largest(x)

        return run(x), all_of(x)

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    expected = transformed(x)
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    got = transformed(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_switched_off_the_cpu_looks_up_the_same(monkeypatch):
    ids, codes, absmax = rows_to_embed()

    def transformed(ids, codes, absmax):
        # A new function, because traces are cached.
        def run(ids, codes, absmax):
            return embed(ids, codes, absmax, implementation=None)

        def total(absmax):
            return jnp.sum(jnp.nan_to_num(run(ids, codes, absmax)))

        @jax.jit
        def all_of(ids, codes, absmax):
            twice = [jnp.stack([x, x]) for x in (ids, codes, absmax)]
            return (
                run(ids, codes, absmax),
                jax.vmap(run)(*twice),
                jax.vmap(run, (0, None, None))(twice[0], codes, absmax),
                jax.vmap(run, (None, 0, 0))(ids, *twice[1:]),
                jax.lax.map(lambda x: run(*x), tuple(twice)),
                jax.grad(total)(absmax),
            )

        return run(ids, codes, absmax), *all_of(ids, codes, absmax)

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    expected = transformed(ids, codes, absmax)
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    got = transformed(ids, codes, absmax)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


@every_operation
def test_a_mapped_call_is_one_kernel(operation):
    run, args = OPERATIONS[operation]
    stacked = [np.stack([x] * 4) for x in args()]
    text = lowered_for(hopper_compiler.mesh(), jax.vmap(run), *stacked)
    assert text.count("custom_call @mosaic_gpu") == 1


def test_looked_up_for_each_of_many_the_matrix_is_not_copied():
    ids, codes, absmax = rows_to_embed()
    each = jax.vmap(embed, (0, None, None))
    text = lowered_for(hopper_compiler.mesh(), each, np.stack([ids] * 4), codes, absmax)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "4x8x640xui8" not in text


@every_operation
def test_within_shard_map_it_is_chosen(operation):
    run, args = OPERATIONS[operation]
    mesh = hopper_compiler.mesh(num_devices=2)
    spec = jax.sharding.PartitionSpec("device")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    fn = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    jitted = jax.jit(fn, in_shardings=sharding, out_shardings=sharding)
    assert "mosaic_gpu" in jitted.lower(*avals(*args())).as_text()


def test_within_shard_map_results_vary_as_their_arguments_do():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def run(x):
        return quantize(x, implementation=None)

    x = jnp.ones((4, 128))
    jax.shard_map(run, mesh=mesh, in_specs=spec("x"), out_specs=spec("x"))(x)
    with pytest.raises(ValueError, match="require replication"):
        jax.shard_map(run, mesh=mesh, in_specs=spec("x"), out_specs=spec())(x)


# The numbers.


def test_the_look_up_of_every_byte():
    bytes_ = jnp.arange(256, dtype=jnp.uint8)
    table = jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.float32)
    np.testing.assert_array_equal(tables.look_up_twin(bytes_, table), table)
    pairs = jax.lax.bitcast_convert_type(bytes_, jnp.uint4)
    got = tables.look_up_twin(pairs.reshape(1, 512), table[:16])
    # A byte's first element is in its high half.
    high_low = np.stack([np.arange(256) >> 4, np.arange(256) & 15], axis=-1)
    np.testing.assert_array_equal(got, table[high_low.reshape(1, 512)])


@every_codebook
def test_cells_decide_as_a_search_does(name):
    """They agree at decision points, next to them, at levels and in between."""
    codebook = CODEBOOKS[name]
    points, code_of = decision_points(codebook)
    generator = np.random.default_rng(0)
    signs = generator.choice([-1, 1], 2**18)
    x = np.concatenate(
        [points]
        + [np.nextafter(points, np.float32(end)) for end in (-2, 2)]
        + [codebook, np.array([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])]
        + [signs * generator.uniform(0, 1, 2**18)]
        + [signs * 10 ** generator.uniform(-10, 0, 2**18)]
    ).astype(np.float32)
    cells, table = _cells.of_codebook(codebook.tobytes())
    assert table.shape == (len(cells.values), 2)
    got = _cells.encode(jnp.asarray(x), cells, jnp.asarray(table))
    expected = code_of[np.searchsorted(points, x, side="left")]
    np.testing.assert_array_equal(got, expected)
    # NaN must not index outside the table.
    at = _cells.cell_of(jnp.array([np.nan, -np.nan]), cells)
    assert np.all((at >= 0) & (at < len(table)))


def test_interpreted():
    script = pathlib.Path(__file__).with_name("interpret_kernels.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@functools.cache
def compiled_dequantize(
    name, blocks, block_size, dtype, double_quant=False, matrices=None
):
    """Returns the compiled program and its kernel, the same for each codebook."""
    args = encoded(name, blocks, block_size)
    if double_quant:
        args = nested(name, matrices or 1, blocks, block_size)

    def run(codes, absmax, *nested):
        options = {"block_size": block_size, "dtype": dtype, "nested": nested or None}
        return dequantize(codes, absmax, name, **options)

    compiled, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(), run, *avals(*args)
    )
    return compiled, kernel


def nested(name, matrices, blocks, block_size):
    """Returns matrices of one row with doubly quantised absmax, as NumPy."""
    codes, _ = encoded(name, matrices * blocks, block_size)
    absmax = np.exp(np.random.default_rng(0).standard_normal((matrices, 1, blocks)))
    arrays = quantize_absmax(absmax.astype(np.float32))
    return codes.reshape(matrices, 1, -1), *map(np.asarray, arrays)


def emulated_dequantize(kernel, name, codes, absmax, block_size, dtype):
    dtype = np.dtype(dtype)
    size = len(absmax) * block_size
    rows, columns = _tiles.decoded_tile(block_size, dtype)
    # Elements that are never written stay 0xA5.
    out = np.full(size * dtype.itemsize, 0xA5, np.uint8)
    table = np.resize(CODEBOOKS[name], max(128, len(CODEBOOKS[name])))
    ptx_emulator.run(
        kernel.ptx,
        [x.view(np.uint8) for x in (codes, absmax, table)] + [out],
        grid=(-(-len(absmax) // rows), block_size // columns, 1),
    )
    return out.view(dtype)


def decoded_by_numpy(codes, absmax, name, block_size, dtype):
    """Computes the specification. Unlike XLA on a CPU, NumPy has subnormals."""
    codes = codes.reshape(-1)
    if len(CODEBOOKS[name]) == 16:
        codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = CODEBOOKS[name][codes] * np.repeat(absmax, block_size)
        return exact.astype(dtype)


# A tile and a half, or a block more than a tile.
def num_blocks(block_size):
    return max(4096 * 3 // 2 // block_size, 5)


@pytest.mark.matrix
@every_dtype
@pytest.mark.parametrize("block_size", mosaic_gpu.BLOCK_SIZES)
@pytest.mark.parametrize("names", [("nf4", "fp4"), ("dynamic8", "dynamic8_unsigned")])
def test_emulated_dequantize(names, block_size, dtype):
    blocks = num_blocks(block_size)
    compiled, kernel = compiled_dequantize(names[0], blocks, block_size, dtype)
    for name in names:
        codes, absmax = encoded(name, blocks, block_size)
        got = emulated_dequantize(kernel, name, codes, absmax, block_size, dtype)
        expected = decoded_by_numpy(codes, absmax, name, block_size, dtype)
        np.testing.assert_array_equal(
            got.astype(np.float32), expected.astype(np.float32)
        )
    check_compiled(compiled, kernel, instructions=9)


# More absmax than share a nested one, and several matrices with their own.
@pytest.mark.parametrize(
    ("name", "matrices", "blocks", "block_size", "dtype"),
    [
        ("nf4", 1, 300, 64, jnp.bfloat16),
        ("nf4", 3, 300, 32, jnp.float32),
        ("dynamic8", 2, 5, 4096, jnp.float16),
    ],
)
def test_emulated_dequantize_of_nested_absmax(
    name, matrices, blocks, block_size, dtype
):
    compiled, kernel = compiled_dequantize(
        name, blocks, block_size, dtype, True, matrices
    )
    codes, absmax, nested_absmax, offset = nested(name, matrices, blocks, block_size)
    rows, columns = _tiles.decoded_tile(block_size, np.dtype(dtype))
    options = {"block_size": block_size, "dtype": dtype, "implementation": "reference"}
    of_absmax = jnp.asarray(nested_absmax), jnp.asarray(offset)
    expected = np.asarray(dequantize(codes, absmax, name, nested=of_absmax, **options))
    out = np.full(expected.nbytes, 0xA5, np.uint8)
    table = np.resize(CODEBOOKS[name], max(128, len(CODEBOOKS[name])))
    # Buffers are in the order of their first use.
    buffers = [codes, absmax, offset, nested_absmax, table, out, DYNAMIC8_SIGNED]
    ptx_emulator.run(
        kernel.ptx,
        [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in buffers],
        grid=(matrices * -(-blocks // rows), block_size // columns, 1),
    )
    np.testing.assert_array_equal(
        out.view(dtype).astype(np.float32), expected.reshape(-1).astype(np.float32)
    )
    check_compiled(compiled, kernel, instructions=9)


# Tiles of a whole row, of several rows, and one that overlaps another.
@pytest.mark.matrix
@every_dtype
@pytest.mark.parametrize(
    ("name", "block_size", "blocks"),
    [("nf4", 64, 64), ("nf4", 64, 100), ("dynamic8", 256, 8), ("nf4", 4096, 5)],
)
def test_emulated_embed(name, block_size, blocks, dtype):
    num_rows, dtype = 7, np.dtype(dtype)
    codes, absmax = encoded(name, num_rows * blocks, block_size)
    ids = np.array([6, 0, -3, 6, 7], np.int32)
    rows = codes.reshape(num_rows, -1), absmax.reshape(num_rows, -1)
    fn = functools.partial(embed, name=name, block_size=block_size, dtype=dtype)
    compiled, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(), lambda *args: fn(*args), *avals(ids, *rows)
    )
    # XLA looks these up before the kernel.
    at = np.array([6, 0, 4, 6, 0], np.int32)
    of_rows = rows[1][at]
    of_rows[-1] = np.nan
    out = np.full(len(ids) * blocks * block_size * dtype.itemsize, 0xA5, np.uint8)
    num_tiled, columns = embed_kernel.tile_of(blocks, block_size, dtype)
    table = np.resize(CODEBOOKS[name], max(128, len(CODEBOOKS[name])))
    ptx_emulator.run(
        kernel.ptx,
        [x.reshape(-1).view(np.uint8) for x in (at, codes, of_rows, table)] + [out],
        grid=(len(ids) * -(-blocks // num_tiled), block_size // columns, 1),
    )
    expected = decoded_by_numpy(rows[0][at], of_rows, name, block_size, dtype)
    np.testing.assert_array_equal(
        out.view(dtype).astype(np.float32), expected.astype(np.float32)
    )
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    # The rows' numbers and absmax fit in this, but not a row of codes.
    assert compiled.memory_analysis().temp_size_in_bytes < of_rows.nbytes + 1024


@pytest.mark.parametrize(
    ("blocks", "block_size", "message"),
    [(8, 64, "at least 1024 elements here; these have 512"), (20, 48, "got 48")],
)
def test_rows_that_are_not_looked_up(blocks, block_size, message):
    codes = jnp.zeros((4, blocks * block_size // 2), jnp.uint8)
    with pytest.raises(NotImplementedError, match=message):
        embed(jnp.arange(3), codes, jnp.ones((4, blocks)), block_size=block_size)


def test_rows_of_a_short_block_are_not_looked_up():
    weight = Weight(
        jnp.zeros((4, 1040), jnp.uint8), jnp.ones((4, 33)), None, NF4, 64, 2080
    )
    with pytest.raises(
        NotImplementedError, match="whole blocks of 64; these have 2080"
    ):
        embed_blockwise(jnp.arange(3), weight, implementation="mosaic_gpu")


def values_to_encode(blocks, block_size, dtype):
    """Returns random and extreme blocks."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((blocks, block_size))
    x *= np.exp(4 * generator.standard_normal((blocks, 1)))
    limits = jnp.finfo(dtype)
    extremes = [
        0.0 * x[0],
        -0.0 * x[0],
        np.clip(x[0], -1, 1) * float(limits.max),
        x[0] * float(limits.smallest_subnormal) * 9,
        np.sign(x[0]) * float(limits.tiny),
    ]
    x[: len(extremes)] = extremes
    x = np.clip(x, -float(limits.max), float(limits.max)).astype(dtype)
    for i, value in enumerate([np.nan, np.inf, -np.inf]):
        x[len(extremes) + i, 7 * i] = value
    # These are decision points, in a few blocks with an absmax of 1.
    points = np.concatenate([decision_points(book)[0] for book in CODEBOOKS.values()])
    ties = np.resize(points, (blocks // 2, block_size)).astype(dtype)
    ties[:, 0] = 1
    x[blocks - blocks // 2 :] = ties
    return x.reshape(-1)


def encoded_by_numpy(x, name, block_size):
    """Computes the specification. Unlike XLA on a CPU, NumPy has subnormals."""
    points, code_of = decision_points(CODEBOOKS[name])
    blocks = x.astype(np.float32).reshape(-1, block_size)
    absmax = np.max(np.abs(blocks), axis=1)
    one = np.float32(1)
    with np.errstate(all="ignore"):
        nearer = np.where(absmax > 2.0**64, np.float32(2.0**-64), one)
        nearer = np.where(absmax < 2.0**-64, np.float32(2.0**64), nearer)
        reciprocal = np.where(absmax > 0, one / (absmax * nearer), np.float32(0))
        scaled = (blocks * nearer[:, None]) * reciprocal[:, None]
    return code_of[np.searchsorted(points, scaled, side="left")], absmax


@functools.cache
def compiled_quantize(name, blocks, block_size, dtype):
    fn = functools.partial(quantize, name=name, block_size=block_size)
    x = jax.ShapeDtypeStruct((blocks * block_size,), dtype)
    compiled, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(), lambda x: fn(x), x
    )
    return compiled, kernel


def check_emulated_quantize(kernel, name, x, block_size, grid, **options):
    _, table = _cells.of_codebook(CODEBOOKS[name].tobytes())
    per_byte = 2 if len(CODEBOOKS[name]) == 16 else 1
    blocks = x.size // block_size
    # Elements that are never written stay 0xA5.
    codes = np.full(x.size // per_byte, 0xA5, np.uint8)
    absmax = np.full(4 * blocks, 0xA5, np.uint8)
    table = tables.shared_table(table)
    buffers = [table.view(np.uint8), x.view(np.uint8), absmax, codes]
    ptx_emulator.run(kernel.ptx, buffers, grid, **options)
    expected, expected_absmax = encoded_by_numpy(x, name, block_size)
    np.testing.assert_array_equal(absmax.view(np.float32), expected_absmax)
    if per_byte == 2:
        codes = np.stack([codes >> 4, codes & 15], axis=-1)
    # Codes of blocks that are not finite are meaningless.
    is_finite = np.isfinite(expected_absmax)
    got = codes.reshape(blocks, block_size)
    np.testing.assert_array_equal(got[is_finite], expected[is_finite])


# FP4 and the unsigned map take the others' paths, so one size is enough for them.
@pytest.mark.matrix
@every_dtype
@pytest.mark.parametrize(
    ("name", "block_size"),
    [(n, b) for n in ("nf4", "dynamic8") for b in mosaic_gpu.BLOCK_SIZES]
    + [("fp4", 64), ("dynamic8_unsigned", 256)],
)
def test_emulated_quantize(name, block_size, dtype):
    rows = mosaic_gpu_kernel.rows_encoded(block_size, np.dtype(dtype))
    # A tile and a half.
    blocks = max(rows * 3 // 2, 16)
    x = values_to_encode(blocks, block_size, dtype)
    x = np.abs(x) if name == "dynamic8_unsigned" else x
    compiled, kernel = compiled_quantize(name, blocks, block_size, np.dtype(dtype))
    grid = (-(-blocks // rows), 1, 1)
    check_emulated_quantize(kernel, name, x, block_size, grid)
    # 65,536 registers hold six warpgroups with 80 each, three with 168, or two with
    # 255. All keep enough reads in flight to hide the memory's latency.
    check_compiled(
        compiled,
        kernel,
        instructions=28,
        elements=rows * block_size // 128,
        registers=80 if block_size <= 512 else 168 if block_size <= 2048 else 255,
    )


def test_more_tiles_than_run_at_once(monkeypatch):
    """Two warpgroups loop over five tiles, and the last tile overlaps another."""
    monkeypatch.setattr(mosaic_gpu_kernel, "CONCURRENT_TILES", 2)
    blocks = 64 * 4 + 16
    x = values_to_encode(blocks, 64, np.float32)
    _, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        lambda x: quantize(x),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    assert kernel.count("BRA") > 0
    check_emulated_quantize(kernel, "nf4", x, 64, (2, 1, 1), together=False)
