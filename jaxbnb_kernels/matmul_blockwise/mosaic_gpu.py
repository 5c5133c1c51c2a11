"""The product with a 4-bit matrix in one pass over its codes, for Hopper GPUs.

Of few rows of x, ``x @ W.T`` takes as long as W takes to be read. So codes go straight
to registers, become 16-bit levels there, and are the left operand of the tensor cores
as they are: the kernel computes W times x's transpose. x is small, lies in shared
memory, and has its columns permuted to the order in which registers hold the codes.

The levels are those of the codebook rounded to ``compute_dtype``. A block's absmax is
applied in float32, to the block's own sum; only for tiles of more than
``MOST_FOLDED_TOKENS``, whose sums do not fit in registers twice, to the levels in
``compute_dtype``. The error bounds are those of `Config`.

Many rows of x, where W is read in a fraction of the time that the product takes, the
transposed product, whose contraction runs across rows of codes, float32, 8-bit
codebooks and rows of other sizes: the matrix is decoded by the kernel of
`dequantize_blockwise` and XLA multiplies with it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxbnb_kernels import _hopper
from jaxbnb_kernels.matmul_blockwise import fragments, reference, xla
from jaxbnb_kernels.matmul_blockwise.weight import Weight
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu as quantize_mosaic_gpu

# Beyond this, decoding to memory costs less than half of the product itself: 235 / M
# of it, by the bytes moved. Not measured.
MOST_TOKENS = 512
# Of larger tiles, a warpgroup's registers hold the sums once, not twice.
MOST_FOLDED_TOKENS = 64
# Whole tiles of columns, whatever their size.
COLUMNS = 128
# So many run at a time: two warpgroups on each multiprocessor of an H100 or H200.
CONCURRENT_TILES = 2 * 132
# Tiles of columns that a part of a row is worth: the first one is waited for.
LEAST_TILES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is divided.

    With u the unit roundoff of ``compute_dtype``, 2^-8 in bfloat16 and 2^-11 in
    float16, and T the sum of abs(x W) over a row, the error beside that of a sum in
    float32, K 2^-24 T, and of the result's rounding is at most u T where absmax is
    folded into sums, and (3 u + 3 u^2 + u^3) T where it scales levels: these, absmax,
    and their product are rounded.

    Attributes:
        block_m: rows of x a tile: 8, 16, 32, 64 or 128.
        block_n: rows of W a tile: 64 or 128.
        block_k: columns of both that are multiplied while the next are read.
        split_k: parts that the columns are divided in, summed afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int

    @property
    def folds_absmax(self) -> bool:
        """Whether absmax is applied to sums, not to levels."""
        return self.block_m <= MOST_FOLDED_TOKENS


def heuristic(m: int, n: int, k: int, count: int = 1) -> Config:
    """For x ``(m, k)`` and W ``(n, k)``, ``count`` times: reasoned, not measured."""
    block_m = min(128, max(8, 2 ** math.ceil(math.log2(m))))
    block_n = 64 if n < 128 else 128
    # Registers hold the next columns of both operands beside the sums.
    block_k = 128 if block_m <= 32 else 64
    tiles = count * math.ceil(m / block_m) * math.ceil(n / block_n)
    most = max(1, k // (LEAST_TILES * block_k))
    split_k = min(most, max(1, CONCURRENT_TILES // tiles))
    return Config(block_m, block_n, block_k, split_k)


def matmul(
    x: Float[Array, "*batch k"],
    weight: Weight,
    transpose: bool,
    compute_dtype: np.dtype,
    *,
    required: bool = True,
) -> Float[Array, "*batch n"]:
    # Refuses what neither kernel serves.
    codebook = quantize_mosaic_gpu.decodable(
        weight.codebook, weight.block_size, compute_dtype
    )
    (product,) = _hopper.run(
        matmul_kernel,
        _matmul_portable,
        x.reshape(-1, x.shape[-1]),
        weight.codes,
        # Where it is nested, decoded apart: 1.6 % of the bytes.
        weight.float_absmax(),
        required=required,
        broadcast=False,
        codebook=codebook,
        block_size=weight.block_size,
        size=weight.size,
        transpose=transpose,
        compute_dtype=compute_dtype,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(
    x, codes, absmax, *, codebook, block_size, size, transpose, compute_dtype
):
    def product(x, codes, absmax):
        levels = np.frombuffer(codebook, np.float32)
        weight = Weight(codes, absmax, None, levels, block_size, size)
        return xla.matmul(x, weight, transpose, compute_dtype)

    for axis in reversed(range(codes.ndim - 2)):
        sizes = [a.shape[axis] for a in (x, codes, absmax)]
        is_mapped = [size == max(sizes) for size in sizes]
        product = _mapped(product, is_mapped)
    return (product(x, codes, absmax),)


def _mapped(fn, is_mapped):
    """``fn`` over the first axes, which are of one where an array is not mapped."""

    def run(*arrays):
        arrays = [a if m else a[0] for a, m in zip(arrays, is_mapped, strict=True)]
        return jax.vmap(fn, tuple(0 if m else None for m in is_mapped))(*arrays)

    return run


def matmul_kernel(
    x: Float[Array, "*leading m k"],
    codes: UInt8[Array, "*leading rows stored"],
    absmax: Float32[Array, "*leading rows blocks"],
    *,
    codebook: bytes,
    block_size: int,
    size: int,
    transpose: bool,
    compute_dtype: np.dtype,
    config: Config | None = None,
) -> tuple[Float[Array, "*leading m n"]]:
    """The product itself, for who has checked that it can be computed.

    Args:
        x: of a floating dtype, which the result has. Leading axes are of one in
            arrays that are the same along them.
        codes: as of `dequantize_blockwise`.
        absmax: as of `dequantize_blockwise`.
        codebook: the bytes of its float32 levels: hashable, as static arguments are.
        block_size: one of ``DECODED_BLOCK_SIZES`` of `quantize_blockwise`.
        size: elements of a row of W.
        transpose: contract with W's rows.
        compute_dtype: of x and the levels in the product.
        config: how it is divided; None for the heuristic.
    """
    options = {
        "codebook": codebook,
        "block_size": block_size,
        "size": size,
        "transpose": transpose,
        "compute_dtype": compute_dtype,
        "config": config,
    }
    for axis in range(codes.ndim - 2):
        if codes.shape[axis] == absmax.shape[axis] == 1:
            # The same matrix: the rows of x side by side.
            together = jnp.moveaxis(x, axis, -3)
            rows = together.reshape(*together.shape[:-3], -1, x.shape[-1])
            one = [jnp.squeeze(a, axis) for a in (codes, absmax)]
            (product,) = matmul_kernel(rows, *one, **options)
            product = product.reshape(*together.shape[:-1], product.shape[-1])
            return (jnp.moveaxis(product, -3, axis),)
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in (x, codes, absmax)))
    x, codes, absmax = (
        jnp.broadcast_to(a, leading + a.shape[-2:]).reshape(-1, *a.shape[-2:])
        for a in (x, codes, absmax)
    )
    levels = np.frombuffer(codebook, np.float32)
    is_fused = (
        transpose
        and 0 < x.shape[1] <= MOST_TOKENS
        and codes.size > 0
        and size % COLUMNS == 0
        and len(levels) == 16
        and compute_dtype != jnp.float32
    )
    if is_fused:
        out_dtype, x = x.dtype, x.astype(compute_dtype)
        config = config or heuristic(x.shape[1], codes.shape[1], size, len(x))
        product = _fused(x, codes, absmax, levels, block_size, config, out_dtype)
    else:
        (matrix,) = quantize_mosaic_gpu.dequantize_kernel(
            codes,
            absmax,
            codebook=codebook,
            block_size=block_size,
            size=size,
            dtype=compute_dtype,
        )
        dot = functools.partial(reference.dot, axis=1 if transpose else 0)
        product = jax.vmap(dot)(x.astype(compute_dtype), matrix).astype(x.dtype)
    return (product.reshape(*leading, *product.shape[1:]),)


def _fused(
    x: Float[Array, "count m k"],
    codes: UInt8[Array, "count n half"],
    absmax: Float32[Array, "count n blocks"],
    levels: Float32[np.ndarray, "16"],
    block_size: int,
    config: Config,
    out_dtype: np.dtype,
) -> Float[Array, "count m n"]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxbnb_kernels import _pallas

    (count, m, k), n, dtype = x.shape, codes.shape[1], x.dtype
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles, splits = k // block_k, config.split_k
    # Columns of one block, or as many as lanes read at once.
    group = min(block_size, block_k)
    groups = range(block_k // group)
    # Copies of what is small, or of nothing.
    x = fragments.permute(jnp.pad(x, ((0, 0), (0, -m % block_m), (0, 0))), group)
    missing = max(0, block_n - n)
    codes, absmax = (
        jnp.pad(a, ((0, 0), (0, missing), (0, 0))) for a in (codes, absmax)
    )
    rows_layout = plgpu.Layout.WGMMA.reduce((1,))
    # Shared memory is laid out in tiles of 8 rows and so many columns.
    width = min(group, 64)
    x_layout = fragments.x_layout(block_k, width)

    def matmul_blockwise(x_ref, codes_ref, absmax_ref, table_ref, out_ref, x_tiles):
        of = jax.lax.axis_index("matrix")
        part = jax.lax.axis_index("part")
        tokens = pl.ds(jax.lax.axis_index("m") * block_m, block_m)
        # The last tile overlaps the one before it rather than end early: both write
        # the same values.
        row = jnp.minimum(jax.lax.axis_index("n") * block_n, n + missing - block_n)
        rows = pl.ds(row, block_n)
        table = _pallas.load(table_ref, fragments.table_layout())

        def read_x(tile):
            columns = pl.ds(tile * block_k, block_k)
            return _pallas.load(x_ref.at[of, tokens, columns], x_layout)

        def share_x(slot, values):
            _pallas.store(x_tiles.at[slot], values)
            plgpu.commit_smem()

        def read_codes(tile):
            half = group // 2
            starts = [tile * (block_k // 2) + g * half for g in groups]
            of_group = [codes_ref.at[of, rows, pl.ds(start, half)] for start in starts]
            layout = fragments.codes_layout(group)
            return tuple(_pallas.load(ref, layout) for ref in of_group)

        def read_absmax(tile):
            blocks = [(tile * block_k + g * group) // block_size for g in groups]
            of_group = [absmax_ref.at[of, rows, block] for block in blocks]
            return tuple(_pallas.load(ref, rows_layout) for ref in of_group)

        def wgmma(sums, levels, tile, g):
            columns = x_tiles.at[tile % 2, :, pl.ds(g * group, group)]
            plgpu.wgmma(sums, levels, plgpu.transpose_ref(columns, (1, 0)))

        def over_tiles(multiply, sums):
            """``multiply`` of each tile, while the next one is read."""

            def step(tile, carry):
                *operands, sums = carry
                # The last tile is read again, from nearby.
                following = jnp.minimum(tile + 1, last - 1)
                ahead = read_codes(following), read_absmax(following)
                x_ahead = read_x(following)
                sums = multiply(tile, *operands, sums)
                # No warp multiplies with that slot any more: all have met since.
                share_x(1 - tile % 2, x_ahead)
                return *ahead, sums

            first, last = part * tiles // splits, (part + 1) * tiles // splits
            share_x(first % 2, read_x(first))
            carry = read_codes(first), read_absmax(first), sums
            return jax.lax.fori_loop(first, last, step, carry)[-1]

        def folding_absmax(tile, codes, absmax, total):
            for g in groups:
                levels = fragments.decode(codes[g], table, dtype)

                def of_group(sums, levels=levels, g=g):
                    wgmma(sums, levels, tile, g)
                    return sums[...]

                sums = pl.run_scoped(of_group, plgpu.ACC((block_n, block_m)))
                total += sums * jax.lax.broadcast_in_dim(absmax[g], sums.shape, (0,))
            return total

        def scaling_levels(tile, codes, absmax, sums):
            for g in groups:
                levels = fragments.decode(codes[g], table, dtype)
                scale = absmax[g].astype(dtype)
                levels *= jax.lax.broadcast_in_dim(scale, levels.shape, (0,))
                wgmma(sums, levels, tile, g)
                plgpu.wgmma_wait(0)
            return ()

        if config.folds_absmax:
            zeros = jnp.zeros((block_n, block_m), jnp.float32)
            total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            total = over_tiles(folding_absmax, total)
        else:

            def whole(sums):
                over_tiles(lambda *a: scaling_levels(*a[:-1], sums), ())
                return sums[...]

            total = pl.run_scoped(whole, plgpu.ACC((block_n, block_m)))
        out = plgpu.transpose_ref(out_ref.at[part, of, tokens, rows], (1, 0))
        _pallas.store(out, fragments.apart(total).astype(out_ref.dtype))

    transforms = (
        plgpu.TilingTransform((8, width)),
        plgpu.SwizzleTransform(width * dtype.itemsize),
    )
    padded_m, padded_n = x.shape[1], codes.shape[1]
    out_dtype_of_part = out_dtype if splits == 1 else jnp.float32
    parts = _pallas.kernel(
        matmul_blockwise,
        out_type=jax.ShapeDtypeStruct(
            (splits, count, padded_m, padded_n), out_dtype_of_part
        ),
        # Tiles of the same rows of W run together.
        grid={
            "matrix": count,
            "part": splits,
            "n": math.ceil(padded_n / block_n),
            "m": padded_m // block_m,
        },
        scratch_types=(
            plgpu.SMEM((2, block_m, block_k), dtype, transforms=transforms),
        ),
    )(x, codes, absmax, jnp.asarray(fragments.table(levels, dtype)))
    return jnp.sum(parts, axis=0, dtype=parts.dtype)[:, :m, :n].astype(out_dtype)
