"""How kernels are called: chosen for the device, and divided among devices."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels.quantize_blockwise import cpu, mosaic_gpu, reference, xla


def quantize(
    x: Float[Array, "*batch n"],
    codebook: np.ndarray | None,
    block_size: int,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> tuple[UInt8[Array, "*batch stored"], Float32[Array, "*batch blocks"]]:
    """See `quantize_blockwise`; raises an error if no kernel supports the call."""
    kernels = _selection.serving(
        kinds,
        mosaic_gpu=lambda: mosaic_gpu.encoder(
            codebook, block_size, x.dtype, x.size // block_size
        ),
        cpu=lambda: cpu.encoder(codebook, x.dtype),
    )
    return _quantize(x, to_bytes(codebook), block_size, kernels, is_required)


def dequantize(
    codes: UInt8[Array, "*batch stored"],
    absmax: Float32[Array, "*batch blocks"] | UInt8[Array, "*batch blocks"],
    nested: tuple[Array, Array] | None,
    codebook: np.ndarray | None,
    block_size: int,
    size: int,
    dtype: np.dtype,
    zero_point: UInt8[Array, "*batch blocks"] | None = None,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "*batch {size}"]:
    """See `dequantize_blockwise`; raises an error if no kernel supports the call."""
    refuse_zero_point(kinds, zero_point)
    kernels = _selection.serving(
        kinds,
        mosaic_gpu=lambda: mosaic_gpu.decoder(codebook, block_size, dtype, absmax.size),
        cpu=lambda: cpu.decoder(dtype),
    )
    static = to_bytes(codebook), block_size, size, dtype, kernels, is_required
    return _dequantize(codes, absmax, nested or (), *static)


def refuse_zero_point(kinds: tuple[str, ...], zero_point: object) -> None:
    """Raises NotImplementedError for a zero point, which no kernel subtracts."""
    if zero_point is not None:
        raise NotImplementedError(f"{' and '.join(kinds)} cannot subtract zero points")


def to_bytes(codebook: np.ndarray | None) -> bytes:
    """Returns the levels in float32, hashable as static arguments must be.

    Linear int8, which has no codebook, has no bytes.
    """
    return b"" if codebook is None else np.asarray(codebook, np.float32).tobytes()


def from_bytes(codebook: bytes) -> np.ndarray | None:
    """Undoes `to_bytes`."""
    return np.frombuffer(codebook, np.float32) if codebook else None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _quantize(x, codebook, block_size, kernels, is_required):
    codes, absmax = _selection.choose(
        kernels,
        _quantize_portable,
        x,
        is_required=is_required,
        divided=_quantize_divided,
        codebook=codebook,
        block_size=block_size,
    )
    return codes, absmax


@_quantize.defjvp
def _quantize_jvp(codebook, block_size, kernels, is_required, primals, tangents):
    def portable(x):
        return _quantize_portable(x, codebook=codebook, block_size=block_size)

    # From xla, because jax can transpose that. Its codes are not used.
    _, change = jax.jvp(portable, primals, tangents)
    return _quantize(*primals, codebook, block_size, kernels, is_required), change


def _quantize_portable(x, *, codebook, block_size):
    return xla.quantize(x, from_bytes(codebook), block_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6, 7, 8))
def _dequantize(
    codes, absmax, nested, codebook, block_size, size, dtype, kernels, is_required
):
    (decoded,) = _selection.choose(
        kernels,
        _dequantize_portable,
        codes,
        absmax,
        *nested,
        is_required=is_required,
        divided=_dequantize_divided,
        codebook=codebook,
        block_size=block_size,
        size=size,
        dtype=dtype,
    )
    return decoded


@_dequantize.defjvp
def _dequantize_jvp(
    codebook, block_size, size, dtype, kernels, is_required, primals, tangents
):
    codes, absmax, nested = primals

    def portable(floats):
        (decoded,) = _dequantize_portable(
            codes,
            *((absmax, *floats) if nested else floats),
            codebook=codebook,
            block_size=block_size,
            size=size,
            dtype=dtype,
        )
        return decoded

    # From xla, because jax can transpose that. Its decoded values are not used.
    floats, changes = (nested, tangents[2]) if nested else ((absmax,), tangents[1:2])
    _, change = jax.jvp(portable, (floats,), (changes,))
    static = codebook, block_size, size, dtype, kernels, is_required
    return _dequantize(*primals, *static), change


def _quantize_divided(kernel, x, *, codebook, block_size):
    names = *_partition.leading(x.ndim - 1), of_blocks(x.shape[-1], block_size)
    encode_part = functools.partial(kernel, codebook=codebook, block_size=block_size)
    return _partition.divide(encode_part, _partition.Axes((names,), (names, names)), x)


def of_blocks(size: int, block_size: int) -> str | None:
    """Names an axis that may be divided between whole blocks; None if it may not."""
    return None if size % block_size else "blocks"


def _dequantize_divided(
    kernel, codes, absmax, *nested, codebook, block_size, size, dtype
):
    absmax = reference.float_absmax(absmax, nested or None)
    names = *_partition.leading(codes.ndim - 1), of_blocks(size, block_size)
    stored = codes.shape[-1]

    def decode_part(codes, absmax):
        return kernel(
            codes,
            absmax,
            codebook=codebook,
            block_size=block_size,
            size=size * codes.shape[-1] // max(stored, 1),
            dtype=dtype,
        )

    return _partition.divide(
        decode_part, _partition.Axes((names, names), (names,)), codes, absmax
    )


def _dequantize_portable(codes, absmax, *nested, codebook, block_size, size, dtype):
    decode = functools.partial(xla.dequantize, codes, absmax, nested or None)
    return (decode(from_bytes(codebook), block_size, size, dtype),)
