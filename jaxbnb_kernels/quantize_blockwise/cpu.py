"""Which calls the native CPU kernels support."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _cells, _selection

QUANTIZE = _selection.Kernel.for_cpu("quantize_blockwise", "quantize")
DEQUANTIZE = _selection.Kernel.for_cpu("quantize_blockwise", "dequantize")


def encoder(
    codebook: np.ndarray | None, block_size: int, dtype: np.dtype
) -> _selection.Kernel:
    """Returns the kernel that encodes; raises an error if it does not support this."""
    levels = servable(codebook, dtype)
    if len(levels) > 16 * 4:
        # Raises here, not when it is lowered, if the codebook cannot be encoded.
        _cells.of_codebook(levels)
    return QUANTIZE


def decoder(
    codebook: np.ndarray | None, block_size: int, dtype: np.dtype
) -> _selection.Kernel:
    """Returns the kernel that decodes; raises an error if it does not support this."""
    servable(codebook, dtype)
    return DEQUANTIZE


def servable(codebook: np.ndarray | None, dtype: np.dtype) -> bytes:
    """Returns a codebook's bytes; raises an error if no kernel supports the call."""
    if codebook is None:
        raise NotImplementedError("cpu needs a codebook; got None, for linear int8")
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cpu does not support {jnp.dtype(dtype)}")
    return np.asarray(codebook, np.float32).tobytes()
