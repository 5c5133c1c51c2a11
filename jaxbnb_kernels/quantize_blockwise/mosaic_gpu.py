"""Which calls the GPU kernels support."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _cells, _selection, _tiles

BLOCK_SIZES = tuple(2**i for i in range(5, 13))
QUANTIZE = _selection.Kernel("quantize_blockwise", "quantize")
DEQUANTIZE = _selection.Kernel("quantize_blockwise", "dequantize")


def encoder(
    codebook: np.ndarray | None, block_size: int, dtype: np.dtype, blocks: int
) -> _selection.Kernel:
    """Returns the kernel that encodes; raises an error if it does not support this."""
    # Raises here, not when it is lowered, if the codebook cannot be encoded.
    _cells.of_codebook(servable(codebook, block_size, dtype))
    _tiles.numbered(blocks)
    return QUANTIZE


def decoder(
    codebook: np.ndarray | None, block_size: int, dtype: np.dtype, blocks: int
) -> _selection.Kernel:
    """Returns the kernel that decodes; raises an error if it does not support this."""
    servable(codebook, block_size, dtype)
    _tiles.numbered(blocks)
    return DEQUANTIZE


def servable(codebook: np.ndarray | None, block_size: int, dtype: np.dtype) -> bytes:
    """Returns a codebook's bytes; raises an error if no kernel supports the call."""
    if codebook is None:
        raise NotImplementedError(
            "mosaic_gpu needs a codebook; got None, for linear int8"
        )
    servable_blocks(block_size, dtype)
    return np.asarray(codebook, np.float32).tobytes()


def servable_blocks(block_size: int, dtype: np.dtype) -> None:
    """Raises an error if no kernel supports blocks of that size, or that dtype."""
    if block_size not in BLOCK_SIZES:
        raise NotImplementedError(
            f"mosaic_gpu needs blocks of {BLOCK_SIZES} elements here; got {block_size}"
        )
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"mosaic_gpu does not support {jnp.dtype(dtype)}")
