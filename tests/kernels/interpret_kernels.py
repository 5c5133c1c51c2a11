"""Interprets Mosaic GPU kernels on the CPU; a script, since a fault there may hang.

`python interpret_kernels.py`: exits with 0 when every result is that of the
specification.
"""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, NF4
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, mosaic_gpu

# More blocks than a tile and no multiple of it, ragged rows, blocks wider than a tile.
SHAPES = [((4160,), 64), ((3, 150), 64), ((2, 8192), 4096), ((5,), 32), ((0, 64), 64)]


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


if __name__ == "__main__":
    for codebook in (NF4, DYNAMIC8_SIGNED):
        for shape, block_size in SHAPES:
            check_dequantize(codebook, shape, block_size, jnp.bfloat16)
