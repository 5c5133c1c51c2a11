"""The same in place and, on a CPU, a chunk at a time that stays in the cache.

Whole-array code makes XLA write both decoded moments to memory and read them back
twice. A loop over chunks of 128 K elements takes half the time and needs temporaries
for one chunk only.
"""

import math

import jax
from jaxtyping import Array, Float

from jaxbnb_kernels.update_8bit import reference
from jaxbnb_kernels.update_8bit.moment import BlockLayout, Moment

CHUNK = 2**17


def update(
    rule, scalars, grad: Float[Array, "*shape"], moments, layout: BlockLayout
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    if grad.size <= 2 * CHUNK:
        return reference.update(rule, scalars, grad, moments, layout)
    return jax.lax.platform_dependent(
        scalars,
        grad,
        moments,
        cpu=lambda s, g, m: _update_in_chunks(rule, s, g, m, layout),
        default=lambda s, g, m: reference.update(rule, s, g, m, layout),
    )


def _update_in_chunks(rule, scalars, grad, moments, layout: BlockLayout):
    n = math.prod(grad.shape[layout.axis :])
    # Rows that are whole blocks are cut anywhere between blocks, others between rows.
    width = layout.size if n % layout.size == 0 else n
    signed = [m.signed for m in moments]
    blocks = -(-width // layout.size)
    arrays = (
        grad.reshape(-1, width),
        [m.codes.reshape(-1, width) for m in moments],
        [m.absmax.reshape(-1, blocks) for m in moments],
    )

    def update_chunk(arrays):
        grad, codes, absmax = arrays
        return reference.update_rows(
            rule, scalars, grad, codes, absmax, signed, layout.size
        )

    update, codes, absmax = _in_place(update_chunk, arrays, max(1, CHUNK // width))
    new = (
        Moment(c.reshape(grad.shape), a.reshape(layout.absmax_shape), s)
        for c, a, s in zip(codes, absmax, signed, strict=True)
    )
    return update.reshape(grad.shape), tuple(new)


def _in_place(fn, arrays, chunk: int):
    """Replaces every ``chunk`` rows of the arrays by ``fn`` of them."""
    rows = jax.tree.leaves(arrays)[0].shape[0]

    def body(start, size, arrays):
        old = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays
        )
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0),
            arrays,
            fn(old),
        )

    arrays = jax.lax.fori_loop(
        0, rows // chunk, lambda i, arrays: body(i * chunk, chunk, arrays), arrays
    )
    rest = rows % chunk
    return body(rows - rest, rest, arrays) if rest else arrays
