"""The codebooks: the 16 or 256 float32 levels that a code stands for.

Each is a read-only NumPy constant, indexed by code. A test rebuilds every one of them
from its definition:

* NF4: quantiles of the standard normal distribution, asymmetric so that zero is exact.
* FP4: a 4-bit float with bits ``s e e m``; code order is the bit pattern's, not sorted.
* INT4: the integers -7 to 7 over 7, and -8 over 7, which is never the nearest.
* FP8: OCP's 8-bit floats e4m3 and e5m2 over the largest of each; code order is the bit
  pattern's. The codes of infinities and NaN stand for the same here.
* Dynamic 8-bit: seven decades. The smallest has 1 (signed) or 2 (unsigned) levels, and
  each next one twice as many. So large values get many fraction bits, and small ones
  keep a relative error. 0 and 1 are exact.
* Dynamic 4-bit: the same in three decades, for optimizer state.

The levels above are for blocks divided by their absmax. Others are for blocks divided
by a scale, which is not their absmax:

* E2M1: OCP's 4-bit float with bits ``s e e m``; code order is the bit pattern's.
* E4M3: OCP's 8-bit float; code order is the bit pattern's.
* SIGNED4 and SIGNED8: the integers from -8 and from -128. UNSIGNED4 and UNSIGNED8: the
  integers from 0, for blocks with a zero point.

References:
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023 (NF4).
    Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015, and
    Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021 (dynamic).
    Li et al., Memory Efficient Optimizers with 4-bit States, 2023 (dynamic 4-bit).
    Micikevicius et al., FP8 Formats for Deep Learning, 2022 (e4m3, e5m2).
    Rouhani et al., OCP Microscaling Formats (MX) Specification, 2023 (E2M1).
"""

from typing import Final

import jax.numpy as jnp
import numpy as np

NUM_DECADES: Final = 7


def _read_only(levels) -> np.ndarray:
    levels = np.asarray(levels, np.float32)
    levels.flags.writeable = False
    return levels


def _decade_edges(num_cells: int) -> np.ndarray:
    """Returns linspace(0.1, 1), equal to torch's to the last bit of float32.

    Torch counts from both ends and fuses each product with its sum. Computing that in
    double and rounding it once gives the same.
    """
    low, high = np.float32(0.1), np.float32(1.0)
    step = np.float64((high - low) / np.float32(num_cells))
    i = np.arange(num_cells + 1, dtype=np.float64)
    from_low, from_high = low + step * i, high - step * (num_cells - i)
    return np.where(i < (num_cells + 1) // 2, from_low, from_high).astype(np.float32)


def _dynamic_levels(signed: bool, num_decades: int = NUM_DECADES) -> np.ndarray:
    """Returns the sorted levels: 0, 1, and the mid-points of the decades' cells.

    Decade i has 2^i cells (signed) or 2^(i+1) (unsigned).
    """
    levels = [np.zeros(1), np.ones(1)]
    for i in range(num_decades):
        edges = _decade_edges(2 ** (i if signed else i + 1))
        power = np.float32(10.0 ** (i - (num_decades - 1)))
        decade = power * ((edges[:-1] + edges[1:]) / np.float32(2))
        levels += [decade, -decade] if signed else [decade]
    return np.sort(np.concatenate(levels))


def _fp8_values(dtype: np.dtype) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _fp8_levels(dtype: np.dtype) -> np.ndarray:
    return _fp8_values(dtype) / np.float32(jnp.finfo(dtype).max)


NF4: Final = _read_only(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
FP4: Final = _read_only(
    np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3])
    / 12
)
INT4: Final = _read_only(np.arange(-8, 8) / 7)
FP8_E4M3: Final = _read_only(_fp8_levels(np.dtype(jnp.float8_e4m3fn)))
FP8_E5M2: Final = _read_only(_fp8_levels(np.dtype(jnp.float8_e5m2)))
E2M1: Final = _read_only(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
)
E4M3: Final = _read_only(_fp8_values(np.dtype(jnp.float8_e4m3fn)))
SIGNED4: Final = _read_only(np.arange(-8, 8))
SIGNED8: Final = _read_only(np.arange(-128, 128))
UNSIGNED4: Final = _read_only(np.arange(16))
UNSIGNED8: Final = _read_only(np.arange(256))
DYNAMIC8_SIGNED: Final = _read_only(_dynamic_levels(signed=True))
DYNAMIC8_UNSIGNED: Final = _read_only(_dynamic_levels(signed=False))
DYNAMIC4_SIGNED: Final = _read_only(_dynamic_levels(signed=True, num_decades=3))
DYNAMIC4_UNSIGNED: Final = _read_only(_dynamic_levels(signed=False, num_decades=3))


def decision_points(codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the float32 mid-points between levels, and the codes that they separate.

    Args:
        codebook: float32 levels indexed by code, in any order.

    Returns:
        ``(points, codes)``: ``n`` sorted mid-points and ``n + 1`` codes. A value has
        code ``codes[i]`` when it lies above exactly ``i`` points; a tie goes to the
        lower one. If two codes stand for the same level (FP4's two zeros), only
        the smaller is included. Codes without a level in [-1, 1] (INT4's lowest, FP8's
        infinities and NaN) are not: x / absmax never needs them.
    """
    codes = np.flatnonzero(np.abs(codebook) <= 1)
    levels, first = np.unique(codebook[codes], return_index=True)
    return (levels[:-1] + levels[1:]) / np.float32(2), codes[first]
