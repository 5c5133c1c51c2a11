"""An in-place implementation; on a CPU, it updates one chunk at a time, in the cache.

Whole-array code makes XLA write both decoded moments to memory and read them back
twice. A loop over chunks of 128 K elements takes half the time and needs temporaries
for one chunk only. Where XLA divides arrays among devices, it would gather them for the
loop: `kernels.update` then calls `reference.update` instead.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels.update_8bit import reference
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment

CHUNK = 2**17
# Smaller arrays are updated whole. XLA holds all of many such arrays decoded at once.
SMALL = 2**15


# Jitted, so that parameters of the same shape are traced once, not a hundred times.
@functools.partial(jax.jit, static_argnames=("rule", "layout"))
def update(
    rule, scalars, grad: Float[Array, "*shape"], moments, layout: BlockLayout, param
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """See `update_8bit`."""
    if grad.size <= SMALL:
        return reference.update(rule, scalars, grad, moments, layout, param)
    return jax.lax.platform_dependent(
        scalars,
        grad,
        moments,
        param,
        cpu=lambda s, g, m, p: _update_in_chunks(rule, s, g, m, layout, p),
        default=lambda s, g, m, p: reference.update(rule, s, g, m, layout, p),
    )


def _update_in_chunks(rule, scalars, grad, moments, layout: BlockLayout, param):
    n = math.prod(grad.shape[layout.axis :])
    # Rows of whole blocks are cut between any two blocks, others only between rows.
    width = layout.size if n % layout.size == 0 else n
    signed = [m.signed for m in moments]
    blocks = -(-width // layout.size)
    rows = grad.reshape(-1, width)
    # The new parameter overwrites the old one. An update must not overwrite the
    # gradient: XLA would copy all codes in each iteration, for a rule that reads old
    # moments.
    result = jnp.zeros_like(rows) if param is None else param.reshape(-1, width)
    codes = [m.codes.reshape(-1, width) for m in moments]
    absmax = [m.absmax.reshape(-1, blocks) for m in moments]

    def update_chunk(cut, arrays):
        old, codes, absmax = arrays
        param_rows = None if param is None else old
        return reference.update_rows(
            rule, scalars, codes, absmax, signed, layout.size, cut(rows), param_rows
        )

    result, codes, absmax = _in_place(
        update_chunk, (result, codes, absmax), CHUNK // width
    )
    new = (
        Moment(c.reshape(grad.shape), a.reshape(layout.absmax_shape), s)
        for c, a, s in zip(codes, absmax, signed, strict=True)
    )
    return result.reshape(grad.shape), tuple(new)


def _in_place(fn, arrays, chunk: int):
    """Replaces every ``chunk`` rows of the arrays by ``fn(cut, rows)``.

    ``cut`` returns the same rows of any other array.
    """
    rows = jax.tree.leaves(arrays)[0].shape[0]
    # At least two iterations: XLA unrolls a loop of one.
    chunk = max(1, min(chunk, rows // 2))

    def body(start, size, arrays):
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0),
            arrays,
            fn(cut, jax.tree.map(cut, arrays)),
        )

    arrays = jax.lax.fori_loop(
        0, rows // chunk, lambda i, arrays: body(i * chunk, chunk, arrays), arrays
    )
    rest = rows % chunk
    return body(rows - rest, rest, arrays) if rest else arrays
