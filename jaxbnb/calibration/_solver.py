"""Chooses the codes and absmax of one matrix, for given second moments.

Notation of these functions: a matrix is ``(in, out)``, with its blocks along the first
axis, so that one step works on a whole row of outputs. Outputs are independent, unless
the second moment of their gradients is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxbnb.calibration import _prepare
from jaxbnb.calibration._levels import encode, nearest, searchable
from jaxbnb.calibration._prepare import (
    DAMPING,
    Outputs,
    prepare_inputs,
    prepare_outputs,
    shrink_tiles,
    tile_shape,
)
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.config import as_config
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax, quantize_absmax

# Scales that are tried, as shares of the largest magnitude in a block. They include 1,
# so `search_scales` never ends with worse codes than absmax's.
_SHARES: Final = np.linspace(0.6, 1.1, 21, dtype=np.float32)
_SWEEPS: Final = 4
# Outputs that are solved at once: a block of them, for all scales, is 1.4 MiB, which a
# core's cache holds.
_TILE: Final = 256


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
        weights = jnp.where(mean > 0, weights * _invert(mean), 1.0) + DAMPING
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
    moment = np.asarray(moment, np.float64)
    damped, order, factor = prepare_inputs(moment, config.block_size)
    outputs = None
    if gradients is not None:
        fan_out = kernel.shape[1]
        if gradients.shape != tile_shape(fan_out):
            raise ValueError(
                f"the gradients of {fan_out} outputs have tiles {tile_shape(fan_out)}; "
                f"got {gradients.shape}"
            )
        outputs = prepare_outputs(shrink_tiles(gradients, fan_out))
    return _minimize(
        kernel,
        jnp.asarray(damped, jnp.float32),
        jnp.asarray(order),
        jnp.asarray(factor, jnp.float32),
        config,
        outputs,
    )


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
    outputs: Outputs | None = None,
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
    outputs: Outputs,
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
    (count, m, tile), group = tiles.shape, _prepare.GROUP

    def visit(number, carry):
        targets, levels, scales = carry
        first = number * group
        x = jax.lax.dynamic_slice_in_dim(targets, first, group, axis=2)
        found = solve(x.swapaxes(0, 1).reshape(m, -1))
        new, scale = (y.reshape(-1, count, group).swapaxes(0, 1) for y in found)
        error = x - new * jnp.repeat(scale, size, axis=1)
        share = jax.lax.dynamic_slice_in_dim(outputs.shares, first, group, axis=1)
        targets = targets - jnp.matmul(error, share, precision="highest")
        put = jax.lax.dynamic_update_slice_in_dim
        return targets, put(levels, new, first, 2), put(scales, scale, first, 2)

    order = outputs.order[:, None]
    start = (
        jnp.take_along_axis(tiles, order, axis=2),
        jnp.zeros_like(tiles),
        jnp.zeros((count, m // size, tile)),
    )
    solved = jax.lax.fori_loop(0, tile // group, visit, start)
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
