"""How kernels are called: chosen for the device; a batch becomes one look-up."""

import jax.numpy as jnp
import numpy as np
from jax import custom_batching
from jaxtyping import Array, Float, Integer

from jaxbnb_kernels import _selection
from jaxbnb_kernels.embed_blockwise import cpu, mosaic_gpu, rows
from jaxbnb_kernels.matmul_blockwise import Weight
from jaxbnb_kernels.quantize_blockwise import kernels as quantize_kernels
from jaxbnb_kernels.quantize_blockwise import xla


def embed(
    ids: Integer[Array, "*batch"],
    weight: Weight,
    dtype: np.dtype,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "*batch size"]:
    """See `embed_blockwise`; raises an error if no kernel supports the call."""
    quantize_kernels.refuse_zero_point(kinds, weight.zero_point)
    kernels = _selection.serving(
        kinds,
        mosaic_gpu=lambda: mosaic_gpu.embedder(weight, dtype),
        cpu=lambda: cpu.embedder(weight, dtype),
    )
    codebook = quantize_kernels.to_bytes(weight.codebook)
    blocks = weight.absmax.shape[-1]
    at, absmax = rows.look_up(ids, weight)
    embed_rows = _embed_rows(codebook, weight.block_size, dtype, kernels, is_required)
    embedded = embed_rows(at.reshape(-1), absmax.reshape(-1, blocks), weight.codes)
    return embedded.reshape(*ids.shape, weight.size)


def _embed_rows(codebook, block_size, dtype, kernels, is_required):
    """Returns a look-up of a list of rows; vmap turns it into one of a longer list."""

    @custom_batching.custom_vmap
    def embed(at, absmax, codes):
        (embedded,) = _selection.choose(
            kernels,
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
    levels = quantize_kernels.from_bytes(codebook)
    size = absmax.shape[-1] * block_size
    return (xla.dequantize(codes[at], absmax, None, levels, block_size, size, dtype),)
