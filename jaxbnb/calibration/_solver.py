"""Chooses the codes and absmax of one matrix, for given second moments.

Notation of these functions: a matrix is ``(in, out)``, with its blocks along the first
axis, so that one step works on a whole row of outputs. Outputs are independent, unless
the second moment of their gradients is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from jaxbnb.calibration._levels import encode, nearest, searchable
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.config import as_config
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax, quantize_absmax

# Scales that are tried, as shares of the largest magnitude in a block. They include 1,
# so `search_scales` never ends with worse codes than absmax's.
_SHARES: Final = np.linspace(0.6, 1.1, 21, dtype=np.float32)
# Share of the mean of the diagonal that is added to it.
_DAMPING: Final = 0.01
_SWEEPS: Final = 4
# Outputs that are solved at once: a block of them, for all scales, is 1.4 MiB, which a
# core's cache holds.
_TILE: Final = 256
# Most outputs that make up for each other's errors. The moments of an 8B model's tiles
# take 2.6 GiB, and 55 GiB if each matrix is one tile.
_MOST: Final = 512
# Outputs that are rounded at once. Then the rest of their tile makes up for them.
_GROUP: Final = 32
# Share of the correlation of gradients that counts. Two moments overstate what outputs
# can do for each other, because inputs and gradients of a token depend on each other.
_CORRELATION: Final = 0.5


def search_scales(
    kernel: Float[Array, "*batch fan_in fan_out"],
    config: QuantConfig | str,
    squares: Float[Array, "*batch fan_in"] | np.ndarray | None = None,
) -> QuantizedArray:
    r"""Quantises like `jaxbnb.quantize`, but tries several scales for each block.

    Each block :math:`w` is rounded with scales of 0.6 to 1.1 times its largest
    magnitude, in 21 steps. NF4 has one more level above zero than below, so its scales
    may be negative, which mirrors the levels. For the levels :math:`l` of each scale,
    the absmax is

    .. math::
        s = \frac{w^\top D w}{l^\top D w}

    so that :math:`e^\top D w = 0` for the error :math:`e = s l - w`. The scale with the
    least :math:`e^\top D e` is kept. A smaller absmax would have less error, but it
    shrinks every block, and so the results of every layer. :math:`D` is the diagonal
    matrix of ``squares``, or without them the identity.

    Args:
        kernel: kernel of a dense layer, or a stack of them.
        config: format: nf4, fp4, int4 or int8.
        squares: mean squares of the layer's inputs, which may be weighted by token.
            1 % of their mean is added to them. None if nothing is known of the inputs.

    Returns:
        The kernel with blocks along axis -2. Its error is at most that of
        ``config.quantize_kernel(kernel)``.

    Raises:
        ValueError: the codes of the format cannot be chosen, or the shapes do not
            match.

    Example:
        >>> import jax, jaxbnb
        >>> from jaxbnb.calibration import search_scales
        >>> w = jax.random.normal(jax.random.key(0), (128, 64))
        >>> plain, best = jaxbnb.quantize(w, "nf4", axis=-2), search_scales(w, "nf4")
        >>> best.nbytes == plain.nbytes
        True
        >>> error = lambda q: float(((q.dequantize() - w) ** 2).mean())
        >>> error(best) < 0.9 * error(plain)
        True
    """
    config = check_config(config)
    weights = jnp.ones(kernel.shape[:-1])
    if squares is not None:
        if squares.shape != kernel.shape[:-1]:
            raise ValueError(
                "a kernel (..., in, out) has squares (..., in); got "
                f"{kernel.shape} and {squares.shape}"
            )
        weights = jnp.asarray(squares, jnp.float32)
        mean = weights.mean(axis=-1, keepdims=True)
        # Without any input, all columns are alike.
        weights = jnp.where(mean > 0, weights * _invert(mean), 1.0) + _DAMPING
    solve = functools.partial(_search_one, config=config)
    for _ in kernel.shape[:-2]:
        solve = jax.vmap(solve)
    return solve(kernel, weights)


def minimize_error(
    kernel: Float[Array, "fan_in fan_out"],
    moment: Float[Array, "fan_in fan_in"] | np.ndarray,
    config: QuantConfig | str,
    gradients: Float[Array, "tiles t t"] | np.ndarray | None = None,
) -> QuantizedArray:
    r"""Chooses codes and absmax for the least error of a layer's results.

    .. math::
        \min_Q \; \mathrm{tr}\, G (Q - W)^\top H (Q - W)

    This is GPTQ with scales that are searched inside each block, followed by coordinate
    descent over codes and scales. Blocks are taken in the order of their summed
    diagonal of ``H``, largest first, and columns in a block likewise. The layout of the
    result does not depend on this order.

    With ``gradients``, the solver takes 32 outputs of each tile at a time, those with
    the largest gradients first. Then it changes what the other outputs of the tile
    should be, so that they offset the error. Outputs that are taken together do not
    offset each other. So a layer of up to 32 has the same codes as without
    ``gradients``.

    Args:
        kernel: kernel ``W`` of a dense layer.
        moment: second moment ``H`` of the layer's inputs, ``mean(x x^T)``, which may be
            weighted by token. 1 % of the mean of its diagonal is added to it.
        config: format: nf4, fp4, int4 or int8.
        gradients: second moment ``G`` of the loss's gradients by the layer's results,
            ``mean(g g^T)``, in tiles of equal size: up to 512 results, in multiples of
            32. The last tile is filled up with zeros. Half of the correlation counts,
            and 1 % of the mean of the diagonal is added to it. None for the identity.

    Returns:
        The kernel with blocks along axis -2. Its error is at most that of
        ``config.quantize_kernel(kernel)``.

    Raises:
        ValueError: the codes of the format cannot be chosen, or the shapes do not
            match.

    Example:
        >>> import jax, jaxbnb
        >>> from jaxbnb.calibration import minimize_error
        >>> w, x = jax.random.normal(jax.random.key(0), (2, 128, 128))
        >>> x = x @ jax.random.normal(jax.random.key(1), (128, 128))
        >>> best = minimize_error(w, x.T @ x / 128, "nf4")
        >>> plain = jaxbnb.quantize(w, "nf4", axis=-2)
        >>> error = lambda q: float(((x @ (q.dequantize() - w)) ** 2).mean())
        >>> error(best) < 0.5 * error(plain)
        True

    References:
        Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
        Pre-trained Transformers, 2022.
        Tseng et al., Model-Preserving Adaptive Rounding, 2025.
    """
    config = check_config(config)
    size = kernel.shape[0]
    if kernel.ndim != 2 or moment.shape != (size, size):
        raise ValueError(
            f"a kernel (in, out) has a moment (in, in); got {kernel.shape} and "
            f"{moment.shape}"
        )
    assert config.block_size is not None
    damped, order, factor = _prepare(np.asarray(moment, np.float64), config.block_size)
    outputs = None
    if gradients is not None:
        fan_out = kernel.shape[1]
        tile = tile_size(fan_out)
        expected = -(-fan_out // tile), tile, tile
        if gradients.shape != expected:
            raise ValueError(
                f"the gradients of {fan_out} outputs have tiles {expected}; got "
                f"{gradients.shape}"
            )
        outputs = _prepare_outputs(shrink_tiles(gradients, fan_out))
    return _minimize(
        kernel,
        jnp.asarray(damped, jnp.float32),
        jnp.asarray(order),
        jnp.asarray(factor, jnp.float32),
        config,
        outputs,
    )


def tile_size(fan_out: int) -> int:
    """Returns the number of outputs in a tile: at most 512, a multiple of 32.

    Example:
        >>> tile_size(576), tile_size(1024), tile_size(10)
        (288, 512, 32)
    """
    tiles = max(1, -(-fan_out // _MOST))
    return max(1, -(-fan_out // (tiles * _GROUP))) * _GROUP


def shrink_tiles(
    gradients: Float[Array, "tiles t t"] | np.ndarray, fan_out: int
) -> Float64[np.ndarray, "tiles t t"]:
    """Returns the moments that `minimize_error` uses in place of ``gradients``.

    Example:
        >>> shrink_tiles(np.array([[[1.0, 0.5], [0.5, 3.0]]]), 2).tolist()
        [[[1.02, 0.25], [0.25, 3.02]]]
    """
    moments = np.asarray(gradients, np.float64)
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    mean = diagonal.sum() / max(fan_out, 1)
    shrunk = _CORRELATION * moments
    index = np.arange(moments.shape[-1])
    # Without any gradient, all outputs are alike.
    shrunk[:, index, index] = diagonal + (_DAMPING * mean if mean > 0 else 1.0)
    return shrunk


@jax.jit
def output_error(
    kernel: Float[Array, "fan_in fan_out"],
    q: QuantizedArray,
    moment: Float[Array, "fan_in fan_in"] | Float[Array, " fan_in"] | Float[Array, ""],
    tiles: Float[Array, "tiles t t"] | None = None,
) -> Float32[Array, ""]:
    """Returns the squared error of a layer's results relative to their square.

    Args:
        kernel: kernel before it was quantised.
        q: kernel after it was quantised.
        moment: second moment of the inputs. Its diagonal, or a number, stands for the
            diagonal matrix; 1 for the error of the weights.
        tiles: second moment of the gradients; see `shrink_tiles`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> w = jnp.array([[1.0], [0.5]])
        >>> q = jaxbnb.quantize(w, "int8", axis=-2)
        >>> bool(output_error(w, q, jnp.eye(2)) < 1e-4)
        True
    """
    w = kernel.astype(jnp.float32)
    signal = _quadratic(w, moment, tiles)
    noise = _quadratic(q.dequantize(jnp.float32) - w, moment, tiles)
    return jnp.where(signal > 0, noise / signal, 0.0)


def check_config(config: QuantConfig | str) -> QuantConfig:
    """Returns the config; raises ValueError if its codes cannot be chosen."""
    config = as_config(config)
    if config.quant_type not in searchable():
        raise ValueError(
            f"codes can be chosen for {', '.join(searchable())}; got "
            f"{config.quant_type!r}, which jaxbnb.nnx.quantize_model quantises"
        )
    return config


def damping_of(moment: Float64[np.ndarray, "n n"]) -> float:
    """Returns what is added to the diagonal of a moment."""
    mean = np.trace(moment) / max(len(moment), 1)
    # Without any input, all columns are alike.
    return float(_DAMPING * mean) if mean > 0 else 1.0


def _prepare(
    moment: Float64[np.ndarray, "n n"], block_size: int
) -> tuple[
    Float64[np.ndarray, "m m"], Int[np.ndarray, " m"], Float64[np.ndarray, "m m"]
]:
    """Damps a moment, and returns it with the order of its columns and its factor.

    The last block is filled up to ``m`` columns that no input reaches.

    Returns:
        The damped moment, in the order; the order; and its `_factor`. In float64,
        because the inverse of a moment may lose all digits of float32.
    """
    size = len(moment)
    short = -size % block_size
    damped = np.pad(moment, (0, short)) + damping_of(moment) * np.eye(size + short)
    diagonal = np.diagonal(damped).reshape(-1, block_size)
    blocks = np.argsort(-diagonal.sum(1), kind="stable")
    inside = np.argsort(-diagonal, axis=1, kind="stable")
    order = (blocks[:, None] * block_size + inside[blocks]).reshape(-1)
    damped = damped[np.ix_(order, order)]
    return damped, order, _factor(damped)


class _Outputs(NamedTuple):
    """What the outputs of each tile can do for each other.

    Attributes:
        tiles: second moments of the gradients.
        order: numbers of a tile's outputs, in the order in which they are rounded.
        shares: how far the errors of a group of outputs change those after it, in that
            order; 0 for all others.
    """

    tiles: Float32[Array, "tiles t t"]
    order: Int[Array, "tiles t"]
    shares: Float32[Array, "tiles t t"]


def _prepare_outputs(tiles: Float64[np.ndarray, "tiles t t"]) -> _Outputs:
    order = np.argsort(-np.diagonal(tiles, axis1=1, axis2=2), axis=1, kind="stable")
    in_order = np.take_along_axis(tiles, order[:, :, None], axis=1)
    in_order = np.take_along_axis(in_order, order[:, None], axis=2)
    factor, shares = _factor(in_order), np.zeros_like(tiles)
    for first in range(0, tiles.shape[-1], _GROUP):
        group, after = slice(first, first + _GROUP), slice(first + _GROUP, None)
        shares[:, group, after] = np.linalg.solve(
            factor[:, group, group], factor[:, group, after]
        )
    return _Outputs(
        jnp.asarray(tiles, jnp.float32),
        jnp.asarray(order),
        jnp.asarray(shares, jnp.float32),
    )


def _factor(moment: Float64[np.ndarray, "*lead n n"]) -> np.ndarray:
    """Returns the upper triangular ``U`` with ``U^T U`` the inverse of a moment."""
    # With H = R R^T and R upper triangular, the inverse of R is U. Reversed, R is the
    # lower factor that NumPy computes.
    reverse = moment[..., ::-1, ::-1]
    try:
        upper = np.linalg.cholesky(reverse)[..., ::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the moment is not positive semi-definite, or not finite"
        ) from error
    return np.triu(np.linalg.inv(upper))


@functools.partial(jax.jit, static_argnames="config")
def _search_one(
    kernel: Float[Array, "fan_in fan_out"],
    weights: Float[Array, " fan_in"],
    *,
    config: QuantConfig,
) -> QuantizedArray:
    quant_type, size = config.quant_type, config.block_size
    assert size is not None
    plain = config.quantize_kernel(kernel)
    blocks = _split(kernel, size)
    largest = jnp.max(jnp.abs(blocks), axis=1, initial=0.0)
    # In units of the largest magnitude, no square underflows.
    unit = blocks * _invert(largest)[:, None]
    weight = _split(weights[:, None], size)
    square = jnp.sum(weight * unit**2, axis=1)

    def compare(best, share):
        levels = nearest(unit / share, quant_type)
        product = jnp.sum(weight * levels * unit, axis=1)
        # Only a block of zeros has none.
        fitted = jnp.where(product == 0, share, square * _invert(product))
        error = jnp.sum(weight * (levels * fitted[:, None] - unit) ** 2, axis=1)
        trial = error, jnp.full_like(error, share), fitted
        is_better = error < best[0]
        return [
            jnp.where(is_better, x, y) for x, y in zip(trial, best, strict=True)
        ], None

    ones = jnp.ones_like(largest)
    shares = _SHARES
    if quant_type == "nf4":
        shares = np.concatenate([shares, -shares])
    (_, share, fitted), _ = jax.lax.scan(
        compare, [jnp.inf * ones, ones, ones], jnp.asarray(shares)
    )
    # The codes stay those of the share. They follow where double quantisation changes
    # an absmax.
    ratio = share / fitted
    best = _assemble(
        lambda s: nearest(blocks * _invert(s * ratio)[:, None], quant_type),
        largest * fitted,
        plain,
    )
    return _choose(best, plain, kernel, weights)


@functools.partial(jax.jit, static_argnames="config")
def _minimize(
    kernel: Float[Array, "fan_in fan_out"],
    moment: Float32[Array, "m m"],
    order: Int[Array, " m"],
    factor: Float32[Array, "m m"],
    config: QuantConfig,
    outputs: _Outputs | None = None,
) -> QuantizedArray:
    """Solves the outputs in tiles. If absmax's error is less, its result counts."""
    size = config.block_size
    assert size is not None
    fan_in, fan_out = kernel.shape
    tile = min(_TILE, fan_out) if outputs is None else outputs.tiles.shape[-1]
    w = jnp.pad(
        kernel.astype(jnp.float32),
        [(0, len(order) - fan_in), (0, -fan_out % tile)],
    )[order]
    tiles = w.reshape(len(order), -1, tile).swapaxes(0, 1)

    def solve(w):
        levels, scales = _feed_back(w, factor, config)
        for _ in range(_SWEEPS):
            levels, scales = _descend(w, moment, levels, scales, config)
        return levels, scales

    if outputs is None:
        levels, scales = jax.lax.map(solve, tiles)
    else:
        tiles, levels, scales = _solve_together(solve, tiles, outputs, size)
    # The number of each block in the kernel.
    number = order.reshape(-1, size)[:, 0] // size
    scales = scales.swapaxes(0, 1).reshape(len(number), -1)[:, :fan_out]
    plain = config.quantize_kernel(kernel)

    def choose_levels(scales):
        """Returns levels in the kernel's order, for scales in that order."""
        final = levels
        if config.double_quant:
            # The absmax have changed a little, and the codes follow.
            tiled = jnp.pad(scales[number], [(0, 0), (0, -fan_out % tile)])
            tiled = tiled.reshape(len(number), -1, tile).swapaxes(0, 1)
            descend = functools.partial(
                _descend, moment=moment, config=config, refit=False
            )
            final = jax.lax.map(
                lambda x: descend(x[0], levels=x[1], scales=x[2])[0],
                (tiles, levels, tiled),
            )
        final = final.swapaxes(0, 1).reshape(len(order), -1)[:, :fan_out]
        final = jnp.zeros_like(final).at[order].set(final)
        return final.reshape(-1, size, fan_out)

    scales = jnp.zeros_like(scales).at[number].set(scales)
    back = jnp.argsort(order)[:fan_in]
    best = _assemble(choose_levels, scales, plain)
    weights = None if outputs is None else outputs.tiles
    return _choose(best, plain, kernel, moment[back][:, back], weights)


def _solve_together(
    solve: Callable[[Any], tuple[Array, Array]],
    tiles: Float32[Array, "tiles m t"],
    outputs: _Outputs,
    size: int,
) -> tuple[
    Float32[Array, "tiles m t"],
    Float32[Array, "tiles m t"],
    Float32[Array, "tiles blocks t"],
]:
    """Solves one group of each tile's outputs after the other.

    Returns:
        What each output had to be, in view of the errors before it; levels; scales.
    """
    count, m, tile = tiles.shape

    def visit(number, carry):
        targets, levels, scales = carry
        first = number * _GROUP
        x = jax.lax.dynamic_slice_in_dim(targets, first, _GROUP, axis=2)
        found = solve(x.swapaxes(0, 1).reshape(m, -1))
        new, scale = (y.reshape(-1, count, _GROUP).swapaxes(0, 1) for y in found)
        error = x - new * jnp.repeat(scale, size, axis=1)
        share = jax.lax.dynamic_slice_in_dim(outputs.shares, first, _GROUP, axis=1)
        targets = targets - jnp.matmul(error, share, precision="highest")
        put = jax.lax.dynamic_update_slice_in_dim
        return targets, put(levels, new, first, 2), put(scales, scale, first, 2)

    order = outputs.order[:, None]
    start = (
        jnp.take_along_axis(tiles, order, axis=2),
        jnp.zeros_like(tiles),
        jnp.zeros((count, m // size, tile)),
    )
    solved = jax.lax.fori_loop(0, tile // _GROUP, visit, start)
    back = jnp.argsort(outputs.order, axis=1)[:, None]
    targets, levels, scales = (jnp.take_along_axis(x, back, axis=2) for x in solved)
    return targets, levels, scales


def _feed_back(
    w: Float32[Array, "m out"], factor: Float32[Array, "m m"], config: QuantConfig
) -> tuple[Float32[Array, "m out"], Float32[Array, "blocks out"]]:
    """GPTQ with a search for the scale of each block: levels and scales."""
    size, quant_type = config.block_size, config.quant_type
    assert size is not None
    columns = jnp.arange(len(w))

    def round_block(x, square, scale):
        """Rounds the columns one by one; each error changes the columns after it."""
        inverse = _invert(scale)

        # Sums over the errors before a column take a seventh of the time of changing
        # all columns after it, because nothing large is written.
        def round_column(i, carry):
            levels, errors = carry
            value = x[i] - _dot(square[:, i], errors)
            level = nearest(value * inverse, quant_type)
            error = (value - level * scale) / square[i, i]
            return levels.at[i].set(level), errors.at[i].set(error)

        start = jnp.zeros_like(x), jnp.zeros_like(x)
        return jax.lax.fori_loop(0, size, round_column, start)

    def search_block(block, carry):
        w, levels, scales = carry
        first = block * size
        rows = jax.lax.dynamic_slice_in_dim(factor, first, size)
        square = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        x = jax.lax.dynamic_slice_in_dim(w, first, size)
        trials = _SHARES[:, None] * jnp.max(jnp.abs(x), axis=0)
        many = jnp.broadcast_to(x[:, None], (size, *trials.shape))
        _, errors = round_block(many, square, trials)
        best = jnp.argmin(jnp.sum(errors**2, axis=0), axis=0)
        scale = jnp.take_along_axis(trials, best[None], axis=0)[0]
        chosen, errors = round_block(x, square, scale)
        behind = jnp.where(columns >= first + size, rows, 0.0)
        w = w - _dot(behind.T, errors)
        levels = jax.lax.dynamic_update_slice_in_dim(levels, chosen, first, axis=0)
        return w, levels, scales.at[block].set(scale)

    start = w, jnp.zeros_like(w), jnp.zeros((len(w) // size, w.shape[1]))
    _, levels, scales = jax.lax.fori_loop(0, len(w) // size, search_block, start)
    return levels, scales


def _descend(
    w: Float32[Array, "m out"],
    moment: Float32[Array, "m m"],
    levels: Float32[Array, "m out"],
    scales: Float32[Array, "blocks out"],
    config: QuantConfig,
    refit: bool = True,
) -> tuple[Float32[Array, "m out"], Float32[Array, "blocks out"]]:
    """Takes each code, and each scale, to its best value given all others, once."""
    size, quant_type = config.block_size, config.quant_type
    assert size is not None
    error = levels * jnp.repeat(scales, size, axis=0) - w
    gradient = _dot(moment, error)

    def visit_block(block, carry):
        gradient, levels, scales = carry
        first = block * size
        rows = jax.lax.dynamic_slice_in_dim(moment, first, size)
        square = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(levels, first, size)
        scale = scales[block]
        inverse = _invert(scale)

        start = jax.lax.dynamic_slice_in_dim(gradient, first, size)

        def visit_column(i, changes):
            slope = start[i] + _dot(square[i], changes)
            target = old[i] * scale - slope / square[i, i]
            level = nearest(target * inverse, quant_type)
            return changes.at[i].set((level - old[i]) * scale)

        changes = jax.lax.fori_loop(0, size, visit_column, jnp.zeros_like(start))
        local = start + _dot(square, changes)
        new = nearest((old * scale + changes) * inverse, quant_type)
        fitted = scale
        if refit:
            slope = jnp.sum(new * local, axis=0)
            curve = jnp.sum(new * _dot(square, new), axis=0)
            step = jnp.where(curve > 0, slope / jnp.where(curve > 0, curve, 1.0), 0.0)
            # An absmax is positive: of mixed signs, double quantisation would lose
            # three times the precision.
            fitted = jnp.where(scale > step, scale - step, scale)
        change = new * fitted - old * scale
        gradient = gradient + _dot(rows.T, change)
        levels = jax.lax.dynamic_update_slice_in_dim(levels, new, first, axis=0)
        return gradient, levels, scales.at[block].set(fitted)

    start = gradient, levels, scales
    _, levels, scales = jax.lax.fori_loop(0, len(scales), visit_block, start)
    return levels, scales


def _assemble(choose_levels, scales, plain):
    """Returns a quantised kernel with these scales.

    Args:
        choose_levels: function from scales ``(blocks, out)``, perhaps rounded, to
            levels ``(blocks, size, out)``.
        scales: absmax of each block.
        plain: a quantised kernel of this format.
    """
    absmax, parts = scales.T, {}
    if plain.double_quant:
        codes, nested_absmax, offset = quantize_absmax(absmax)
        parts = {"nested_absmax": nested_absmax, "offset": offset}
        scales = dequantize_absmax(codes, nested_absmax, offset).T
        absmax = codes
    levels = choose_levels(scales)
    levels = levels.reshape(-1, levels.shape[-1])[: plain.axis_size].T
    codes = encode(levels, plain.quant_type)
    return dataclasses.replace(plain, codes=codes, absmax=absmax, **parts)


def _choose(best, plain, kernel, moment, tiles=None):
    """Returns the one with less error; the plain one if neither is finite."""
    w = kernel.astype(jnp.float32)
    errors = [
        _quadratic(q.dequantize(jnp.float32) - w, moment, tiles) for q in (best, plain)
    ]
    is_better = errors[0] <= errors[1]
    return jax.tree.map(lambda x, y: jnp.where(is_better, x, y), best, plain)


def _quadratic(
    x: Float32[Array, "n out"], moment: Array, tiles: Array | None = None
) -> Float32[Array, ""]:
    """Returns tr(G x^T H x); without a second axis, the moment is H's diagonal."""
    y = moment[..., None] * x if moment.ndim < 2 else _dot(moment, x)
    if tiles is None:
        return jnp.sum(x * y)
    count, tile, _ = tiles.shape
    x, y = (
        jnp.pad(a, [(0, 0), (0, count * tile - a.shape[1])]).reshape(-1, count, tile)
        for a in (x, y)
    )
    square = jnp.einsum("nki,nkj->kij", x, y, precision="highest")
    return jnp.sum(tiles * square)


def _split(kernel: Array, size: int) -> Float32[Array, "blocks size out"]:
    short = -len(kernel) % size
    padded = jnp.pad(kernel.astype(jnp.float32), [(0, short), (0, 0)])
    return padded.reshape(-1, size, kernel.shape[1])


def _invert(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns 1 / scale; 0 for 0, so that a block of zeros stays zeros."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def _dot(x: Array, y: Array) -> Array:
    """Sums over the last axis of ``x`` and the first of ``y``, in full float32."""
    return jnp.tensordot(x, y, 1, precision="highest")
