"""Interprets Mosaic GPU kernels on the CPU; a script, since a fault there may hang.

`python interpret_kernels.py`: exits with 0 when every result is that of the
specification.
"""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, NF4
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    mosaic_gpu,
    quantize_blockwise,
)

# More blocks than a tile and no multiple of it, ragged rows, blocks wider than a tile.
SHAPES = [((4160,), 64), ((3, 150), 64), ((2, 8192), 4096), ((5,), 32)]
SHAPES += [((3, 0), 64)]


def check_dequantize(codebook, shape, block_size, dtype):
    generator = np.random.default_rng(0)
    *batch, size = shape
    stored = size if len(codebook) == 256 else -(-size // 2)
    codes = generator.integers(0, 256, (*batch, stored)).astype(np.uint8)
    absmax = generator.standard_normal((*batch, -(-size // block_size)))
    absmax = absmax.astype(np.float32)
    extremes = [np.nan, np.inf, 0.0, 3e38, 1e-45]
    absmax.flat[: len(extremes)] = extremes[: absmax.size]
    (decoded,) = mosaic_gpu.dequantize_kernel(
        jnp.asarray(codes),
        jnp.asarray(absmax),
        codebook=codebook.tobytes(),
        block_size=block_size,
        size=size,
        dtype=np.dtype(dtype),
        interpret=True,
    )
    expected = dequantize_blockwise(
        codes,
        absmax,
        codebook,
        block_size=block_size,
        size=size,
        dtype=dtype,
        implementation="reference",
    )
    np.testing.assert_array_equal(
        np.asarray(decoded, np.float32), np.asarray(expected, np.float32)
    )


def check_quantize(codebook, shape, block_size, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    if x.size:
        # At the end, that is in short blocks too. No NaN: XLA's maximum on a CPU, with
        # which this is interpreted, loses some of them.
        x[..., -1] = np.resize([np.inf, 0.0, 3e38], x.shape[:-1])
    codes, absmax = mosaic_gpu.quantize_kernel(
        jnp.asarray(x),
        codebook=codebook.tobytes(),
        block_size=block_size,
        interpret=True,
    )
    expected = quantize_blockwise(
        x, codebook, block_size=block_size, implementation="reference"
    )
    np.testing.assert_array_equal(absmax, expected[1])
    # The codes of a block that is not finite mean nothing.
    stored = codes.shape[-1]
    per_block = block_size // 2 if len(codebook) == 16 else block_size
    is_finite = np.isfinite(np.repeat(expected[1], per_block, axis=-1)[..., :stored])
    np.testing.assert_array_equal(
        np.where(is_finite, codes, 0), np.where(is_finite, expected[0], 0)
    )


if __name__ == "__main__":
    for codebook in (NF4, DYNAMIC8_SIGNED):
        for shape, block_size in SHAPES:
            check_dequantize(codebook, shape, block_size, jnp.bfloat16)
            check_quantize(codebook, shape, block_size, np.float32)
