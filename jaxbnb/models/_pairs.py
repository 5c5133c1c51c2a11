"""Attention between two texts, or within one, with a bias for each pair of tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxbnb.models._blocks import UNSEEN
from jaxbnb.models._config import DecoderConfig
from jaxbnb.nnx import keep_product
from jaxbnb.sharding.activations import constrain

# Scores of one head up to this number are computed at once.
DENSE_SCORES: Final = 256 * 256
# Least number of queries in a block.
_ROWS: Final = 64

Indices = Int[Array, " n"]
Bias = Callable[[Indices, Indices], Float32[Array, "heads queries keys"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Which keys each query sees, and what is added to their scores.

    Attributes:
        is_real: False for keys that no query sees, such as padding; None if all are
            real.
        start: index of the first query among the keys, if queries see only the keys at
            or before them; None if they see all.
        bias: function from indices of queries and keys to what is added; None for
            nothing.
    """

    is_real: Bool[Array, "batch keys"] | None = None
    start: Int32[Array, ""] | int | None = None
    bias: Bias | None = None

    def score(
        self, scores: Float32[Array, "batch heads queries keys"], queries: Indices
    ) -> Float32[Array, "batch heads queries keys"]:
        """Adds the bias, and replaces scores of keys that are not seen."""
        keys = jnp.arange(scores.shape[-1])
        if self.start is not None:
            queries = self.start + queries
        if self.bias is not None:
            scores = scores + self.bias(queries, keys)
        if self.start is not None:
            scores = jnp.where(keys <= queries[:, None], scores, UNSEEN)
        if self.is_real is not None:
            scores = jnp.where(self.is_real[:, None, None], scores, UNSEEN)
        return scores


def attend_pairs(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    pairs: Pairs,
    *,
    scale: float,
) -> Float[Array, "batch queries heads head_dim"]:
    """Multiplies softmax of the scores, computed in float32, by the values.

    Long texts are computed for a block of queries at a time, in memory that is linear
    in the length. The backward pass computes the scores again.
    """

    def attend(queries, q):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(pairs.score(scores * scale, queries))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    num_queries, num_keys = q.shape[1], k.shape[1]
    rows = max(_ROWS, DENSE_SCORES // num_keys)
    if num_queries <= rows:
        return attend(jnp.arange(num_queries), q)
    blocks = jnp.pad(q, [(0, 0), (0, -num_queries % rows), (0, 0), (0, 0)])
    blocks = blocks.reshape(len(q), -1, rows, *q.shape[2:]).swapaxes(0, 1)
    numbers = jnp.arange(len(blocks) * rows).reshape(-1, rows)
    compute = jax.checkpoint(attend)
    out = jax.lax.map(lambda block: compute(*block), (numbers, blocks))
    return out.swapaxes(0, 1).reshape(len(q), -1, *q.shape[2:])[:, :num_queries]


class PairAttention(nnx.Module):
    """The projections of attention between two texts, which may be the same one."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
        has_key_bias: bool = True,
    ):
        hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        bias, output_bias = config.attention_bias, config.output_bias
        linear = functools.partial(
            nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.q_proj = linear(hidden, inner, use_bias=bias)
        # A bias of keys adds the same to all scores of a query, so Whisper has none.
        self.k_proj = linear(hidden, inner, use_bias=bias and has_key_bias)
        self.v_proj = linear(hidden, inner, use_bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = linear(inner, hidden, use_bias=output_bias)
        self.config = config

    def read(
        self, x: Float[Array, "batch keys hidden"]
    ) -> tuple[
        Float[Array, "batch keys heads head_dim"],
        Float[Array, "batch keys heads head_dim"],
    ]:
        """Returns the keys and values of a text."""
        return self._split(self.k_proj, x), self._split(self.v_proj, x)

    def __call__(
        self,
        x: Float[Array, "batch queries hidden"],
        keys: Float[Array, "batch keys heads head_dim"],
        values: Float[Array, "batch keys heads head_dim"],
        pairs: Pairs,
    ) -> Float[Array, "batch queries hidden"]:
        """Attends from a text to keys and values."""
        scale = self.config.attention_scale
        scale = float(self.config.head_dim**-0.5 if scale is None else scale)
        q = self._split(self.q_proj, x)
        y = attend_pairs(q, keys, values, pairs, scale=scale)
        return keep_product(self.o_proj(y.reshape(*x.shape[:2], -1)))

    def _split(self, project: Any, x: Float[Array, "batch seq hidden"]) -> Array:
        """Applies a linear layer, and splits its results into heads."""
        x = keep_product(project(x)).reshape(*x.shape[:2], -1, self.config.head_dim)
        return constrain(x, "batch", None, "heads", None)


def find_buckets(
    num_buckets: int, max_distance: int
) -> Int[np.ndarray, " {max_distance}+1"]:
    """Returns the bucket of each distance between tokens, from 0 to ``max_distance``.

    The first half of the buckets have one distance each. The others grow, and the last
    one has all distances from ``max_distance`` on.

    Example:
        >>> find_buckets(8, 16).tolist()
        [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]

    References:
        Raffel et al., Exploring the Limits of Transfer Learning with a Unified
        Text-to-Text Transformer, 2020; Mesh TensorFlow's
        ``_relative_position_bucket``.
    """
    half = num_buckets // 2
    distances = np.arange(max_distance + 1, dtype=np.float32)
    # In float32, as the models were trained: it decides where powers of 2 belong.
    steps = np.log(np.maximum(distances, half) / np.float32(half))
    steps = steps / np.float32(np.log(max_distance / half)) * np.float32(half)
    large = np.minimum(half + steps.astype(np.int32), num_buckets - 1)
    return np.where(distances < half, distances.astype(np.int32), large)


def make_bias(
    table: Float[Array, "buckets heads"], max_distance: int, *, is_causal: bool
) -> Bias:
    """Returns a function from indices to the bias of relative positions.

    Args:
        table: bias of each bucket. If texts are seen in both directions, the second
            half is for keys after the query.
        max_distance: distance from which on all are one.
        is_causal: whether queries see only the keys at or before them.
    """
    size = len(table) if is_causal else len(table) // 2
    buckets = jnp.asarray(find_buckets(size, max_distance), jnp.int32)
    table = table.astype(jnp.float32)

    def bias(queries: Indices, keys: Indices) -> Float32[Array, "heads queries keys"]:
        ahead = keys[None] - queries[:, None]
        distance = jnp.maximum(-ahead, 0) if is_causal else jnp.abs(ahead)
        index = buckets[jnp.minimum(distance, max_distance)]
        if not is_causal:
            index = jnp.where(ahead > 0, index + size, index)
        return jnp.moveaxis(table[index], -1, 0)

    return bias
