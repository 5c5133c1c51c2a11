"""Sight: which keys each query sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "is_real", "window", "segment_ids", "bias"),
    meta_fields=("num_keys", "is_ring"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """Which keys each query sees: those at or before it, as far as the rest allows.

    Also how well it sees them: a bias of the scores.

    Attributes:
        num_keys: number of keys.
        start: index of the first query among the keys.
        is_real: False for keys that no query sees, such as padding; None if all are
            real.
        window: number of keys that a query sees, including its own; an array if layers
            differ, None for all.
        segment_ids: number of the document of each key; queries see only keys of their
            own. None for a single document.
        bias: what the scores of a head get for each key, after they are scaled; None
            for nothing. A ring of keys cannot have it.
        is_ring: whether key ``t`` is in slot ``t % num_keys``, so that later keys
            replace earlier ones. Otherwise a key's index is its slot.
    """

    num_keys: int
    start: Int32[Array, ""] | int = 0
    is_real: Bool[Array, "batch keys"] | None = None
    window: Int32[Array, ""] | int | None = None
    segment_ids: Int32[Array, "batch keys"] | None = None
    bias: Float32[Array, "#batch heads keys"] | None = None
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

    def add_bias(
        self,
        scores: Float32[Array, "batch kv_heads group queries keys"],
        keys: Int[Array, " keys"],
    ) -> Float32[Array, "batch kv_heads group queries keys"]:
        """Adds the bias of these keys, which are consecutive slots."""
        if self.bias is None:
            return scores
        bias = jax.lax.dynamic_slice_in_dim(self.bias, keys[0], keys.shape[0], axis=2)
        _, kv_heads, group, _, size = scores.shape
        return scores + bias.reshape(-1, kv_heads, group, 1, size)

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
