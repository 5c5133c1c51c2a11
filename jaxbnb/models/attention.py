"""Attention: which keys a query sees, and which implementation computes the result.

Three implementations agree up to rounding:

- dense: all scores at once, the fastest for short texts;
- blocks: a running softmax over blocks of keys for a block of queries at a time, as in
  FlashAttention, in memory that is linear in the length. The backward pass computes the
  scores again, and blocks that no query sees are skipped;
- cuDNN: the same on a GPU, in one kernel.

`attend` chooses. Shapes, dtypes and options decide about the blocks. Whether cuDNN runs
also depends on the platform that the program is lowered for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

# Scores of one head up to this number are computed at once.
DENSE_SCORES = 256 * 256
# A cache of up to this many slots is read in full.
DENSE_SLOTS = 256
# Number of queries, and of keys, in a block. A tile of 256 x 256 scores fits in a CPU's
# cache; a GPU starts several kernels for each tile, and needs more work in each.
BLOCKS = {"default": 256, "cuda": 512}
# A finite value, so that a row of padding, which sees nothing, is not NaN.
_UNSEEN = float(np.finfo(np.float32).min)

Keys = Float[Array, "batch block kv_heads head_dim"]
ReadBlock = Callable[[Array, int], tuple[Keys, Keys]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "is_real", "window", "segment_ids"),
    meta_fields=("num_keys", "is_ring"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """Which keys each query sees: those at or before it, as far as the rest allows.

    Attributes:
        num_keys: number of keys.
        start: index of the first query among the keys.
        is_real: False for keys that no query sees, such as padding; None if all are
            real.
        window: number of keys that a query sees, including its own; an array if layers
            differ, None for all.
        segment_ids: number of the document of each key; queries see only keys of their
            own. None for a single document.
        is_ring: whether key ``t`` is in slot ``t % num_keys``, so that later keys
            replace earlier ones. Otherwise a key's index is its slot.
    """

    num_keys: int
    start: Int32[Array, ""] | int = 0
    is_real: Bool[Array, "batch keys"] | None = None
    window: Int32[Array, ""] | int | None = None
    segment_ids: Int32[Array, "batch keys"] | None = None
    is_ring: bool = False

    def in_ring(self, size: int) -> "Sight":
        """Returns the same sight of keys that are kept in a ring of ``size`` slots."""
        return dataclasses.replace(self, num_keys=size, is_ring=True)

    def mask(
        self,
        queries: Int[Array, " queries"],
        keys: Int[Array, " keys"],
        num_queries: int,
    ) -> Bool[Array, "#batch queries keys"]:
        """Says which of the keys each of the queries sees.

        Args:
            queries: consecutive indices, without ``start``.
            keys: consecutive slots.
            num_queries: number of all queries; their keys have been written.
        """
        rows, columns = (self.start + queries)[:, None], keys[None]
        if self.is_ring:
            last = self.start + num_queries - 1
            columns = last - (last - columns) % self.num_keys
        seen = columns <= rows
        if self.window is not None:
            seen &= rows - columns < self.window
        if self.is_ring:
            seen &= columns >= 0
        seen = seen[None]
        if self.is_real is not None:
            if self.is_ring:
                real = self.is_real.at[:, columns[0]].get(mode="clip")
            else:
                real = _slice(self.is_real, keys)
            seen &= real[:, None]
        if self.segment_ids is not None:
            # Queries are keys too. The last block of them may be padded.
            own = self.segment_ids.at[:, queries].get(mode="clip")
            seen &= own[:, :, None] == _slice(self.segment_ids, keys)[:, None]
        return seen

    def span(
        self, first: Int32[Array, ""], count: int, block: int, num_queries: int
    ) -> tuple[Array, Array]:
        """Returns the first block of keys that these queries see, and the end.

        Args:
            first: index of the first query.
            count: number of queries.
            block: number of keys in a block.
            num_queries: see `mask`.
        """
        last = self.start + (num_queries if self.is_ring else first + count) - 1
        stop = jnp.minimum(last, self.num_keys - 1) // block + 1
        if self.window is None or self.is_ring:
            return jnp.zeros_like(stop), stop
        return jnp.maximum(self.start + first - self.window + 1, 0) // block, stop


def _slice(x: Array, indices: Int[Array, " n"]) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, indices[0], indices.shape[0], axis=1)


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    sight: Sight,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
    dense_scores: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Multiplies softmax of the scores, computed in float32, by the values.

    Args:
        q: queries.
        k: keys; groups of query heads may share a head of keys.
        v: values.
        sight: which keys each query sees.
        scale: factor of the scores; None for ``head_dim**-0.5``.
        softcap: bound of the scores, by a scaled tanh; None for no bound.
        block: number of queries, and of keys, in a block; None for ``BLOCKS``.
        dense_scores: largest number of scores in a head to compute at once; None for
            ``DENSE_SCORES``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dense_scores = DENSE_SCORES if dense_scores is None else dense_scores
    if q.shape[1] * k.shape[1] <= dense_scores:
        return _attend_dense(q, k, v, sight, scale, softcap)
    in_blocks = functools.partial(_attend_blocks, scale, softcap, block)
    if why_not_cudnn(q.dtype, q.shape[-1], sight, softcap) is not None:
        return in_blocks(q, k, v, sight)
    window = sight.window

    def by_cudnn(q, k, v, sight):
        del sight
        return jax.nn.dot_product_attention(
            *(q, k, v),
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )

    return jax.lax.platform_dependent(q, k, v, sight, cuda=by_cudnn, default=in_blocks)


def attend_slots(
    q: Float[Array, "batch seq heads head_dim"],
    read: ReadBlock,
    sight: Sight,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Computes `attend` for keys in slots, and reads only the blocks that are seen.

    Without gradients, except for few slots: JAX does not differentiate a loop over a
    number of blocks that is unknown before it runs.

    Args:
        q: queries.
        read: ``read(start, size)`` returns ``size`` keys and values from an index on.
        sight: which keys each query sees.
        scale: see `attend`.
        softcap: see `attend`.
        block: see `attend`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if sight.num_keys <= DENSE_SLOTS:
        keys, values = read(jnp.int32(0), sight.num_keys)
        return _attend_dense(q, keys, values, sight, scale, softcap)

    def run(block, q, sight):
        return _run_blocks(q, read, sight, scale, softcap, block)[0]

    return _by_platform(run, block, q, sight)


def why_not_cudnn(
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    sight: Sight | None = None,
    softcap: float | None = None,
) -> str | None:
    """Returns why cuDNN does not compute long attention on a GPU; None if it does.

    Args:
        dtype: dtype of queries, keys and values.
        head_dim: number of features in a head.
        sight: which keys each query sees; None for causal attention without options.
        softcap: bound of the scores.
    """
    if reason := why_no_cudnn():
        return reason
    most = 256 if least_capability() >= (9, 0) else 128
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if head_dim > most or head_dim % 8:
        return f"cuDNN takes heads of up to {most} features, by 8; not of {head_dim}"
    if softcap is not None:
        return "cuDNN does not bound scores"
    if sight is None:
        return None
    if sight.is_real is not None or sight.segment_ids is not None:
        return "cuDNN would need a mask of every query and key"
    if not isinstance(sight.window, int | None):
        return "cuDNN needs one window for all layers"
    return None


def why_no_cudnn() -> str | None:
    """Returns why this machine has no cuDNN attention; None if it has."""
    if jax.default_backend() != "gpu":
        return "no GPU"
    if not all(hasattr(d, "compute_capability") for d in jax.local_devices()):
        return "no NVIDIA GPU"
    if least_capability() < (8, 0):
        return "cuDNN's attention needs compute capability 8.0"
    q = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    try:
        jax.eval_shape(attention, q, q, q)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return None


def least_capability() -> tuple[int, ...]:
    """Returns the lowest compute capability of this machine's GPUs."""
    found = (str(device.compute_capability) for device in jax.local_devices())
    return min(tuple(map(int, capability.split("."))) for capability in found)


def _attend_dense(q, k, v, sight: Sight, scale: float, softcap: float | None):
    batch, seq, heads, head_dim = q.shape
    mask = sight.mask(jnp.arange(seq), jnp.arange(k.shape[1]), seq)
    if softcap is None:
        # JAX computes this softmax in float32 for any dtype of q. Strict promotion
        # would refuse that for 16 bits.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask[:, None], scale=scale
            )
    # Put query heads that share a key head next to each other.
    q = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    products = jnp.einsum("bsngd,bknd->bngsk", q, k, preferred_element_type=jnp.float32)
    products = soften(products * scale, softcap)
    products = jnp.where(mask[:, None, None], products, _UNSEEN)
    weights = jax.nn.softmax(products).astype(v.dtype)
    return jnp.einsum("bngsk,bknd->bsngd", weights, v).reshape(
        batch, seq, heads, head_dim
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend_blocks(scale, softcap, block, q, k, v, sight):
    return _attend_blocks_fwd(scale, softcap, block, q, k, v, sight)[0]


def _attend_blocks_fwd(scale, softcap, block, q, k, v, sight):
    def run(block, q, k, v, sight):
        return _run_blocks(q, _reader(k, v), sight, scale, softcap, block)

    out, log_sum = _by_platform(run, block, q, k, v, sight)
    return out, (q, k, v, out, log_sum, sight)


def _attend_blocks_bwd(scale, softcap, block, residuals, d_out):
    run = functools.partial(_differentiate_blocks, scale, softcap)
    return *_by_platform(run, block, *residuals, d_out), None


_attend_blocks.defvjp(_attend_blocks_fwd, _attend_blocks_bwd)


def _by_platform(run: Callable[..., Any], block: int | None, *args: Any) -> Any:
    """Calls ``run(block, *args)`` with the platform's size of blocks by default."""
    if block is not None:
        return run(block, *args)
    branches = {
        platform: functools.partial(run, size) for platform, size in BLOCKS.items()
    }
    return jax.lax.platform_dependent(*args, **branches)


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
            weights = jnp.where(seen, jnp.exp(scores - log_sum[..., None]), 0.0)
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
        _in_blocks(inner.transpose(0, 2, 3, 1), rows),
        _in_blocks(log_sum, rows),
    )
    count = per_query[0].shape[0]
    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    scanned = (jnp.arange(count), *per_query)
    (d_k, d_v), d_q = jax.lax.scan(query_block, carry, scanned)
    d_q = _from_blocks(d_q, q.shape)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


def _run_blocks(
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
            scores = soften(_score(q, k, scale), softcap)
            scores = jnp.where(seen, scores, _UNSEEN)
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
            jnp.full(q.shape[:-1], _UNSEEN, jnp.float32),
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
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (k, v))

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


def soften(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Computes ``cap * tanh(x / cap)``, which stays below the cap; ``x`` for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
