"""Which calls the native CPU kernels support."""

import jax.numpy as jnp
import numpy as np

from jaxbnb_kernels import _cells, _selection

QUANTIZE = _selection.Kernel.for_cpu("quantize_blockwise", "quantize")
DEQUANTIZE = _selection.Kernel.for_cpu("quantize_blockwise", "dequantize")


def encoder(codebook: np.ndarray | None, dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel that encodes; raises an error if it does not support this."""
    servable(dtype)
    if codebook is not None and len(codebook) > 16:
        # Raises here, not when it is lowered, if the codebook cannot be encoded.
        _cells.of_codebook(np.asarray(codebook, np.float32).tobytes())
    return QUANTIZE


def decoder(dtype: np.dtype) -> _selection.Kernel:
    """Returns the kernel that decodes; raises an error if it does not support this."""
    servable(dtype)
    return DEQUANTIZE


def servable(dtype: np.dtype) -> None:
    """Raises an error if no kernel supports the dtype."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cpu does not support {jnp.dtype(dtype)}")
