"""The native kernel for CPUs that gathers and decodes rows in one pass over them."""

from typing import Final

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Integer

EMBED: Final = "jaxbnb_cpu_embed_blockwise"


def embed(
    at: Int32[Array, " ids"],
    absmax: Float32[Array, "ids blocks"],
    codes: Integer[Array, "rows stored"],
    *,
    codebook: bytes,
    block_size: int,
    dtype: np.dtype,
) -> tuple[Float[Array, "ids size"]]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        at: numbers of existing rows.
        absmax: absmax of these rows.
        codes: codes of all rows.
        codebook: bytes of the float32 levels, hashable as static arguments must be;
            none for linear int8.
        block_size: elements of a block; a row consists of whole blocks.
        dtype: dtype of the result: float32, bfloat16 or float16.
    """
    size = absmax.shape[1] * block_size
    result = jax.ShapeDtypeStruct((len(at), size), dtype)
    levels = jnp.asarray(np.frombuffer(codebook, np.float32))
    call = jax.ffi.ffi_call(EMBED, result)
    return (call(at, absmax, codes, levels, block_size=np.int64(block_size)),)
