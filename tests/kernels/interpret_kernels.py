"""Interprets Mosaic GPU kernels on the CPU; a script, because a fault may hang.

`python interpret_kernels.py` exits with 0 if every result equals the specification, and
no two warpgroups with disjoint tiles write the same place, or write and read it. Before
jax 0.11 the interpreter checks only warpgroups within one block, and these kernels have
one per block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb_kernels._mosaic_gpu import pallas
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, NF4
from jaxbnb_kernels.quantize_blockwise import (
    dequantize_blockwise,
    mosaic_gpu_kernel,
    quantize_absmax,
    quantize_blockwise,
)

# Blocks that do not fill the last tile, ragged rows, blocks wider than a tile.
SHAPES = [((4160,), 64), ((3, 150), 64), ((2, 8192), 4096), ((5,), 32)]
SHAPES += [((3, 0), 64)]
# Whole tiles, so that no two write the same place.
WHOLE_TILES = (2 * 4096,), 64


def check_dequantize(codebook, shape, block_size, dtype, double_quant=False):
    generator = np.random.default_rng(0)
    *batch, size = shape
    stored = size if len(codebook) == 256 else -(-size // 2)
    codes = generator.integers(0, 256, (*batch, stored)).astype(np.uint8)
    absmax = generator.standard_normal((*batch, -(-size // block_size)))
    absmax = absmax.astype(np.float32)
    extremes = [np.nan, np.inf, 0.0, 3e38, 1e-45]
    absmax.flat[: len(extremes)] = extremes[: absmax.size]
    nested = ()
    if double_quant:
        finite = jnp.asarray(np.nan_to_num(absmax, nan=1, posinf=1))
        absmax, *nested = quantize_absmax(jnp.minimum(finite, 4))
    (decoded,) = mosaic_gpu_kernel.dequantize(
        jnp.asarray(codes),
        jnp.asarray(absmax),
        *nested,
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
        nested=tuple(nested) or None,
        dtype=dtype,
        implementation="reference",
    )
    # For a nested absmax up to 4, XLA on a CPU rounds product and sum once or twice:
    # half a unit, one more for the sum, and one for the result.
    np.testing.assert_allclose(
        np.asarray(decoded, np.float32),
        np.asarray(expected, np.float32),
        rtol=0,
        atol=4 * 2.5 * 2.0**-23 if double_quant else 0,
    )


def check_quantize(codebook, shape, block_size, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    if x.size:
        # These are at the end, so in short blocks too. NaN is left out, because XLA's
        # maximum on a CPU, which interprets the kernels, loses some NaNs.
        x[..., -1] = np.resize([np.inf, 0.0, 3e38], x.shape[:-1])
    codes, absmax = mosaic_gpu_kernel.quantize(
        jnp.asarray(x),
        codebook=codebook.tobytes(),
        block_size=block_size,
        interpret=True,
    )
    expected = quantize_blockwise(
        x, codebook, block_size=block_size, implementation="reference"
    )
    np.testing.assert_array_equal(absmax, expected[1])
    # Codes of blocks that are not finite are meaningless.
    stored = codes.shape[-1]
    per_block = block_size // 2 if len(codebook) == 16 else block_size
    is_finite = np.isfinite(np.repeat(expected[1], per_block, axis=-1)[..., :stored])
    np.testing.assert_array_equal(
        np.where(is_finite, codes, 0), np.where(is_finite, expected[0], 0)
    )


def check_races():
    """Checks a kernel without overlaps, then one with two overlapping tiles."""
    pallas.interpreter = functools.partial(pallas.interpreter, detect_races=True)
    for double_quant in (False, True):
        check_dequantize(NF4, *WHOLE_TILES, np.float32, double_quant)
    check_quantize(NF4, *WHOLE_TILES, np.float32)
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found
    if jax.__version_info__ < (0, 11):
        return
    # Both tiles write the same values; the detector must still report them.
    with pytest.raises(RuntimeError, match="RACE DETECTED"):
        check_dequantize(NF4, *SHAPES[0], jnp.bfloat16)


if __name__ == "__main__":
    for codebook in (NF4, DYNAMIC8_SIGNED):
        for shape, block_size in SHAPES:
            check_dequantize(codebook, shape, block_size, jnp.bfloat16)
            check_quantize(codebook, shape, block_size, np.float32)
    check_dequantize(NF4, (2, 5, 150), 64, np.float32, double_quant=True)
    check_races()
