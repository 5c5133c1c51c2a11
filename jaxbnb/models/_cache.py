"""KVCache: keys and values of the tokens that a model has read."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from jaxbnb.core import QuantizedArray, quantize
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._rope import depends_on_length

# Number of tokens that a model reads at once. Weights are decoded once for each part,
# so a part must have enough tokens to pay for that.
PART: Final = 1024
_Result = TypeVar("_Result")
# int8 slots hold an absmax for every 64 features of a head, for each token.
_Slots: TypeAlias = (
    Float[Array, "layers batch max_length kv_heads head_dim"] | QuantizedArray
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "mask", "length", "near_keys", "near_values"),
    meta_fields=("near_layers", "part"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens so far, in slots that are allocated beforehand.

    The entire cache passes through the layers, and each writes its own slice. So XLA
    can update it in place: donate it to the jitted function that extends it.

    A layer with a sliding window keeps only the tokens that it may still see. Token
    ``t`` is in slot ``t % size``.

    Invariants: slots from ``length`` on are zero, and False in ``mask``. All rows fill
    the same slots; those that hold padding are False in ``mask``.

    Attributes:
        keys: keys of each layer that keeps all tokens, after rope; an array, or a
            `QuantizedArray` for int8.
        values: values of these layers.
        mask: whether each token is one to attend to.
        length: number of tokens so far.
        near_keys: keys of the layers that keep a window; None if there are none.
        near_values: values of these layers.
        near_layers: numbers of these layers.
        part: number of tokens that a model reads at once. It reads a longer input in
            parts. None if it must read all at once, because its rope depends on the
            length.

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

    keys: _Slots
    values: _Slots
    mask: Bool[Array, "batch max_length"]
    length: Int32[Array, ""]
    near_keys: _Slots | None = None
    near_values: _Slots | None = None
    near_layers: tuple[int, ...] = ()
    part: int | None = None

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        part: int = PART,
    ) -> "KVCache":
        """Makes a cache with room for ``max_length`` tokens in each row.

        Args:
            config: config of the model that will fill it.
            batch_size: number of rows.
            max_length: number of tokens per row.
            dtype: a floating dtype, or int8, which takes about a quarter of float32's
                bytes. In int8, an element is off by at most 1/254 of the largest of the
                64 that share an absmax.
            part: number of tokens that a model reads at once, if its rope allows. A
                layer with a sliding window keeps as many tokens besides the window.

        Raises:
            ValueError: ``max_length`` is more than the model takes, or ``part`` is
                below 1.
            TypeError: ``dtype`` is neither floating nor int8.

        Example:
            >>> from jaxbnb.models import KVCache, LlamaConfig
            >>> config = LlamaConfig(
            ...     vocab_size=256, hidden_size=64, intermediate_size=128,
            ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            ...     head_dim=64)
            >>> KVCache.empty(config, 1, 32, dtype="int8").keys
            QuantizedArray(int8, shape=(2, 1, 32, 2, 64), dtype=float32, axis=-1,
                           block_size=64, double_quant=False, 8.5 KiB, 8.50 bits/param)
        """
        check_length(config, max_length)
        if part < 1:
            raise ValueError(f"part must be at least 1, got {part}")
        is_whole = depends_on_length(config.rope_scaling)
        near = find_windowed_layers(config)
        size = max_length if config.sliding_window is None else config.sliding_window
        size += part
        if is_whole or size >= max_length:
            near = ()

        def make(num_layers: int, num_slots: int) -> _Slots:
            heads = config.num_key_value_heads, config.head_dim
            shape = num_layers, batch_size, num_slots, *heads
            return _empty_slots(shape, jnp.dtype(dtype))

        num_full = config.num_hidden_layers - len(near)
        return cls(
            keys=make(num_full, max_length),
            values=make(num_full, max_length),
            mask=jnp.zeros((batch_size, max_length), jnp.bool_),
            length=jnp.zeros((), jnp.int32),
            near_keys=make(len(near), size) if near else None,
            near_values=make(len(near), size) if near else None,
            near_layers=near,
            part=None if is_whole else part,
        )

    @property
    def max_length(self) -> int:
        """The number of tokens per row that there is room for."""
        return self.mask.shape[1]

    @property
    def near_size(self) -> int:
        """The number of tokens per row that layers with a window keep."""
        return jax.tree.leaves(self.near_keys)[0].shape[2]

    @property
    def longest(self) -> Int32[Array, ""]:
        """The number of tokens in the longest row."""
        return jnp.max(jnp.sum(self.mask, axis=1))

    def check_room(self, batch: int, seq: int) -> None:
        """Raises ValueError if tokens of this shape do not fit behind those so far.

        Under ``jax.jit`` the length is unknown, so only tokens that would not fit an
        empty cache are refused.
        """
        if batch != self.mask.shape[0]:
            raise ValueError(
                f"token_ids have {batch} rows, the KVCache {self.mask.shape[0]}"
            )
        is_traced = isinstance(self.length, Tracer)
        length = 0 if is_traced else int(self.length)
        if length + seq > self.max_length:
            raise ValueError(
                f"a KVCache of max_length {self.max_length} with {length} tokens in it "
                f"does not have room for {seq} more; make a longer one with "
                "KVCache.empty"
            )

    def append_mask(self, mask: Bool[Array, "batch seq"]) -> "KVCache":
        """Adds the mask of the next tokens, before their keys are written."""
        mask = jax.lax.dynamic_update_slice(self.mask, mask, (0, self.length))
        return dataclasses.replace(self, mask=mask)

    def each_kind(
        self,
        layer: Int32[Array, ""],
        function: Callable[[bool, Int32[Array, ""]], _Result],
    ) -> _Result:
        """Calls ``function(is_near, index)`` for a layer; its number may be traced.

        Args:
            layer: number of the layer.
            function: gets whether the layer keeps a window, and its index among those
                that do or do not.
        """
        if not self.near_layers:
            return function(False, layer)
        num_layers = len(self.near_layers) + jax.tree.leaves(self.keys)[0].shape[0]
        is_near = np.isin(np.arange(num_layers), self.near_layers)
        if is_near.all():
            return function(True, layer)
        index = np.where(is_near, np.cumsum(is_near), np.cumsum(~is_near)) - 1
        return jax.lax.cond(
            jnp.asarray(is_near)[layer],
            functools.partial(function, True),
            functools.partial(function, False),
            jnp.asarray(index, jnp.int32)[layer],
        )

    def write(
        self,
        is_near: bool,
        index: Int32[Array, ""],
        keys: Float[Array, "batch seq kv_heads head_dim"],
        values: Float[Array, "batch seq kv_heads head_dim"],
    ) -> "KVCache":
        """Writes one layer's keys and values of the next tokens; see `each_kind`."""
        seq = keys.shape[1]

        def put(slots: _Slots | None, new: Array) -> _Slots:
            assert slots is not None
            encoded = new[None].astype(slots.dtype)
            if isinstance(slots, QuantizedArray):
                encoded = quantize(encoded, slots.quant_type)
            return jax.tree.map(put_near if is_near else put_all, slots, encoded)

        def put_all(old: Array, part: Array) -> Array:
            start = (index, 0, self.length, 0, 0)
            return jax.lax.dynamic_update_slice(old, part, start)

        def put_near(old: Array, part: Array) -> Array:
            where = (self.length + jnp.arange(seq)) % old.shape[2]
            return old.at[index, :, where].set(
                part[0].swapaxes(0, 1), unique_indices=True
            )

        if is_near:
            near = put(self.near_keys, keys), put(self.near_values, values)
            return dataclasses.replace(self, near_keys=near[0], near_values=near[1])
        return dataclasses.replace(
            self, keys=put(self.keys, keys), values=put(self.values, values)
        )

    def read(
        self,
        is_near: bool,
        index: Int32[Array, ""],
        dtype: jax.typing.DTypeLike,
        start: Int32[Array, ""],
        size: int,
    ) -> tuple[
        Float[Array, "batch {size} kv_heads head_dim"],
        Float[Array, "batch {size} kv_heads head_dim"],
    ]:
        """Reads one layer's keys and values in ``size`` slots; see `each_kind`."""
        first = (index, 0, start, 0, 0)

        def get(slots: _Slots | None) -> Array:
            part: Any = jax.tree.map(
                lambda x: jax.lax.dynamic_slice(
                    x, first, (1, x.shape[1], size, *x.shape[3:])
                )[0],
                slots,
            )
            if isinstance(part, QuantizedArray):
                return part.dequantize(dtype)
            return part.astype(dtype)

        if is_near:
            return get(self.near_keys), get(self.near_values)
        return get(self.keys), get(self.values)

    def advance(self, seq: int) -> "KVCache":
        """Marks ``seq`` more slots as filled, once every layer has written them."""
        return dataclasses.replace(self, length=self.length + seq)

    def cut(self, length: Int32[Array, ""]) -> "KVCache":
        """Empties all slots but the first ``length``; no layer may keep a window."""
        is_kept = jnp.arange(self.max_length) < length

        def cut(leaf: Array) -> Array:
            return jnp.where(is_kept[:, None, None], leaf, jnp.zeros_like(leaf))

        return KVCache(
            keys=jax.tree.map(cut, self.keys),
            values=jax.tree.map(cut, self.values),
            mask=self.mask & is_kept,
            length=length,
        )


def _empty_slots(shape: tuple[int, ...], dtype: np.dtype) -> _Slots:
    if dtype == jnp.int8:
        abstract = jax.eval_shape(
            lambda: quantize(jnp.zeros(shape, jnp.float32), dtype.name)
        )
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"a KVCache must have a floating dtype or int8, e.g. bfloat16; got {dtype}"
        )
    return jnp.zeros(shape, dtype)


def check_length(config: DecoderConfig, length: int) -> None:
    """Raises ValueError if ``length`` is 0, or more tokens than the model takes."""
    if not 0 < length <= config.max_position_embeddings:
        raise ValueError(
            f"prompt and continuation have {length} tokens; this model takes 1 to "
            f"{config.max_position_embeddings} (max_position_embeddings)"
        )


def find_windowed_layers(config: DecoderConfig) -> tuple[int, ...]:
    """Returns the numbers of the layers with a sliding window."""
    if config.sliding_window is None:
        return ()
    full = {*config.full_attention_layers}
    return tuple(i for i in range(config.num_hidden_layers) if i not in full)
