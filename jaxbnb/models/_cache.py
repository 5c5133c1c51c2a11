"""KVCache: the keys and values of the tokens that a model has read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from jaxbnb.models._config import DecoderConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "mask", "length"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """What attention needs of the tokens so far, in slots allocated beforehand.

    Passing it through the layers whole, each writing its own slice, lets XLA update it
    in place: donate it to the jitted function that extends it.

    Invariants: slots from ``length`` on are zero and False; every row fills the same
    slots, rows of padding False in ``mask``.

    Attributes:
        keys: of each layer, after rope.
        values: of each layer.
        mask: which slots hold a token to attend to.
        length: how many slots are filled.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import KVCache, Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> cache = KVCache.empty(config, batch_size=1, max_length=32)
        >>> logits, cache = model(jnp.array([[1, 2, 3]]), cache=cache)
        >>> logits, cache = model(jnp.array([[4]]), cache=cache)
        >>> logits.shape, int(cache.length)
        ((1, 1, 256), 4)
    """

    keys: Float[Array, "layers batch max_length kv_heads head_dim"]
    values: Float[Array, "layers batch max_length kv_heads head_dim"]
    mask: Bool[Array, "batch max_length"]
    length: Int32[Array, ""]

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "KVCache":
        """A cache with room for ``max_length`` tokens a row.

        Raises:
            ValueError: ``max_length`` is more than the model takes.
        """
        check_length(config, max_length)
        shape = (
            config.num_hidden_layers,
            batch_size,
            max_length,
            config.num_key_value_heads,
            config.head_dim,
        )
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            mask=jnp.zeros((batch_size, max_length), jnp.bool_),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def max_length(self) -> int:
        """How many tokens a row there is room for."""
        return self.mask.shape[1]

    def append_mask(self, mask: Bool[Array, "batch seq"]) -> "KVCache":
        """The cache with the mask of the next tokens, before their keys are written.

        Raises:
            ValueError: there is no room for them. Under ``jax.jit`` the length is not
                known, and only what cannot fit an empty cache is refused.
        """
        batch, seq = mask.shape
        if batch != self.mask.shape[0]:
            raise ValueError(
                f"token_ids have {batch} rows, the KVCache {self.mask.shape[0]}"
            )
        traced = isinstance(self.length, Tracer)
        length = 0 if traced else int(self.length)
        if length + seq > self.max_length:
            raise ValueError(
                f"a KVCache of max_length {self.max_length} with {length} tokens in it "
                f"has no room for {seq} more; make a longer one with KVCache.empty"
            )
        mask = jax.lax.dynamic_update_slice(self.mask, mask, (0, self.length))
        return dataclasses.replace(self, mask=mask)

    def write(
        self,
        layer: Int32[Array, ""],
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
    ) -> "KVCache":
        """The cache with one layer's keys and values of the next tokens."""
        start = (layer, 0, self.length, 0, 0)

        def put(slots: Array, new: Array) -> Array:
            new = new[None].astype(slots.dtype)
            return jax.lax.dynamic_update_slice(slots, new, start)

        return dataclasses.replace(
            self, keys=put(self.keys, keys), values=put(self.values, values)
        )

    def read(
        self, layer: Int32[Array, ""], dtype: jax.typing.DTypeLike
    ) -> tuple[
        Float[Array, "batch max_length kv_heads head_dim"],
        Float[Array, "batch max_length kv_heads head_dim"],
    ]:
        """One layer's keys and values, all slots."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(slots, layer, keepdims=False).astype(dtype)
            for slots in (self.keys, self.values)
        )
        return keys, values

    def advance(self, seq: int) -> "KVCache":
        """The cache once every layer has written ``seq`` tokens."""
        return dataclasses.replace(self, length=self.length + seq)


def check_length(config: DecoderConfig, length: int) -> None:
    """Raises ValueError if ``length`` tokens are none, or more than the model takes."""
    if not 0 < length <= config.max_position_embeddings:
        raise ValueError(
            f"{length} tokens; this model takes 1 to {config.max_position_embeddings} "
            "(max_position_embeddings), prompt and continuation together"
        )
