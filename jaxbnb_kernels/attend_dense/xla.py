"""Attention as XLA computes it: the specification, and the path on any device.

Long texts are cut to strips of queries, so that memory is linear in the length.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

# Scores of one head that are computed at once.
_MOST_SCORES: Final = 2**18
# A finite value, so that a query that sees no key does not get NaN.
_UNSEEN = float(np.finfo(np.float32).min)
_to_scores = functools.partial(
    jnp.einsum, "bqnd,bknd->bnqk", preferred_element_type=jnp.float32
)
_to_keys = functools.partial(
    jnp.einsum, "bnqk,bqnd->bknd", preferred_element_type=jnp.float32
)
_to_queries = functools.partial(jnp.einsum, "bnqk,bknd->bqnd")


def attend(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    scale: float,
) -> Float[Array, "batch queries heads head_dim"]:
    """See `attend_dense`."""

    def attend_strip(_, strip):
        q, mask = strip

        def attend_one(q):
            return _to_queries(_weigh(q, k, mask, scale).astype(v.dtype), v)

        return None, jax.vmap(attend_one, 3, 3)(_group(q, k)).reshape(q.shape)

    return _scan_strips(attend_strip, None, k.shape[1], q, mask)[1]


def gradient(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    d_out: Float[Array, "batch queries heads head_dim"],
    scale: float,
) -> tuple[Array, Array, Array]:
    """Computes the cotangents of ``q``, ``k`` and ``v`` from that of the result.

    JAX's own derivative would multiply in float32, with copies of the 16-bit arrays.
    """

    def differentiate_strip(totals, strip):
        q, mask, d_out = strip

        def differentiate_one(q, d_out):
            weights = _weigh(q, k, mask, scale)
            d_weights = _to_scores(d_out, v)
            mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
            d_scores = (weights * (d_weights - mean) * scale).astype(q.dtype)
            d_v = _to_keys(weights.astype(q.dtype), d_out)
            return _to_queries(d_scores, k), _to_keys(d_scores, q), d_v

        per_head = jax.vmap(differentiate_one, 3, (3, 0, 0))
        d_q, *parts = per_head(_group(q, k), _group(d_out, k))
        totals = [total + d.sum(axis=0) for total, d in zip(totals, parts, strict=True)]
        return totals, d_q.reshape(q.shape)

    totals = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
    totals, d_q = _scan_strips(differentiate_strip, totals, k.shape[1], q, mask, d_out)
    d_k, d_v = (d.astype(q.dtype) for d in totals)
    return d_q, d_k, d_v


def _scan_strips(
    use: Callable[..., Any], carry: Any, keys: int, *arrays: Array
) -> tuple[Any, Array]:
    """Scans strips of queries, which are axis 1; the last one is padded with zeros.

    Returns:
        The last carry, and the results of all queries.
    """
    queries = arrays[0].shape[1]
    rows = max(1, _MOST_SCORES // max(keys, 1))
    if queries <= rows:
        return use(carry, arrays)

    def cut(x):
        padding = [(0, 0)] * x.ndim
        padding[1] = 0, -queries % rows
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(len(x), -1, rows, *x.shape[2:]), 1, 0)

    carry, results = jax.lax.scan(use, carry, tuple(map(cut, arrays)))
    results = jnp.moveaxis(results, 0, 1)
    return carry, results.reshape(len(results), -1, *results.shape[3:])[:, :queries]


def gradient_jvp(
    primals: Sequence[Array], tangents: Sequence[Array], scale: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Computes `gradient`, and its derivative along the tangents of its arguments."""
    q, k, v, mask, d_out = primals
    along_q, along_k, along_v, _, along_d_out = tangents
    return jax.jvp(
        lambda q, k, v, d_out: gradient(q, k, v, mask, d_out, scale),
        (q, k, v, d_out),
        (along_q, along_k, along_v, along_d_out),
    )


def _group(x: Array, k: Array) -> Array:
    """Splits query heads: ``(batch, queries, kv_heads, group, head_dim)``."""
    batch, queries, heads, head_dim = x.shape
    kv_heads = k.shape[2]
    return x.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)


def _weigh(
    q: Float[Array, "batch queries kv_heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    scale: float,
) -> Float32[Array, "batch kv_heads queries keys"]:
    scores = jnp.where(mask[:, None], _to_scores(q, k) * scale, _UNSEEN)
    return jax.nn.softmax(scores)
