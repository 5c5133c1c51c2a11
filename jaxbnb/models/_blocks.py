"""Attention in blocks, with a backward pass that computes the scores again.

References:
    Dao, FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning, 2023.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxbnb.models._sight import Sight
from jaxbnb_kernels.attend_dense import attend_dense

# Number of queries, and of keys, in a block. A tile of 256 x 256 scores fits in a CPU's
# cache; a GPU starts several kernels for each tile, and needs more work in each.
BLOCKS = {"default": 256, "cuda": 512}
# A finite value, so that a row of padding, which sees nothing, is not NaN.
UNSEEN = float(np.finfo(np.float32).min)

Keys = Float[Array, "batch block kv_heads head_dim"]
ReadBlock = Callable[[Array, int], tuple[Keys, Keys]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend_blocks(
    scale: float,
    softcap: float | None,
    block: int | None,
    is_native: bool,
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    sight: Sight,
) -> tuple[
    Float[Array, "batch seq heads head_dim"], Float32[Array, "batch kv_heads group seq"]
]:
    """Computes attention in blocks; see `jaxbnb.models.attention.attend`.

    The backward pass keeps the arguments and the results. With ``is_native``, a native
    kernel computes them on a CPU: it takes no softcap and no bias, and the second
    result is zero.

    Returns:
        The result, and log(sum(exp(scores))) of each query.
    """
    return _forward(scale, softcap, block, is_native, q, k, v, sight)[0]


def _forward(scale, softcap, block, is_native, q, k, v, sight):
    def run(block, q, k, v, sight):
        return run_blocks(q, _reader(k, v), sight, scale, softcap, block)

    def run_native(q, k, v, sight):
        batch, seq, heads, _ = q.shape
        sums = jnp.zeros((batch, k.shape[2], heads // k.shape[2], seq), jnp.float32)
        return _attend_native(sight, scale, q, k, v), sums

    cpu = run_native if is_native else None
    out, log_sum = by_platform(run, block, q, k, v, sight, cpu=cpu)
    return (out, log_sum), (q, k, v, out, log_sum, sight)


def _backward(scale, softcap, block, is_native, residuals, cotangents):
    run = functools.partial(_differentiate_blocks, scale, softcap)

    def run_native(q, k, v, out, log_sum, sight, d_out, d_log_sum):
        del out, log_sum, d_log_sum
        attend = functools.partial(_attend_native, sight, scale)
        return jax.vjp(attend, q, k, v)[1](d_out)

    cpu = run_native if is_native else None
    return *by_platform(run, block, *residuals, *cotangents, cpu=cpu), None


def _attend_native(sight, scale, q, k, v):
    seq, keys = q.shape[1], k.shape[1]
    mask = sight.mask(jnp.arange(seq), jnp.arange(keys), seq)
    return attend_dense(q, k, v, mask, scale=scale)


attend_blocks.defvjp(_forward, _backward)


def _differentiate_blocks(
    scale: float,
    softcap: float | None,
    block: int,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    log_sum: Array,
    sight: Sight,
    d_out: Array,
    d_log_sum: Array,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of ``q``, ``k`` and ``v``; computes the scores again."""
    num_queries = q.shape[1]
    rows = min(block, num_queries)
    columns = min(block, k.shape[1])
    read = _reader(k, v)
    # sum(p * dp) over the keys is sum(out * d_out) over the features.
    inner = jnp.einsum("bqhd,bqhd->bqh", out, d_out, preferred_element_type=jnp.float32)
    num_heads, kv_heads = q.shape[2], k.shape[2]
    inner = inner.reshape(*inner.shape[:2], kv_heads, num_heads // kv_heads)

    def query_block(carry, scanned):
        index, q, d_out, inner, log_sum = scanned
        first = index * rows
        queries = first + jnp.arange(rows)

        def key_block(number, carry):
            d_q, d_k, d_v = carry
            start, keys, is_new = _locate(number, columns, sight.num_keys)
            k, v = read(start, columns)
            seen = (sight.mask(queries, keys, num_queries) & is_new)[:, None, None]
            products = _score(q, k, scale)
            scores = soften(products, softcap)
            biased = sight.add_bias(scores, keys)
            weights = jnp.where(seen, jnp.exp(biased - log_sum[..., None]), 0.0)
            d_weights = jnp.einsum(
                "bngqd,bknd->bngqk", d_out, v, preferred_element_type=jnp.float32
            )
            d_scores = weights * (d_weights - inner[..., None])
            if softcap is not None:
                d_scores = d_scores * (1 - jnp.square(scores / softcap))
            d_scores = (d_scores * scale).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_q += jnp.einsum(
                "bngqk,bknd->bngqd", d_scores, k, preferred_element_type=jnp.float32
            )
            d_k = _add(d_k, start, _gather_queries(d_scores, q))
            d_v = _add(d_v, start, _gather_queries(weights, d_out))
            return d_q, d_k, d_v

        zeros = jnp.zeros(q.shape, jnp.float32)
        low, high = sight.span(first, rows, columns, num_queries)
        d_q, *carry = jax.lax.fori_loop(low, high, key_block, (zeros, *carry))
        return tuple(carry), d_q.astype(q.dtype)

    per_query = (
        _in_blocks(_group(q, kv_heads), rows),
        _in_blocks(_group(d_out, kv_heads), rows),
        # The derivative of log_sum by a score is the weight, as that of out has it.
        _in_blocks(inner.transpose(0, 2, 3, 1) - d_log_sum, rows),
        _in_blocks(log_sum, rows),
    )
    count = per_query[0].shape[0]
    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    scanned = (jnp.arange(count), *per_query)
    (d_k, d_v), d_q = jax.lax.scan(query_block, carry, scanned)
    d_q = _from_blocks(d_q, q.shape)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


def run_blocks(
    q: Array,
    read: ReadBlock,
    sight: Sight,
    scale: float,
    softcap: float | None,
    block: int,
) -> tuple[Array, Array]:
    """Returns the result, and log(sum(exp(scores))) as ``(batch, n, group, seq)``."""
    num_queries = q.shape[1]
    rows = min(block, num_queries)
    columns = min(block, sight.num_keys)
    kv_heads = jax.eval_shape(lambda: read(jnp.int32(0), 1))[0].shape[2]

    def query_block(_, scanned):
        index, q = scanned
        first = index * rows
        queries = first + jnp.arange(rows)

        def key_block(number, carry):
            out, most, total = carry
            start, keys, is_new = _locate(number, columns, sight.num_keys)
            k, v = read(start, columns)
            seen = (sight.mask(queries, keys, num_queries) & is_new)[:, None, None]
            scores = sight.add_bias(soften(_score(q, k, scale), softcap), keys)
            scores = jnp.where(seen, scores, UNSEEN)
            new_most = jnp.maximum(most, scores.max(axis=-1))
            # What a row without any key so far adds up, this factor sets to 0 later.
            shrink = jnp.exp(most - new_most)
            weights = jnp.exp(scores - new_most[..., None])
            total = total * shrink + weights.sum(axis=-1)
            out = out * shrink[..., None] + jnp.einsum(
                "bngqk,bknd->bngqd",
                weights.astype(v.dtype),
                v,
                preferred_element_type=jnp.float32,
            )
            return out, new_most, total

        carry = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.full(q.shape[:-1], UNSEEN, jnp.float32),
            jnp.zeros(q.shape[:-1], jnp.float32),
        )
        low, high = sight.span(first, rows, columns, num_queries)
        out, most, total = jax.lax.fori_loop(low, high, key_block, carry)
        out = (out / total[..., None]).astype(q.dtype)
        return None, (out, most + jnp.log(total))

    blocks = _in_blocks(_group(q, kv_heads), rows)
    scanned = jnp.arange(blocks.shape[0]), blocks
    _, (out, log_sum) = jax.lax.scan(query_block, None, scanned)
    log_sum = jnp.moveaxis(log_sum, 0, -2)
    log_sum = log_sum.reshape(*log_sum.shape[:-2], -1)[..., : q.shape[1]]
    return _from_blocks(out, q.shape), log_sum


def _locate(
    number: Array, size: int, num_keys: int
) -> tuple[Array, Int32[Array, " keys"], Bool[Array, " keys"]]:
    """Returns a block's start, its keys, and which of them are in no earlier block.

    The last block begins early, so that it ends where the keys do.
    """
    start = jnp.minimum(number * size, num_keys - size)
    keys = start + jnp.arange(size)
    return start, keys, keys >= number * size


def _reader(k: Array, v: Array) -> ReadBlock:
    def read(start, size):
        return (
            jax.lax.dynamic_slice_in_dim(k, start, size, 1),
            jax.lax.dynamic_slice_in_dim(v, start, size, 1),
        )

    return read


def _score(q: Array, k: Array, scale: float) -> Array:
    products = jnp.einsum("bngqd,bknd->bngqk", q, k, preferred_element_type=jnp.float32)
    return products * scale


def _gather_queries(x: Array, y: Array) -> Array:
    return jnp.einsum("bngqk,bngqd->bknd", x, y, preferred_element_type=jnp.float32)


def _add(x: Array, start: Array, part: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[1], 1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, 1)


def _group(x: Array, kv_heads: int) -> Array:
    """``(batch, seq, heads, dim)`` to ``(batch, kv_heads, group, seq, dim)``."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    return x.transpose(0, 2, 3, 1, 4)


def _in_blocks(x: Array, size: int) -> Array:
    """Cuts axis 3, padded to whole blocks, and moves the blocks to the front."""
    short = -x.shape[3] % size
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, short)] + [(0, 0)] * (x.ndim - 4))
    x = x.reshape(*x.shape[:3], -1, size, *x.shape[4:])
    return jnp.moveaxis(x, 3, 0)


def _from_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_group` and `_in_blocks`; ``shape`` is ``(batch, seq, heads, dim)``."""
    batch, seq, heads, dim = shape
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)
    return x[:, :seq]


def by_platform(
    run: Callable[..., Any],
    block: int | None,
    *args: Any,
    cpu: Callable[..., Any] | None = None,
) -> Any:
    """Calls ``run(block, *args)`` with the platform's size of blocks by default.

    Args:
        run: function for any platform.
        block: number of queries, and of keys, in a block; None for ``BLOCKS``.
        *args: arguments of the functions.
        cpu: function for CPUs, without a size of blocks; None for ``run``.
    """
    if block is not None:
        return run(block, *args)
    branches: dict[str, Callable[..., Any]] = {
        platform: functools.partial(run, size) for platform, size in BLOCKS.items()
    }
    if cpu is not None:
        branches["cpu"] = cpu
    return jax.lax.platform_dependent(*args, **branches)


def soften(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Computes ``cap * tanh(x / cap)``, which stays below the cap; ``x`` for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
