"""The kernel of update_8bit for Hopper, on machines without one.

As in test_mosaic_gpu.py, the tests cover which calls run it, on the CPU and for absent
devices; the compiled kernel, emulated instruction by instruction on the buffers that it
reads and writes; and the instructions that the compiler produced.

The emulated kernel is compared bit for bit with NumPy. The compiler may round a sum of
products once instead of twice. So that both agree, factors are powers of two and
gradients have 11 bits.
"""

import dataclasses
import functools

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
from kernel_checks import avals, lowered_for, operations_of

import jaxbnb
from jaxbnb.optim._elementwise import _finish
from jaxbnb_kernels import _cells, _dynamic8, config
from jaxbnb_kernels._mosaic_gpu import inlined
from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    decision_points,
)
from jaxbnb_kernels.update_8bit import (
    Moment,
    Rule,
    block_layout,
    mosaic_gpu,
    mosaic_gpu_kernel,
    update_8bit,
)

OPTIMIZERS = {
    "adam": jaxbnb.optim.scale_by_adam8bit(),
    "nadam": jaxbnb.optim.scale_by_adam8bit(nesterov=True),
    "lion": jaxbnb.optim.scale_by_lion8bit(),
    "momentum": jaxbnb.optim.trace8bit(0.9),
    "nesterov": jaxbnb.optim.trace8bit(0.9, nesterov=True),
    "rmsprop": jaxbnb.optim.scale_by_rms8bit(),
    "rmsprop_eps_outside": jaxbnb.optim.scale_by_rms8bit(eps_in_sqrt=False),
    "rmsprop_centered": jaxbnb.optim.scale_by_stddev8bit(),
    "adagrad": jaxbnb.optim.scale_by_rss8bit(),
    "ademamix": jaxbnb.optim.scale_by_ademamix8bit(),
}
LEVELS = {True: DYNAMIC8_SIGNED, False: DYNAMIC8_UNSIGNED}
every_rule = pytest.mark.parametrize("name", OPTIMIZERS)
# Machine instructions for each element of bfloat16, in the loop over tiles. An H200
# reads and writes AdamW's ten bytes in the time of 69 instructions, and AdEMAMix's
# twelve in the time of 83.
INSTRUCTIONS = {"adam": 69, "nadam": 71, "lion": 42, "momentum": 37, "nesterov": 38}
INSTRUCTIONS |= {"rmsprop": 42, "rmsprop_eps_outside": 41, "rmsprop_centered": 73}
INSTRUCTIONS |= {"adagrad": 41, "ademamix": 97}


def rule_of(name, has_param):
    """Returns ``(rule, scalars, signed)``; factors are powers of two."""
    low_bit = OPTIMIZERS[name].definition
    names = list(low_bit.scalars(jnp.int32(3)))
    names += ["learning_rate", "weight_decay"] if has_param else []
    scalars = {n: jnp.float32(2.0 ** -(1 + i % 5)) for i, n in enumerate(names)}
    rule = dataclasses.replace(low_bit.rule, finish=_finish if has_param else None)
    return rule, scalars, tuple(m.signed for m in low_bit.moments)


def values(shape, dtype, generator):
    """Draws values of 11 bits, so that squares are exact in every dtype."""
    x = generator.standard_normal(shape) * np.exp(2 * generator.standard_normal(shape))
    return x.astype(np.float16).astype(dtype)


def state_of(shape, signed, block_size, grad_dtype, param_dtype=None, seed=0):
    """Returns NumPy ``(grad, moments, param)``, with extreme blocks and elements."""
    generator = np.random.default_rng(seed)
    grad = values(shape, grad_dtype, generator)
    param = None if param_dtype is None else values(shape, param_dtype, generator)
    moments = []
    for is_signed in signed:
        absmax_shape = block_layout(shape, block_size).absmax_shape
        absmax = np.abs(generator.standard_normal(absmax_shape)).astype(np.float32)
        codes = generator.integers(0, 256, shape).astype(np.uint8)
        extremes = [0.0, 3e38, 1e-45, 1.2e-38]
        absmax.flat[: len(extremes)] = extremes
        codes.reshape(-1, block_size)[0] = 127 if is_signed else 0
        moments.append(Moment(codes, absmax, is_signed))
    blocks = grad.reshape(-1, block_size)
    # Extreme blocks: zeros, subnormal moments, and a unit of each sign.
    blocks[0] = 0
    blocks[2] = 0
    blocks[4] = np.where(np.arange(block_size) % 2, 1, -1)
    for i, value in enumerate([np.nan, np.inf, -np.inf]):
        blocks[4 + i % 2, 7 * i + 1] = value
    if grad_dtype != np.float16:
        blocks[5, 3] = 3e38
    return grad, tuple(moments), param


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


# Functions as in the kernel, exactly rounded where the hardware approximates.
NUMPY = {
    "abs": np.abs,
    "add": np.add,
    "div": lambda x, y: x * (np.float32(1) / flushed(y)),
    "gt": np.greater,
    "is_finite": np.isfinite,
    "max": np.maximum,
    "mul": np.multiply,
    "neg": np.negative,
    "rsqrt": lambda x: (1 / np.sqrt(np.float64(x))).astype(np.float32),
    "select_n": lambda which, false, true: np.where(which, true, false),
    "sign": np.sign,
    "sqrt": lambda x: np.sqrt(flushed(x)),
    "sub": np.subtract,
}
INSTEAD = {
    name: lambda *inputs, fn=fn, **_: fn(*inputs) for name, fn in NUMPY.items()
} | {"broadcast_in_dim": lambda x, shape, **_: np.broadcast_to(x, shape)}


def stepped_by_numpy(rule, scalars, grad, moments, param, block_size):
    """Computes the specification. Unlike XLA on a CPU, NumPy has subnormals."""
    fn = rule.apply if param is None else rule.apply_to
    blocks = (grad.size // block_size, block_size)
    old = tuple(
        LEVELS[m.signed][m.codes].reshape(blocks) * m.absmax.reshape(-1, 1)
        for m in moments
    )
    args = [scalars, grad.astype(np.float32).reshape(blocks), old]
    args += [] if param is None else [param.astype(np.float32).reshape(blocks)]
    jaxpr = jax.make_jaxpr(fn)(*args)
    leaves = [np.asarray(x) for x in jax.tree.leaves(args)]
    with np.errstate(all="ignore"):
        result, *kept = inlined.evaluate(jaxpr, leaves, INSTEAD)
        result = result.astype((grad if param is None else param).dtype)
        encoded = [
            encoded_by_numpy(k, m.signed) for k, m in zip(kept, moments, strict=True)
        ]
    return result.reshape(grad.shape), encoded


def encoded_by_numpy(blocks, signed):
    absmax = np.max(np.abs(blocks), axis=1)
    one = np.float32(1)
    nearer = np.where(absmax > 2.0**64, np.float32(2.0**-64), one)
    nearer = np.where(absmax < 2.0**-64, np.float32(2.0**64), nearer)
    reciprocal = np.where(absmax > 0, one / (absmax * nearer), np.float32(0))
    scaled = (blocks * nearer[:, None]) * reciprocal[:, None]
    points, code_of = decision_points(LEVELS[signed])
    codes = code_of[np.searchsorted(points, scaled, side="left")]
    if not signed:
        codes = np.where(scaled > 0, np.maximum(codes, 1), codes)
    return codes, absmax


def buffer(x):
    return np.ascontiguousarray(x).view(np.uint8).reshape(-1).copy()


def emulate(kernel, scalars, grad, moments, param, grid, **options):
    """Runs the kernel and returns its buffers: ``(result, *codes, *absmax)``."""
    like = [*(m.codes for m in moments), *(m.absmax for m in moments)]
    state = [buffer(x) for x in like]
    # The kernel reads four scalars at a time, and so reads beyond the last.
    scalars = np.stack([np.asarray(x) for x in jax.tree.leaves(scalars)], axis=-1)
    scalars = buffer(np.concatenate([scalars.reshape(-1), np.zeros(4, np.float32)]))
    tables = [
        buffer(table)
        for signed in sorted({m.signed for m in moments})
        for table in mosaic_gpu_kernel.tables_of(signed)
    ]
    if param is None:
        # Elements that are never written stay 0xA5.
        result = np.full(grad.nbytes, 0xA5, np.uint8)
        buffers = [buffer(grad), *state, scalars, result, *tables]
    else:
        result = buffer(param)
        buffers = [buffer(grad), result, *state, scalars, *tables]
    ptx_emulator.run(kernel.ptx, buffers, grid, **options)
    like = [grad if param is None else param, *like]
    return [
        written.view(x.dtype).reshape(x.shape)
        for written, x in zip([result, *state], like, strict=True)
    ]


@functools.cache
def compiled(name, shape, block_size, grad_dtype, param_dtype):
    rule, scalars, signed = rule_of(name, param_dtype is not None)
    grad, moments, param = state_of(shape, signed, block_size, grad_dtype, param_dtype)

    def run(scalars, grad, moments, param):
        return update_8bit(
            rule,
            scalars,
            grad,
            moments,
            param,
            block_size=block_size,
            implementation="mosaic_gpu",
        )

    donated = (2,) if param is None else (2, 3)
    result, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        run,
        *avals(scalars, grad, moments, param),
        donate_argnums=donated,
    )
    return result, kernel


def check_emulated(name, shape, block_size, grad_dtype, param_dtype, **options):
    """Checks a call with all tiles at once; returns the compiled program."""
    rule, scalars, signed = rule_of(name, param_dtype is not None)
    grad, moments, param = state_of(shape, signed, block_size, grad_dtype, param_dtype)
    program, kernel = compiled(name, shape, block_size, grad_dtype, param_dtype)
    dtypes = (grad.dtype, (grad if param is None else param).dtype)
    rows, _ = mosaic_gpu_kernel.tile_of(block_size, *dtypes)
    tiles = -(-grad.size // block_size // rows)
    grid = (min(tiles, mosaic_gpu_kernel.CONCURRENT_TILES), 1, 1)
    got = emulate(kernel, scalars, grad, moments, param, grid, **options)
    expected, encoded = stepped_by_numpy(
        rule, scalars, grad, moments, param, block_size
    )
    # Only one of them rounds the square of the mean, by up to 2^-24 of it. The variance
    # is a 16th of the square or more, so that is up to 2^-20 of the variance.
    tolerance = 2.0**-20 if name == "rmsprop_centered" else 0.0
    check_equal(got, expected, encoded, tolerance)
    return program, kernel, rows * block_size // 128


def check_equal(got, expected, encoded, tolerance=0.0):
    result, *state = got
    np.testing.assert_allclose(
        result.astype(np.float32), expected.astype(np.float32), rtol=tolerance
    )
    assert np.isnan(result.astype(np.float32)).sum() >= 3
    codes, absmax = state[: len(encoded)], state[len(encoded) :]
    for i, of_moment in enumerate(encoded):
        expected_codes, expected_absmax = of_moment
        np.testing.assert_array_equal(absmax[i].reshape(-1), expected_absmax)
        blocks = codes[i].reshape(expected_codes.shape)
        np.testing.assert_array_equal(blocks, expected_codes)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def blocks_of(block_size):
    """Returns a tile and a half, or a tile and a block: some rows do not exist."""
    return max(mosaic_gpu_kernel.TILE * 3 // 2 // block_size, 7)


@pytest.mark.matrix
@pytest.mark.parametrize("has_param", [True, False], ids=["whole", "update"])
@every_rule
def test_emulated_rules(name, has_param):
    dtype = np.dtype(jnp.bfloat16)
    shape = (11, 256)
    program, kernel, _ = check_emulated(
        name, shape, 256, dtype, dtype if has_param else None
    )
    # Four warpgroups on a multiprocessor can have 128 registers each.
    check_compiled(program, kernel, registers=128)


@pytest.mark.matrix
@every_rule
def test_instructions_an_element(name, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_kernel, "CONCURRENT_TILES", 2)
    dtype = np.dtype(jnp.bfloat16)
    rows, _ = mosaic_gpu_kernel.tile_of(256, dtype)
    # The loop over tiles takes eight turns.
    _, kernel = compiled(name, (8 * 2 * rows, 256), 256, dtype, dtype)
    elements = rows * 256 // 128
    assert 20 * elements < len(kernel.loop) <= INSTRUCTIONS[name] * elements


@pytest.mark.matrix
@pytest.mark.parametrize("param_dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_emulated_dtypes(grad_dtype, param_dtype):
    dtypes = np.dtype(grad_dtype), np.dtype(param_dtype)
    check_emulated("adam", (19, 128), 128, *dtypes)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_size", mosaic_gpu.BLOCK_SIZES)
def test_emulated_block_sizes(block_size, dtype):
    dtype = np.dtype(dtype)
    shape = (blocks_of(block_size), block_size)
    program, kernel, _ = check_emulated("adam", shape, block_size, dtype, dtype)
    check_compiled(program, kernel, registers=255 if block_size == 1024 else 168)


def check_compiled(program, kernel, registers=168):
    """Checks for 168 registers: then a multiprocessor holds three warpgroups."""
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.registers <= registers
    assert "copy" not in operations_of(program)


# Which implementation runs.


def call(implementation="mosaic_gpu", name="adam", block_size=256):
    rule, _, signed = rule_of(name, has_param=True)

    def run(scalars, grad, codes, absmax, param):
        moments = tuple(map(Moment, codes, absmax, signed))
        return update_8bit(
            rule,
            scalars,
            grad,
            moments,
            param,
            block_size=block_size,
            implementation=implementation,
        )

    return run


def arguments(shape=(32, 256), dtype=np.float32, name="adam", block_size=256):
    _, scalars, signed = rule_of(name, has_param=True)
    grad, moments, param = state_of(shape, signed, block_size, dtype, dtype)
    arrays = (grad, [m.codes for m in moments], [m.absmax for m in moments], param)
    return scalars, *jax.tree.map(jnp.asarray, arrays)


def test_off_a_gpu_the_kernel_refuses():
    message = r"compute capability 7.5, .* 12.0; this is lowered for cpu"
    with pytest.raises(NotImplementedError, match=message):
        call()(*arguments())


def test_on_another_gpu_the_kernel_refuses():
    with pytest.raises(NotImplementedError, match=r"12.0; this one's is 7.0"):
        lowered_for(hopper_compiler.mesh(gpu="v100"), call(), *arguments())


@pytest.mark.parametrize(
    ("shape", "block_size", "message"),
    [
        ((32, 256), 16, r"blocks of \(32, .* 1024\) elements here; got 16"),
        ((32, 4096), 2048, "got 2048"),
        ((32, 96), 96, "got 96"),
        # Blocks of up to 256 hold five whole rows of 48.
        ((40, 48), 256, "got 240"),
        ((8, 300), 256, r"whole blocks; \(300,\) ends with a part of one of 256"),
    ],
)
def test_what_the_kernel_does_not_serve(shape, block_size, message, monkeypatch):
    rule, scalars, signed = rule_of("adam", True)
    layout = block_layout(shape, block_size)
    moments = [
        Moment(jnp.ones(shape, jnp.uint8), jnp.ones(layout.absmax_shape), s)
        for s in signed
    ]
    args = rule, scalars, jnp.ones(shape), moments, jnp.ones(shape)
    with pytest.raises(NotImplementedError, match=message):
        update_8bit(*args, block_size=block_size, implementation="mosaic_gpu")
    monkeypatch.setattr(config, "mosaic_gpu", "never")
    # Other implementations serve it.
    expected = update_8bit(*args, block_size=block_size)
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    got = update_8bit(*args, block_size=block_size)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("direction", "scalars", "message"),
    [
        (lambda s, g, old, new: jnp.sin(g), {}, "not support sin in a rule"),
        (lambda s, g, old, new: g + jnp.ones(1), {}, "not support constants in"),
        (lambda s, g, old, new: g * jnp.sqrt(s), 2.0, "not support sqrt of a scalar"),
        (lambda s, g, old, new: g * s, 2, r"float32 scalars; got int32 of shape \(\)"),
        (lambda s, g, old, new: g * s, jnp.ones(1), r"float32 of shape \(1,\)"),
    ],
)
def test_rules_that_the_kernel_does_not_serve(direction, scalars, message):
    constants = np.ones(1, np.float32)
    rule = Rule(lambda s, g, old: (g + 0 * old[0],), direction)
    if "constants" in message:
        rule = Rule(rule.advance, lambda s, g, old, new: g + constants)
    zero = Moment(jnp.full(256, 127, jnp.uint8), jnp.zeros(1), True)
    with pytest.raises(NotImplementedError, match=message):
        update_8bit(rule, scalars, jnp.ones(256), [zero], implementation="mosaic_gpu")


def test_other_dtypes_are_not_served():
    rule, scalars, signed = rule_of("momentum", False)
    zero = Moment(jnp.full(256, 127, jnp.uint8), jnp.zeros(1), *signed)
    grad = jnp.ones(256, jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="not support float8_e4m3fn"):
        update_8bit(rule, scalars, grad, [zero], implementation="mosaic_gpu")


def test_it_is_chosen_by_itself_on_hopper_unless_switched_off(monkeypatch):
    """An optimizer's own step uses it, without a request."""
    tx = jaxbnb.adamw8bit(1e-3)
    params = {"kernel": jnp.ones((32, 256)), "bias": jnp.ones(8)}

    def text(mesh):
        # A new function, because traces are cached.
        step = jaxbnb.optim.fused_step(tx)
        return lowered_for(mesh, lambda *a: step(*a), params, tx.init(params), params)

    hopper, volta = hopper_compiler.mesh(), hopper_compiler.mesh(gpu="v100")
    two = hopper_compiler.mesh(num_devices=2)
    monkeypatch.setattr(config, "mosaic_gpu", "never")
    assert "mosaic_gpu" not in text(hopper)
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    assert text(hopper).count("custom_call @mosaic_gpu") == 1
    assert "mosaic_gpu" not in text(volta)
    # XLA picks the kernel when it divides the arrays.
    assert text(two).count("@CustomSPMDPartitioning") == 1


def test_switched_off_the_cpu_has_the_same_numbers(monkeypatch):
    """They agree eagerly, compiled, mapped, and differentiated."""
    args = arguments((3, 512))
    of_rows = (None, 0, 0, 0, 0)

    def transformed():
        # A new function, because traces are cached.
        run = call(None)
        args_of_rows = jax.tree.map(lambda x: x, args)

        def total(grad, param):
            return jnp.sum(run(args[0], grad, args[2], args[3], param)[0])

        clean = jnp.nan_to_num(args[1], posinf=1.0, neginf=1.0), args[4]
        return (
            str(jax.make_jaxpr(run)(*args)),
            run(*args),
            jax.jit(run)(*args),
            jax.vmap(run, of_rows)(*args_of_rows),
            jax.grad(total, (0, 1))(*clean),
        )

    monkeypatch.setattr(config, "mosaic_gpu", "never")
    jaxpr, *expected = transformed()
    assert "kernels=()" in jaxpr
    monkeypatch.setattr(config, "mosaic_gpu", "always")
    jaxpr, *got = transformed()
    assert "kernels=()" not in jaxpr
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# The whole step.


def test_a_donated_step_is_one_kernel_and_nothing_else():
    """It lacks copies and sizeable temporaries, and its outputs overwrite inputs."""
    tx = jaxbnb.adamw8bit(1e-3)
    params = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    program, kernels = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        jaxbnb.optim.fused_step(tx),
        params,
        state,
        params,
        donate_argnums=(1, 2),
    )
    assert len(kernels) == 1
    found = operations_of(program)
    assert found.count("custom-call") == 1
    assert "copy" not in found
    assert "copy-start" not in found
    memory = program.memory_analysis()
    # These bytes are the scalars, and the step count that gives them.
    assert memory.temp_size_in_bytes <= 512
    overwritten = jax.tree.leaves((params, state))
    num_bytes = sum(x.size * x.dtype.itemsize for x in overwritten)
    assert memory.alias_size_in_bytes == num_bytes
    # The rest is a table of the results' addresses.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 64


def test_a_mapped_step_is_one_kernel_of_all_examples():
    """Each has its own scalars and ragged end, in more tiles than run at once."""
    examples, shape, block_size = 3, (11, 256), 256
    rule, scalars, signed = rule_of("adam", True)
    scalars = {
        name: x * np.array([1, 2, 0.5], np.float32) for name, x in scalars.items()
    }
    dtype = np.dtype(jnp.bfloat16)
    each = [state_of(shape, signed, 256, dtype, dtype, seed=i) for i in range(examples)]
    grad, moments, param = jax.tree.map(lambda *x: np.stack(x), *each)

    def run(*args):
        return update_8bit(rule, *args, implementation="mosaic_gpu")

    program, (kernel,) = hopper_compiler.compile_for(
        hopper_compiler.mesh(),
        jax.vmap(run),
        *avals(scalars, grad, moments, param),
        donate_argnums=(2, 3),
    )
    assert operations_of(program).count("custom-call") == 1
    assert "copy" not in operations_of(program)
    got = emulate(kernel, scalars, grad, moments, param, (6, 1, 1))
    for i, (grad, moments, param) in enumerate(each):
        own = {name: np.float32(x[i]) for name, x in scalars.items()}
        expected, encoded = stepped_by_numpy(
            rule, own, grad, moments, param, block_size
        )
        check_equal([x[i] for x in got], expected, encoded)


def test_more_tiles_than_run_at_once(monkeypatch):
    """Two warpgroups loop over five tiles, and the last tile is not whole."""
    monkeypatch.setattr(mosaic_gpu_kernel, "CONCURRENT_TILES", 2)
    dtype = np.dtype(jnp.bfloat16)
    check_emulated("adam", (8 * 4 + 3, 256), 256, dtype, dtype, together=False)


@pytest.mark.parametrize("check_vma", [True, False])
def test_within_shard_map_it_is_chosen(check_vma):
    mesh = hopper_compiler.mesh(num_devices=2)
    tx = jaxbnb.adamw8bit(1e-3)
    params = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    rows, whole = (jax.sharding.PartitionSpec(*axes) for axes in (["device"], []))
    specs = jax.tree.map(lambda x: rows if x.ndim else whole, state)
    step = jax.shard_map(
        jaxbnb.optim.fused_step(tx),
        mesh=mesh,
        in_specs=(rows, specs, rows),
        out_specs=(rows, specs),
        check_vma=check_vma,
    )
    shardings = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, spec), (rows, specs, rows)
    )
    program, _ = hopper_compiler.compile_for(
        mesh,
        step,
        params,
        state,
        params,
        in_shardings=shardings,
        out_shardings=shardings[:0:-1],
        donate_argnums=(1, 2),
    )
    assert operations_of(program).count("custom-call") == 1
    assert "copy" not in operations_of(program)


# Encoding of moments.


@pytest.mark.parametrize("signed", [True, False])
def test_cells_encode_as_the_other_implementations_do(signed):
    """They may differ if both codes are equally near, to float32's precision."""
    points, _ = decision_points(LEVELS[signed])
    generator = np.random.default_rng(0)
    x = np.concatenate(
        [np.nextafter(points, np.float32(end)) for end in (-2, 2)]
        + [points, LEVELS[signed], np.array([0.0, 1.0, 1.2e-38])]
        + [generator.uniform(0, 1, 2**13), 10 ** generator.uniform(-12, 0, 2**13)]
    )
    x = np.concatenate([x, -x] if signed else [np.abs(x)]).astype(np.float32)
    cells, table = mosaic_gpu_kernel.cells_of(signed)
    got = np.asarray(_cells.encode(jnp.asarray(x), cells, jnp.asarray(table)))
    expected = np.asarray(
        _dynamic8.encode(jnp.asarray(x), signed=signed, keep_positive=not signed)
    )
    nearest = points[np.argmin(np.abs(x[:, None] - points), axis=1)]
    is_near = np.abs(x - nearest) <= 2.0**-20 * np.abs(nearest)
    np.testing.assert_array_equal(got[~is_near], expected[~is_near])
    assert np.all(np.abs(got.astype(int) - expected)[is_near] <= 1)
    assert np.all((got == (127 if signed else 0)) >= (x == 0))
    if not signed:
        assert np.all(got[x > 0] > 0)
