"""The kernel of update_8bit for Hopper, on machines without one.

As in test_mosaic_gpu.py: who runs it, on the CPU and for devices that are not there; the
compiled kernel, emulated instruction by instruction on the very buffers that it reads
and writes; and what the compiler made of it.

The emulated kernel is compared bit for bit with NumPy. The compiler may round a sum of
products once instead of twice; so that both are the same, factors are powers of two and
gradients have 11 bits.
"""

import dataclasses
import functools
import re

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
from hopper_compiler import avals, lowered_for

import jaxbnb
from jaxbnb.optim._alias import _finish
from jaxbnb_kernels import _cells, _dynamic8, _hopper, _inlined
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
# Of bytes that a parameter costs in memory traffic at 69 instructions each, as of an
# H200's memory and 128 of them a cycle. What is counted is PTX, with all that is done
# once: machine code has a fifth less, 67.4 in the loop for AdamW of bfloat16.
INSTRUCTIONS = {"adam": 86, "nadam": 88, "lion": 54, "momentum": 48, "nesterov": 49}
INSTRUCTIONS |= {"rmsprop": 48, "rmsprop_eps_outside": 54, "rmsprop_centered": 87}
INSTRUCTIONS |= {"adagrad": 48, "ademamix": 120}


def rule_of(name, has_param):
    """``(rule, scalars, signed)`` of an optimizer, factors being powers of two."""
    low_bit = OPTIMIZERS[name].update.__self__
    names = list(low_bit.scalars(jnp.int32(3)))
    names += ["learning_rate", "weight_decay"] if has_param else []
    scalars = {n: jnp.float32(2.0 ** -(1 + i % 5)) for i, n in enumerate(names)}
    rule = dataclasses.replace(low_bit.rule, finish=_finish if has_param else None)
    return rule, scalars, tuple(m.signed for m in low_bit.moments)


def values(shape, dtype, generator):
    """Of 11 bits, whose squares are exact, and of any dtype."""
    x = generator.standard_normal(shape) * np.exp(2 * generator.standard_normal(shape))
    return x.astype(np.float16).astype(dtype)


def state_of(shape, signed, block_size, grad_dtype, param_dtype=None, seed=0):
    """``(grad, moments, param)`` as NumPy, with extreme blocks and elements."""
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
    # Nothing at all, subnormal moments, and a unit of each sign.
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


# As the kernel computes them, but rounded where the hardware only comes near.
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
    """The specification; unlike XLA on a CPU, NumPy has float32's subnormals."""
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
        result, *kept = _inlined.evaluate(jaxpr, leaves, INSTEAD)
        result = result.astype((grad if param is None else param).dtype)
        encoded = [
            encoded_by_numpy(k, m.signed) for k, m in zip(kept, moments, strict=True)
        ]
    return result.reshape(grad.shape), encoded


def encoded_by_numpy(blocks, signed):
    """``(codes, absmax, what is encoded)``."""
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
    return codes, absmax, scaled


def buffer(x):
    return np.ascontiguousarray(x).view(np.uint8).reshape(-1).copy()


def emulate(kernel, scalars, grad, moments, param, grid, **options):
    """``(result, *codes, *absmax)`` that the kernel leaves in the buffers."""
    like = [*(m.codes for m in moments), *(m.absmax for m in moments)]
    state = [buffer(x) for x in like]
    # Scalars are read four at a time, and so beyond the last.
    scalars = np.stack([np.asarray(x) for x in jax.tree.leaves(scalars)], axis=-1)
    scalars = buffer(np.concatenate([scalars.reshape(-1), np.zeros(4, np.float32)]))
    tables = [
        buffer(table)
        for signed in sorted({m.signed for m in moments})
        for table in mosaic_gpu.tables_of(signed)
    ]
    if param is None:
        # What is not written is found out.
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
    """Of a call whose tiles all run at once; returns what was compiled."""
    rule, scalars, signed = rule_of(name, param_dtype is not None)
    grad, moments, param = state_of(shape, signed, block_size, grad_dtype, param_dtype)
    program, kernel = compiled(name, shape, block_size, grad_dtype, param_dtype)
    dtypes = (grad.dtype, (grad if param is None else param).dtype)
    rows, _ = mosaic_gpu.tile_of(block_size, *dtypes)
    tiles = -(-grad.size // block_size // rows)
    grid = (min(tiles, mosaic_gpu.CONCURRENT_TILES), 1, 1)
    got = emulate(kernel, scalars, grad, moments, param, grid, **options)
    expected, encoded = stepped_by_numpy(
        rule, scalars, grad, moments, param, block_size
    )
    # The square of the mean is rounded in one and not in the other, which is up to
    # 2^-24 of it and so 2^-20 of the variance: that is a 16th of it or more.
    tolerance = 2.0**-20 if name == "rmsprop_centered" else 0.0
    np.testing.assert_allclose(
        got[0].astype(np.float32), expected.astype(np.float32), rtol=tolerance
    )
    assert np.isnan(got[0].astype(np.float32)).sum() >= 3
    for (codes, absmax, _), codes_, absmax_ in zip(
        encoded, got[1 : 1 + len(moments)], got[1 + len(moments) :], strict=True
    ):
        np.testing.assert_array_equal(absmax_.reshape(-1), absmax)
        np.testing.assert_array_equal(codes_.reshape(codes.shape), codes)
    return program, kernel, rows * block_size // 128


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def blocks_of(block_size):
    """A tile and a half, or a block more than a tile: some rows do not exist."""
    return max(mosaic_gpu.TILE * 3 // 2 // block_size, 7)


@pytest.mark.parametrize("has_param", [True, False], ids=["whole", "update"])
@every_rule
def test_emulated_rules(name, has_param):
    dtype = np.dtype(jnp.bfloat16)
    shape = (11, 256)
    program, kernel, elements = check_emulated(
        name, shape, 256, dtype, dtype if has_param else None
    )
    check_compiled(program, kernel)
    if has_param:
        assert len(kernel.instructions) <= INSTRUCTIONS[name] * elements


@pytest.mark.parametrize("param_dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_emulated_dtypes(grad_dtype, param_dtype):
    dtypes = np.dtype(grad_dtype), np.dtype(param_dtype)
    check_emulated("adam", (19, 128), 128, *dtypes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block_size", mosaic_gpu.BLOCK_SIZES)
def test_emulated_block_sizes(block_size, dtype):
    dtype = np.dtype(dtype)
    shape = (blocks_of(block_size), block_size)
    program, kernel, _ = check_emulated("adam", shape, block_size, dtype, dtype)
    check_compiled(program, kernel, registers=255 if block_size == 1024 else 168)


def check_compiled(program, kernel, registers=168):
    """Three warpgroups on a multiprocessor have 168 registers each."""
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.registers <= registers
    assert "copy" not in operations(program)


def operations(program):
    pattern = r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\("
    return re.findall(pattern, program.as_text(), re.MULTILINE)
