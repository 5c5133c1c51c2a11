"""Whether an op's numbers are right on this machine, by NumPy on the host.

Each check gives the largest error in units of the largest allowed: 1 passes, NaN does
not. Products are of small integers and powers of two, whose sums float32 holds in any
order: there nothing is allowed. So an element in the wrong place, or left out, shows.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED, FP4, NF4
from jaxbnb_kernels.embed_blockwise import embed_blockwise
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_int8 import matmul_int8
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit

Check = tuple[str, float]

# More tiles than run at a time, and no whole number of them.
_ROWS, _COLUMNS = 1031, 4096
# Encoders promise the nearest level to what is at most 2^-20 from x / absmax.
_ENCODED: Final = 2 * 2.0**-20
# A race may show in one call and not in another.
_CALLS: Final = 3
# Of each operation of a step: approximate quotients and roots are off by 2^-22.
_STEPPED: Final = 2.0**-19


def worst_code(
    x: Float[np.ndarray, "rows n"],
    codes: UInt8[np.ndarray, "rows stored"],
    absmax: Float32[np.ndarray, "rows blocks"],
    codebook: Float32[np.ndarray, "levels"],
    block_size: int,
) -> float:
    """How much farther from x a level is than the nearest one, and how wrong absmax is.

    Not code for code: near a decision point both neighbours are as good. n is a
    multiple of ``block_size``.
    """
    blocks = np.asarray(x, np.float64).reshape(len(x), -1, block_size)
    largest = np.max(np.abs(blocks), axis=-1)
    if not np.array_equal(absmax, largest, equal_nan=True):
        return np.inf
    # What is not finite has no code; a block of zeros has no scale.
    is_zero, is_finite = absmax == 0, np.isfinite(absmax)
    scale = np.where(is_zero | ~is_finite, 1, largest)[..., None]
    scaled = np.where(is_finite[..., None], blocks, 0) / scale
    levels = _levels(codes, codebook, x.shape[-1]).reshape(blocks.shape)
    levels = np.where(is_finite[..., None], levels, 0)
    farther = np.abs(levels - scaled) - np.abs(_nearest(scaled, codebook) - scaled)
    return float(np.max(farther)) / _ENCODED


def worst_level(
    decoded: Float[np.ndarray, "rows n"],
    codes: UInt8[np.ndarray, "rows stored"],
    absmax: Float32[np.ndarray, "rows blocks"],
    codebook: Float32[np.ndarray, "levels"],
    block_size: int,
    slack: Float[np.ndarray, "rows blocks"] | float = 0.0,
) -> float:
    """How wrong levels times absmax are.

    Where absmax may be off by ``slack``, so may they; else they are float32's, rounded
    once more to their dtype.
    """
    levels = _levels(codes, codebook, decoded.shape[-1]).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = levels * _spread(absmax, block_size)
        expected = np.asarray(expected.astype(decoded.dtype), np.float64)
    if np.all(slack == 0):
        is_same = np.array_equal(decoded, expected, equal_nan=True)
        return 0.0 if is_same else np.inf
    allowed = np.abs(levels) * _spread(np.asarray(slack), block_size)
    allowed += 2 * _unit_roundoff(decoded.dtype) * np.abs(expected)
    return _worst(np.asarray(decoded, np.float64) - expected, allowed)


def _quantize_blockwise(implementation: str | None) -> Iterator[Check]:
    for codebook, block_size, dtype in (
        (NF4, 64, jnp.bfloat16),
        (FP4, 32, jnp.float16),
        (DYNAMIC8_SIGNED, 256, jnp.float32),
        (DYNAMIC8_UNSIGNED, 4096, jnp.bfloat16),
    ):
        x = _extremes(dtype)
        x = np.abs(x) if codebook is DYNAMIC8_UNSIGNED else x
        options: dict[str, Any] = {"codebook": codebook, "block_size": block_size}

        def encode(x, options=options):
            return quantize_blockwise(x, **options, implementation=implementation)

        def decode(*encoded, options=options, dtype=dtype):
            options = options | {"size": _COLUMNS, "dtype": dtype}
            return dequantize_blockwise(
                *encoded, **options, implementation=implementation
            )

        name = f"{len(codebook)} levels, blocks of {block_size}, {jnp.dtype(dtype)}"
        codes, absmax = _run(encode, x)
        yield f"encode, {name}", worst_code(x, codes, absmax, *options.values())
        decoded = _run(decode, codes, absmax)
        error = worst_level(decoded, codes, absmax, *options.values())
        yield f"decode, {name}", error

    x = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32)
    codes, absmax = _run(lambda x: quantize_blockwise(x, NF4, block_size=64), x)
    absmax_codes, nested_absmax, offset = _run(quantize_absmax, absmax)
    scale = nested_absmax.repeat(256)[: absmax.size].reshape(absmax.shape)
    decoded_absmax = DYNAMIC8_SIGNED[absmax_codes] * scale + offset
    decoded = _run(
        lambda codes, absmax, *nested: dequantize_blockwise(
            codes,
            absmax,
            NF4,
            block_size=64,
            size=_COLUMNS,
            nested=nested,
            implementation=implementation,
        ),
        codes,
        absmax_codes,
        nested_absmax,
        offset,
    )
    # A product and a sum, each rounded.
    slack = 2.0**-23 * (scale + np.abs(offset))
    error = worst_level(decoded, codes, decoded_absmax, NF4, 64, slack)
    yield "decode, double quantisation", error


def _embed_blockwise(implementation: str | None) -> Iterator[Check]:
    for dtype in (jnp.bfloat16, jnp.float32):
        weight: Any = _weight(_ROWS, _COLUMNS, NF4)
        ids = np.random.default_rng(1).integers(-_ROWS, _ROWS, 700).astype(np.int32)

        def embed(ids, weight, dtype=dtype):
            return embed_blockwise(
                ids, weight, dtype=dtype, implementation=implementation
            )

        rows = _run(embed, np.append(ids, np.int32(_ROWS)), weight)
        of_ids = weight.codes[ids], weight.absmax[ids]
        error = worst_level(rows[:-1], *of_ids, weight.codebook, weight.block_size)
        yield f"rows, {jnp.dtype(dtype)}", error
        yield "a row that is not there", 0.0 if np.isnan(rows[-1]).all() else np.inf


def _matmul_blockwise(implementation: str | None) -> Iterator[Check]:
    for codebook, dtype, nested, counts in (
        (NF4, jnp.bfloat16, False, (1, 13, 40, 128, 600)),
        (NF4, jnp.bfloat16, True, (1, 128)),
        (FP4, jnp.float16, False, (13, 40)),
    ):
        weight: Any = _weight(1000, 1024, codebook, nested)
        levels = codebook.astype(dtype).astype(np.float64)
        absmax = 1.0 + np.asarray(weight.absmax == 255) if nested else weight.absmax
        matrix = _levels(weight.codes, levels, weight.size)
        matrix *= _spread(absmax, weight.block_size)
        for tokens in counts:
            for transpose in (True, False):

                def multiply(x, weight, transpose=transpose):
                    return matmul_blockwise(
                        x, weight, transpose=transpose, implementation=implementation
                    )

                operand = matrix.T if transpose else matrix
                x = _small_integers((tokens, len(operand)), 1).astype(dtype)
                error = _difference(_run(multiply, x, weight), x @ operand)
                yield (
                    f"{'x W.T' if transpose else 'x W'}, {tokens} rows, "
                    f"{jnp.dtype(dtype)}{', double quantisation' if nested else ''}",
                    error,
                )


def _matmul_int8(implementation: str | None) -> Iterator[Check]:
    codes = _small_integers((1000, 1024), 127).astype(np.int8)
    # So that decoded numbers are the codes.
    col_scale = np.full(len(codes), 127, np.float32)
    for tokens, dtype in (
        (1, jnp.bfloat16),
        (13, jnp.float32),
        (64, jnp.bfloat16),
        (128, jnp.float32),
        (200, jnp.bfloat16),
    ):
        for threshold in (0.0, 200.0):
            x = _small_integers((tokens, codes.shape[1]), 100)
            # So that codes are the numbers.
            x[:, 0] = 127
            if threshold:
                x[tokens // 2, 700:703] = 256

            def multiply(x, codes, col_scale, threshold=threshold):
                return matmul_int8(
                    x,
                    codes,
                    col_scale,
                    outlier_threshold=threshold,
                    compute_dtype=jnp.bfloat16,
                    implementation=implementation,
                )

            y = _run(multiply, x.astype(dtype), codes, col_scale)
            expected = x @ codes.T.astype(np.float64)
            # Sums of integers, scaled by three factors, and those of outliers.
            is_outlier = np.any(np.abs(x) >= (threshold or np.inf), axis=0)
            outliers = x[:, is_outlier] @ codes.T.astype(np.float64)[is_outlier]
            terms = np.abs(expected - outliers) + np.abs(outliers)
            allowed = 4 * 2.0**-24 * terms
            allowed += _unit_roundoff(dtype) * np.abs(expected)
            yield (
                f"{tokens} rows, {jnp.dtype(dtype)}{', outliers' if threshold else ''}",
                _worst(np.asarray(y, np.float64) - expected, allowed),
            )


def _update_8bit(implementation: str | None) -> Iterator[Check]:
    rate = np.float32(2.0**-7)
    adam = Rule(
        advance=lambda s, g, old: (
            0.875 * old[0] + 0.125 * g,
            0.96875 * old[1] + 0.03125 * (g * g),
        ),
        direction=lambda s, g, old, new: new[0] / (jnp.sqrt(new[1]) + 2.0**-20),
        finish=lambda s, update, param: -s * (update + 0.125 * param),
    )
    shape, block_size, signed = (_ROWS, 2048), 256, (True, False)
    rng = np.random.default_rng(0)
    for dtype in (jnp.bfloat16, jnp.float32):
        grad, param = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        of_blocks = absmax_shape(shape, block_size)
        moments = tuple(
            Moment(
                jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
                jnp.full(of_blocks, scale, jnp.float32),
                is_signed,
            )
            for scale, is_signed in zip((0.5, 2.0), signed, strict=True)
        )

        def step(grad, moments, param):
            return update_8bit(
                adam, rate, grad, moments, param, implementation=implementation
            )

        new_param, new = _run(step, grad, moments, param)
        m, v = (
            _codebook(o.signed)[o.codes].astype(np.float64) * o.absmax[0, 0]
            for o in moments
        )
        g, p = (np.asarray(a, np.float64) for a in (grad, param))
        m, v = 0.875 * m + 0.125 * g, 0.96875 * v + 0.03125 * g * g
        update = m / (np.sqrt(v) + 2.0**-20)
        expected = p - rate * (update + 0.125 * p)
        # The terms of the moment, of which the sum may be far smaller.
        terms = (np.abs(m) + np.abs(g) + 1) / (np.sqrt(v) + 2.0**-20)
        allowed = _STEPPED * (rate * terms + np.abs(p))
        allowed += _unit_roundoff(dtype) * np.abs(expected)
        name = str(jnp.dtype(dtype))
        error = _worst(np.asarray(new_param, np.float64) - expected, allowed)
        yield f"parameters, {name}", error
        for moment, exact in zip(new, (m, v), strict=True):
            kind = "signed" if moment.signed else "unsigned"
            error = _worst_moment(moment, exact, block_size)
            yield f"{kind} moment, {name}", error


def _worst_moment(moment: Moment, exact: np.ndarray, block_size: int) -> float:
    """As of `worst_code`, of numbers that float32 rounded on the way."""
    blocks = exact.reshape(len(exact), -1, block_size)
    largest = np.max(np.abs(blocks), axis=-1)
    worst = _worst(moment.absmax - largest, _STEPPED * largest)
    codebook, scaled = _codebook(moment.signed), blocks / largest[..., None]
    levels = codebook[moment.codes].reshape(blocks.shape)
    # Of what is positive, no second moment is stored as zero.
    nearest = _nearest(scaled, codebook if moment.signed else codebook[1:])
    farther = np.abs(levels - scaled) - np.abs(nearest - scaled)
    return max(worst, float(np.max(farther)) / _STEPPED)


CHECKS: Final[dict[str, Callable[[str | None], Iterator[Check]]]] = {
    "quantize_blockwise": _quantize_blockwise,
    "embed_blockwise": _embed_blockwise,
    "matmul_blockwise": _matmul_blockwise,
    "matmul_int8": _matmul_int8,
    "update_8bit": _update_8bit,
}


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Its results on the host, of several calls that must not differ."""
    compiled = jax.jit(function)
    first, *others = (jax.tree.map(np.asarray, compiled(*args)) for _ in range(_CALLS))
    for other in others:
        if not jax.tree.all(jax.tree.map(_is_same, first, other)):
            raise AssertionError("the results of the same call differ")
    return first


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _extremes(dtype: Any) -> np.ndarray:
    """Normal numbers, with rows of zeros, of large and small ones, and a NaN."""
    x = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32)
    far = np.float32(2.0 ** (jnp.finfo(dtype).maxexp // 2))
    x[0], x[1], x[2] = 0, far * x[1], x[2] / far
    x[3, 5] = np.nan
    return x.astype(dtype)


def _small_integers(shape: tuple[int, ...], largest: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.integers(-largest, largest + 1, shape).astype(np.float64)


def _weight(rows: int, size: int, codebook: np.ndarray, nested: bool = False) -> Weight:
    """Random codes in blocks of 64, with absmax of 1 and 2."""
    rng = np.random.default_rng(3)
    codes: Any = rng.integers(0, 256, (rows, size // 2), np.uint8)
    is_two = rng.integers(0, 2, (rows, size // 64), np.uint8)
    if not nested:
        absmax: Any = (1 + is_two).astype(np.float32)
        return Weight(codes, absmax, None, codebook, 64, size)
    # The levels of 0 and 1, on an offset of 1.
    absmax = np.where(is_two, np.uint8(255), np.uint8(127))
    of_absmax: Any = np.ones(-(-absmax.size // 256), np.float32), np.float32(1)
    return Weight(codes, absmax, of_absmax, codebook, 64, size)


def _levels(codes: np.ndarray, codebook: np.ndarray, size: int) -> np.ndarray:
    if len(codebook) == 16:
        pairs = np.stack([codes >> 4, codes & 15], axis=-1)
        codes = pairs.reshape(*codes.shape[:-1], -1)[..., :size]
    return codebook[codes]


def _nearest(scaled: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    levels = np.unique(codebook).astype(np.float64)
    return levels[np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled)]


def _codebook(signed: bool) -> np.ndarray:
    return DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED


def _spread(of_blocks: np.ndarray, block_size: int) -> np.ndarray:
    return of_blocks.repeat(block_size, axis=-1)


def _unit_roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def _difference(got: Array, exact: np.ndarray) -> float:
    """0 where each is the number itself, rounded to the dtype; else infinite."""
    return 0.0 if np.array_equal(got, exact.astype(got.dtype)) else np.inf


def _worst(error: np.ndarray, allowed: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(error == 0, 0, np.abs(error) / allowed)))
