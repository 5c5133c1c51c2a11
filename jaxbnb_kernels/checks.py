"""Whether the numbers of each op are right on this machine, by NumPy on the host.

`jaxbnb env`, `jaxbnb verify-kernels` and `jaxbnb bench kernels` run these checks. Each
yields a name and the largest error in units of the largest allowed one (`errors`).
Products multiply small integers and powers of two, and float32 sums these exactly in
any order. They must not have any error, so a misplaced or missing element shows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import errors
from jaxbnb_kernels.codebooks import (
    DYNAMIC8_SIGNED,
    DYNAMIC8_UNSIGNED,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    NF4,
)
from jaxbnb_kernels.embed_blockwise import embed_blockwise
from jaxbnb_kernels.grouped_matmul_blockwise import grouped_matmul_blockwise
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_int8 import matmul_int8
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from jaxbnb_kernels.update_8bit import Moment, Rule, absmax_shape, update_8bit

Check = tuple[str, float]

_COLUMNS: Final = 4096
# A race may show in one call and not in another.
_CALLS: Final = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much the checks compute.

    Attributes:
        rows: rows of what is encoded, decoded and stepped.
        most_tokens: the largest number of rows of x in a product.
        dtypes: how many of an op's dtypes to check.
    """

    rows: int
    most_tokens: int
    dtypes: int


# More tiles than run at a time on a GPU, and not a whole number of them.
FULL: Final = Sizes(rows=1031, most_tokens=600, dtypes=2)
# A few seconds on a CPU.
BRIEF: Final = Sizes(rows=37, most_tokens=13, dtypes=1)

# (codebook, block size, dtype) of each format that all kernels serve, and of those that
# only products do.
_FORMATS: Final = {
    "nf4": (NF4, 64, jnp.bfloat16),
    "fp4": (FP4, 32, jnp.float16),
    "dynamic8": (DYNAMIC8_SIGNED, 256, jnp.float32),
    "dynamic8_unsigned": (DYNAMIC8_UNSIGNED, 4096, jnp.bfloat16),
}
_FORMATS_WITHOUT_CODECS: Final = {
    "int4": (INT4, 64, jnp.bfloat16),
    "int8": (None, 64, jnp.float32),
    "fp8_e4m3": (FP8_E4M3, 64, jnp.bfloat16),
    "fp8_e5m2": (FP8_E5M2, 64, jnp.bfloat16),
}


def _formats(implementation: str | None) -> dict[str, Any]:
    """The formats of an implementation's codecs; None and "reference" have them all."""
    is_general = implementation in (None, "reference")
    return _FORMATS | (_FORMATS_WITHOUT_CODECS if is_general else {})


def _quantize_blockwise(implementation: str | None, sizes: Sizes) -> Iterator[Check]:
    for name, (codebook, block_size, dtype) in _formats(implementation).items():
        x = _extremes(sizes.rows, dtype)
        x = np.abs(x) if codebook is DYNAMIC8_UNSIGNED else x

        def encode(x, codebook=codebook, block_size=block_size):
            return quantize_blockwise(
                x, codebook, block_size=block_size, implementation=implementation
            )

        def decode(
            codes, absmax, codebook=codebook, block_size=block_size, dtype=dtype
        ):
            return dequantize_blockwise(
                codes,
                absmax,
                codebook,
                block_size=block_size,
                size=_COLUMNS,
                dtype=dtype,
                implementation=implementation,
            )

        details = f"{name}, block {block_size}, {jnp.dtype(dtype)}"
        codes, absmax = _run(encode, x)
        error = errors.worst_code(x, codes, absmax, codebook, block_size)
        yield f"encode, {details}", error
        decoded = _run(decode, codes, absmax)
        # Linear int8 divides by 127, in two operations of any order.
        slack = 0 if codebook is not None else 2.0**-22 * absmax
        error = errors.worst_level(decoded, codes, absmax, codebook, block_size, slack)
        yield f"decode, {details}", error

    x = np.random.default_rng(0).standard_normal((sizes.rows, _COLUMNS), np.float32)
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
    error = errors.worst_level(decoded, codes, decoded_absmax, NF4, 64, slack)
    yield "decode, nf4, double quantisation", error


def _embed_blockwise(implementation: str | None, sizes: Sizes) -> Iterator[Check]:
    rows = sizes.rows
    ids = np.random.default_rng(1).integers(-rows, rows, 700).astype(np.int32)
    for dtype in (jnp.bfloat16, jnp.float32)[: sizes.dtypes]:
        weight: Any = _weight(rows, _COLUMNS, NF4)

        def embed(ids, weight, dtype=dtype):
            return embed_blockwise(
                ids, weight, dtype=dtype, implementation=implementation
            )

        embedded = _run(embed, np.append(ids, np.int32(rows)), weight)
        error = errors.worst_level(
            embedded[:-1],
            weight.codes[ids],
            weight.absmax[ids],
            weight.codebook,
            weight.block_size,
        )
        yield f"rows, {jnp.dtype(dtype)}", error
        is_nan = np.isnan(embedded[-1]).all()
        yield f"a row that does not exist, {jnp.dtype(dtype)}", 0 if is_nan else np.inf


def _matmul_blockwise(implementation: str | None, sizes: Sizes) -> Iterator[Check]:
    cases: list[Any] = [
        ("nf4", jnp.bfloat16, False, (1, 13, 40, 128, 600)),
        ("nf4", jnp.bfloat16, True, (1, 128)),
        ("fp4", jnp.float16, False, (13, 40)),
    ]
    formats = _FORMATS | _FORMATS_WITHOUT_CODECS
    others = (n for n in formats if n not in ("nf4", "fp4"))
    cases += [(n, jnp.bfloat16, False, (13,)) for n in others]
    for name, dtype, is_nested, token_counts in cases:
        codebook, *_ = formats[name]
        weight: Any = _weight(1000, 1024, codebook, is_nested)
        matrix = _matrix(weight, dtype)
        for tokens in token_counts:
            if tokens > sizes.most_tokens:
                continue
            for transpose in (True, False):

                def multiply(x, weight, transpose=transpose):
                    return matmul_blockwise(
                        x, weight, transpose=transpose, implementation=implementation
                    )

                operand = matrix.T if transpose else matrix
                x = _small_integers((tokens, len(operand)), 1).astype(dtype)
                y, expected = _run(multiply, x, weight), x @ operand
                if name in ("nf4", "fp4"):
                    error = errors.inexact(y, expected)
                else:
                    # Levels of many magnitudes: sums are rounded, and so are elements.
                    terms = np.abs(x) @ np.abs(operand)
                    roundoff = errors.unit_roundoff(dtype)
                    allowed = (len(operand) * 2.0**-24 + roundoff) * terms
                    allowed += roundoff * np.abs(expected)
                    error = errors.worst(np.asarray(y, np.float64) - expected, allowed)
                yield (
                    f"{'x W.T' if transpose else 'x W'}, {name}, {_rows(tokens)}, "
                    f"{jnp.dtype(dtype)}{', double quantisation' * is_nested}",
                    error,
                )


def _grouped_matmul_blockwise(
    implementation: str | None, sizes: Sizes
) -> Iterator[Check]:
    for name, dtype, is_nested in (
        ("nf4", jnp.bfloat16, True),
        ("fp4", jnp.float16, False),
    ):
        group_sizes = np.array([1, 0, 2, sizes.most_tokens // 8, 3], np.int32)
        codebook, *_ = _FORMATS[name]
        weights: list[Any] = [
            _weight(300, 512, codebook, is_nested, seed)
            for seed in range(len(group_sizes))
        ]
        stack: Any = jax.tree.map(lambda *arrays: np.stack(arrays), *weights)
        for transpose in (True, False):

            def multiply(x, group_sizes, stack, transpose=transpose):
                return grouped_matmul_blockwise(
                    x,
                    group_sizes,
                    stack,
                    transpose=transpose,
                    implementation=implementation,
                )

            matrices = [_matrix(weight, dtype) for weight in weights]
            matrices = [m.T for m in matrices] if transpose else matrices
            shape = int(group_sizes.sum()), len(matrices[0])
            x = _small_integers(shape, 1).astype(dtype)
            groups = np.split(x.astype(np.float64), group_sizes.cumsum()[:-1])
            expected = [a @ b for a, b in zip(groups, matrices, strict=True)]
            y = _run(multiply, x, group_sizes, stack)
            yield (
                f"{'x W.T' if transpose else 'x W'}, {name}, {jnp.dtype(dtype)}"
                f"{', double quantisation' * is_nested}",
                errors.inexact(y, np.concatenate(expected)),
            )


def _matmul_int8(implementation: str | None, sizes: Sizes) -> Iterator[Check]:
    codes = _small_integers((1000, 1024), 127).astype(np.int8)
    # Decoded elements are then the codes.
    col_scale = np.full(len(codes), 127, np.float32)
    for tokens, dtype in (
        (1, jnp.bfloat16),
        (13, jnp.float32),
        (64, jnp.bfloat16),
        (128, jnp.float32),
        (200, jnp.bfloat16),
    ):
        if tokens > sizes.most_tokens:
            continue
        for threshold in (0.0, 200.0):
            x = _small_integers((tokens, codes.shape[1]), 100)
            # The codes of x are then its elements.
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
            of_outliers = x[:, is_outlier] @ codes.T.astype(np.float64)[is_outlier]
            terms = np.abs(expected - of_outliers) + np.abs(of_outliers)
            allowed = 4 * 2.0**-24 * terms
            allowed += errors.unit_roundoff(dtype) * np.abs(expected)
            error = errors.worst(np.asarray(y, np.float64) - expected, allowed)
            outliers = ", outliers" if threshold else ""
            yield f"{_rows(tokens)}, {jnp.dtype(dtype)}{outliers}", error


def _update_8bit(implementation: str | None, sizes: Sizes) -> Iterator[Check]:
    rate = np.float32(2.0**-7)
    adam = Rule(
        advance=lambda s, g, old: (
            0.875 * old[0] + 0.125 * g,
            0.96875 * old[1] + 0.03125 * (g * g),
        ),
        direction=lambda s, g, old, new: new[0] / (jnp.sqrt(new[1]) + 2.0**-20),
        finish=lambda s, update, param: -s * (update + 0.125 * param),
    )
    shape, block_size, signed = (sizes.rows, 2048), 256, (True, False)
    rng = np.random.default_rng(0)
    for dtype in (jnp.bfloat16, jnp.float32)[: sizes.dtypes]:
        grad, param = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        moments = tuple(
            Moment(
                jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
                jnp.full(absmax_shape(shape, block_size), scale, jnp.float32),
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
            _codebook(old.signed)[old.codes].astype(np.float64) * old.absmax[0, 0]
            for old in moments
        )
        g, p = (np.asarray(a, np.float64) for a in (grad, param))
        m, v = 0.875 * m + 0.125 * g, 0.96875 * v + 0.03125 * g * g
        update = m / (np.sqrt(v) + 2.0**-20)
        expected = p - rate * (update + 0.125 * p)
        # The moment's terms, since their sum may be far smaller.
        terms = (np.abs(m) + np.abs(g) + 1) / (np.sqrt(v) + 2.0**-20)
        allowed = errors.STEPPED * (rate * terms + np.abs(p))
        allowed += errors.unit_roundoff(dtype) * np.abs(expected)
        error = errors.worst(np.asarray(new_param, np.float64) - expected, allowed)
        yield f"parameters, {jnp.dtype(dtype)}", error
        for moment, exact in zip(new, (m, v), strict=True):
            kind = "signed" if moment.signed else "unsigned"
            error = _worst_moment(moment, exact, block_size)
            yield f"{kind} moment, {jnp.dtype(dtype)}", error


def _worst_moment(moment: Moment, exact: np.ndarray, block_size: int) -> float:
    """How wrong a stored moment is; float32 rounded its elements on the way."""
    blocks = exact.reshape(len(exact), -1, block_size)
    largest = np.max(np.abs(blocks), axis=-1)
    error = errors.worst(moment.absmax - largest, errors.STEPPED * largest)
    codebook, scaled = _codebook(moment.signed), blocks / largest[..., None]
    levels = codebook[moment.codes].reshape(blocks.shape)
    # A positive second moment is never stored as zero.
    nearest = errors.nearest(scaled, codebook if moment.signed else codebook[1:])
    farther = np.abs(levels - scaled) - np.abs(nearest - scaled)
    return max(error, float(np.max(farther)) / errors.STEPPED)


# The ops that have kernels. Each function takes an implementation and `Sizes`.
CHECKS: Final[dict[str, Callable[[str | None, Sizes], Iterator[Check]]]] = {
    "quantize_blockwise": _quantize_blockwise,
    "embed_blockwise": _embed_blockwise,
    "matmul_blockwise": _matmul_blockwise,
    "grouped_matmul_blockwise": _grouped_matmul_blockwise,
    "matmul_int8": _matmul_int8,
    "update_8bit": _update_8bit,
}


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the results on the host of several calls, which must not differ."""
    compiled = jax.jit(function)
    first, *others = (jax.tree.map(np.asarray, compiled(*args)) for _ in range(_CALLS))
    for other in others:
        if not jax.tree.all(jax.tree.map(_is_same, first, other)):
            raise AssertionError("the results of the same call differ")
    return first


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def _extremes(rows: int, dtype: Any) -> np.ndarray:
    """Normal numbers, with rows of zeros, of large and small ones, and a NaN."""
    x = np.random.default_rng(0).standard_normal((rows, _COLUMNS), np.float32)
    far = np.float32(2.0 ** (jnp.finfo(dtype).maxexp // 2))
    x[0], x[1], x[2] = 0, far * x[1], x[2] / far
    x[3, 5] = np.nan
    return x.astype(dtype)


def _small_integers(shape: tuple[int, ...], largest: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.integers(-largest, largest + 1, shape).astype(np.float64)


def _weight(
    rows: int,
    size: int,
    codebook: np.ndarray | None,
    is_nested: bool = False,
    seed: int = 3,
) -> Weight:
    """Random codes in blocks of 64, with absmax of 1 and 2."""
    rng = np.random.default_rng(seed)
    if codebook is None:
        codes: Any = rng.integers(-127, 128, (rows, size)).astype(np.int8)
    elif len(codebook) == 16:
        codes = rng.integers(0, 256, (rows, size // 2), np.uint8)
    else:
        # Some 8-bit floats are not finite.
        finite = np.flatnonzero(np.isfinite(codebook)).astype(np.uint8)
        codes = rng.choice(finite, (rows, size))
    is_two = rng.integers(0, 2, (rows, size // 64), np.uint8)
    if not is_nested:
        absmax: Any = (1 + is_two).astype(np.float32)
        return Weight(codes, absmax, None, codebook, 64, size)
    # The levels of 0 and 1, on an offset of 1.
    absmax = np.where(is_two, np.uint8(255), np.uint8(127))
    nested: Any = np.ones(-(-absmax.size // 256), np.float32), np.float32(1)
    return Weight(codes, absmax, nested, codebook, 64, size)


def _matrix(weight: Any, dtype: Any) -> np.ndarray:
    """Decodes a `_weight`, with levels rounded to a dtype."""
    levels = weight.codebook
    levels = None if levels is None else levels.astype(dtype).astype(np.float64)
    is_nested = weight.nested is not None
    absmax = 1.0 + (weight.absmax == 255) if is_nested else weight.absmax
    matrix = errors.levels_of(weight.codes, levels, weight.size)
    return matrix * errors.spread(absmax, weight.block_size)


def _codebook(signed: bool) -> np.ndarray:
    return DYNAMIC8_SIGNED if signed else DYNAMIC8_UNSIGNED
