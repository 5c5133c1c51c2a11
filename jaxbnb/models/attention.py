"""Attention: which keys a query sees, and which implementation computes the result.

Three implementations agree up to rounding:

- dense: all scores at once, the fastest for short texts; in bfloat16 on a CPU, by a
  native kernel;
- blocks: a running softmax over blocks of keys for a block of queries at a time, as in
  FlashAttention, in memory that is linear in the length. The backward pass computes the
  scores again, and blocks that no query sees are skipped. On a CPU a native kernel, if
  it serves the call, computes all scores of a block of queries instead;
- cuDNN: the same on a GPU, in one kernel.

`attend` chooses. Shapes, dtypes and options decide about the blocks. Whether cuDNN runs
also depends on the platform that the program is lowered for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxbnb.models._blocks import (
    UNSEEN,
    ReadBlock,
    attend_blocks,
    by_platform,
    run_blocks,
    soften,
)
from jaxbnb.models._sight import Sight
from jaxbnb_kernels import native
from jaxbnb_kernels.attend_dense import attend_dense

__all__ = [
    "Sight",
    "attend",
    "attend_slots",
    "least_capability",
    "soften",
    "why_no_cudnn",
    "why_not_cudnn",
]

# Scores of one head up to this number are computed at once.
DENSE_SCORES = 256 * 256
# Up to this many scores of one head, a native kernel computes the blocks on a CPU. Its
# mask takes a byte for each.
NATIVE_SCORES = 4096 * 4096
# A cache of up to this many slots is read in full.
DENSE_SLOTS = 256


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    sight: Sight,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
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
        sinks: score in each head of a key that all queries see and whose value is zero,
            as in gpt-oss; None for no such key.
        block: number of queries, and of keys, in a block; None for ``BLOCKS``.
        dense_scores: largest number of scores in a head to compute at once; None for
            ``DENSE_SCORES``.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    dense_scores = DENSE_SCORES if dense_scores is None else dense_scores
    if q.shape[1] * k.shape[1] <= dense_scores:
        return _attend_dense(q, k, v, sight, scale, softcap, sinks)

    has_options = softcap is not None or sight.bias is not None or sinks is not None
    is_small = q.shape[1] * k.shape[1] <= NATIVE_SCORES
    has_kernel = q.dtype in (jnp.bfloat16, jnp.float32)
    is_native = is_small and has_kernel and not has_options and native.is_on()

    def in_blocks(q, k, v, sight):
        pair: Any = attend_blocks(scale, softcap, block, is_native, q, k, v, sight)
        out, log_sum = pair
        return _fade(out, log_sum, sinks)

    if why_not_cudnn(q.dtype, q.shape[-1], sight, softcap, sinks is not None):
        return in_blocks(q, k, v, sight)
    window: Any = sight.window

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
    sinks: Float[Array, " heads"] | None = None,
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
        sinks: see `attend`.
        block: see `attend`.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if sight.num_keys <= DENSE_SLOTS:
        keys, values = read(jnp.int32(0), sight.num_keys)
        return _attend_dense(q, keys, values, sight, scale, softcap, sinks)

    def run(block, q, sight):
        return _fade(*run_blocks(q, read, sight, scale, softcap, block), sinks)

    return by_platform(run, block, q, sight)


def why_not_cudnn(
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    sight: Sight | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
) -> str | None:
    """Returns why cuDNN does not compute long attention on a GPU; None if it does.

    Args:
        dtype: dtype of queries, keys and values.
        head_dim: number of features in a head.
        sight: which keys each query sees; None for causal attention without options.
        softcap: bound of the scores.
        has_sinks: whether there are attention sinks.
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
    if has_sinks:
        return "cuDNN has no attention sinks"
    if sight is None:
        return None
    if sight.is_real is not None or sight.segment_ids is not None:
        return "cuDNN would need a mask of every query and key"
    if sight.bias is not None:
        return "cuDNN would need a bias of every query and key"
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


def _fade(
    out: Float[Array, "batch seq heads head_dim"],
    log_sum: Float32[Array, "batch kv_heads group seq"],
    sinks: Float[Array, " heads"] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Gives sinks their share of the softmax: exp(sink) joins the sum of each query."""
    if sinks is None:
        return out
    _, kv_heads, group, _ = log_sum.shape
    sinks = sinks.astype(jnp.float32).reshape(kv_heads, group, 1)
    share = jax.nn.sigmoid(log_sum - sinks)
    share = share.reshape(len(out), kv_heads * group, -1).swapaxes(1, 2)
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)


def _attend_dense(
    q, k, v, sight: Sight, scale: float, softcap: float | None, sinks: Array | None
):
    batch, seq, heads, head_dim = q.shape
    keys = jnp.arange(k.shape[1])
    mask = sight.mask(jnp.arange(seq), keys, seq)
    has_options = softcap is not None or sight.bias is not None or sinks is not None
    if not has_options and q.dtype == jnp.bfloat16:
        return attend_dense(q, k, v, mask, scale=scale)
    if not has_options and q.dtype == jnp.float32:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    # Put query heads that share a key head next to each other.
    q = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    products = jnp.einsum("bsngd,bknd->bngsk", q, k, preferred_element_type=jnp.float32)
    products = sight.add_bias(soften(products * scale, softcap), keys)
    products = jnp.where(mask[:, None, None], products, UNSEEN)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*products.shape[:-1], 1))
        products = jnp.concatenate([products, sinks], axis=-1)
    weights = jax.nn.softmax(products).astype(v.dtype)[..., : k.shape[1]]
    return jnp.einsum("bngsk,bknd->bsngd", weights, v).reshape(
        batch, seq, heads, head_dim
    )
