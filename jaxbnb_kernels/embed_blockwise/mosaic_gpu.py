"""Which look-ups the GPU kernel supports, and how a batch becomes one look-up."""

import jax.numpy as jnp
import numpy as np
from jax import custom_batching
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels import _selection, _tiles
from jaxbnb_kernels.embed_blockwise import rows
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu as quantize_kernels
from jaxbnb_kernels.quantize_blockwise import xla

EMBED = _selection.Kernel("embed_blockwise", "embed")


def embed(
    ids: Integer[Array, "*batch"],
    weight: Weight,
    dtype: np.dtype,
    *,
    is_required: bool = True,
) -> Float[Array, "*batch size"]:
    """See `embed_blockwise`; raises an error if no kernel supports the call."""
    codebook = quantize_kernels.servable(weight.codebook, weight.block_size, dtype)
    blocks = weight.absmax.shape[-1]
    if weight.size % weight.block_size:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of whole blocks of {weight.block_size}; these "
            f"have {weight.size} elements"
        )
    least = _tiles.least_rows(weight.block_size, dtype)
    if blocks < least:
        raise NotImplementedError(
            f"mosaic_gpu looks up rows of at least {least * weight.block_size} "
            f"elements here; these have {weight.size}"
        )
    at, absmax = rows.look_up(ids, weight)
    embed_rows = _embed_rows(codebook, weight.block_size, dtype, is_required)
    embedded = embed_rows(at.reshape(-1), absmax.reshape(-1, blocks), weight.codes)
    return embedded.reshape(*ids.shape, weight.size)


def _embed_rows(codebook, block_size, dtype, is_required):
    """Returns a look-up of a list of rows; vmap turns it into one of a longer list."""

    @custom_batching.custom_vmap
    def embed(at, absmax, codes):
        (embedded,) = _selection.choose(
            EMBED,
            _embed_portable,
            at,
            absmax,
            codes,
            is_required=is_required,
            codebook=codebook,
            block_size=block_size,
            dtype=dtype,
        )
        return embedded

    @embed.def_vmap
    def _(axis_size, is_mapped, at, absmax, codes):
        at, absmax = (
            x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, mapped in zip((at, absmax), is_mapped, strict=False)
        )
        if is_mapped[2]:
            # Stack the matrices: the rows of each follow those before it.
            at = at + codes.shape[1] * jnp.arange(axis_size, dtype=at.dtype)[:, None]
            codes = codes.reshape(-1, codes.shape[-1])
        embedded = embed(at.reshape(-1), absmax.reshape(-1, absmax.shape[-1]), codes)
        return embedded.reshape(*at.shape, -1), True

    return embed


def _embed_portable(at, absmax, codes, *, codebook, block_size, dtype):
    levels = np.frombuffer(codebook, np.float32)
    size = absmax.shape[-1] * block_size
    return (xla.dequantize(codes[at], absmax, None, levels, block_size, size, dtype),)
