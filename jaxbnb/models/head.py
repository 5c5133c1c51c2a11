"""Output heads that compute the logits of a piece of the vocabulary at a time."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxbnb.core import QuantizedArray
from jaxbnb.core.flax_layers import refuse_custom_product
from jaxbnb.lora import LoraLinear
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.nnx import QuantEmbed, QuantLinear
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax

# Axis of the vocabulary in each variable that has one.
_AXES: Final = {
    "kernel": -1,
    "bias": -1,
    "lora_b": -1,
    "magnitude": -1,
    "embedding": 0,
}
# Variables without one. A head with any others is not cut.
_WHOLE: Final = ("lora_a", "scale", "key", "count")
# A piece takes as much from each of 16 parts of the vocabulary. So each of up to 16
# devices that divide it cuts its own share, and sends nothing.
_PARTS: Final = 16


@dataclasses.dataclass(frozen=True, eq=False)
class CutHead:
    """The output head of a model, and how to cut it into pieces of the vocabulary.

    All pieces have the same size. The last one begins early, so that it ends where the
    vocabulary does.

    Attributes:
        axes: axis of the vocabulary in each array of the head; None for an array
            without one.
        is_trainable: whether each array is a floating-point variable, and not part of a
            quantised one.
        vocab_size: number of tokens that the head gives logits for.
        num_pieces: number of pieces.
    """

    axes: tuple[int | None, ...]
    is_trainable: tuple[bool, ...]
    vocab_size: int
    num_pieces: int
    _merge: Callable[[nnx.State], CausalLM]
    _treedef: Any

    def take(self, arrays: Sequence[Array], number: Int32[Array, ""]) -> list[Array]:
        """Takes a piece of each array of the head."""
        return [
            x if axis is None else self._take(x, axis, number)
            for x, axis in zip(arrays, self.axes, strict=True)
        ]

    def add(
        self, totals: Sequence[Any], piece: Sequence[Any], number: Int32[Array, ""]
    ) -> list[Any]:
        """Adds a piece, e.g. of a gradient, where `take` would take it from.

        Args:
            totals: one array for each array of the head, or None to leave it out.
            piece: arrays of the piece, or None likewise.
            number: number of the piece.
        """
        return [
            None if x is None else self._add(x, axis, part, number)
            for x, axis, part in zip(totals, self.axes, piece, strict=True)
        ]

    def columns(self, tokens: Int32[Array, " rows"]) -> Int32[Array, " pieces rows"]:
        """Returns where each piece has each token's logit; -1 where it does not."""
        numbers = jnp.arange(self.num_pieces)[:, None]
        part, within = jnp.divmod(tokens, self.vocab_size // self._num_parts)
        column = within - self._start(numbers)
        is_here = (within >= numbers * self._step) & (column < self._step)
        is_here &= (tokens >= 0) & (tokens < self.vocab_size)
        return jnp.where(is_here, part * self._step + column, -1)

    def is_new(self, number: Int32[Array, ""]) -> Bool[Array, " piece"] | None:
        """Returns whether no earlier piece has a column; None if pieces are apart."""
        if self.vocab_size == self._num_parts * self._step * self.num_pieces:
            return None
        within = self._start(number) + jnp.arange(self._step)
        return jnp.tile(within >= number * self._step, self._num_parts)

    def logits(
        self,
        piece: Sequence[Array],
        hidden: Float[Array, "rows hidden"],
        renew: Callable[[nnx.State], nnx.State],
    ) -> Float32[Array, "rows piece"]:
        """Computes the logits of a piece like `CausalLM.logits`.

        Args:
            piece: arrays from `take`.
            hidden: hidden states.
            renew: change of the head's variables before, e.g. of its random streams.
        """
        state = jax.tree.unflatten(self._treedef, piece)
        return self._merge(renew(state)).logits(hidden)

    @property
    def _num_parts(self) -> int:
        return math.gcd(self.vocab_size, _PARTS)

    @property
    def _step(self) -> int:
        """The number of tokens that a piece takes from a part."""
        return -(-self.vocab_size // (self._num_parts * self.num_pieces))

    def _start(self, number: Int32[Array, ""]) -> Int32[Array, ""]:
        last = self.vocab_size // self._num_parts - self._step
        return jnp.minimum(number * self._step, last)

    def _in_parts(self, x: Array, axis: int) -> Array:
        return x.reshape(*x.shape[:axis], self._num_parts, -1, *x.shape[axis + 1 :])

    def _take(self, x: Array, axis: int, number: Int32[Array, ""]) -> Array:
        parts = self._in_parts(x, axis)
        start = self._start(number)
        piece = lax.dynamic_slice_in_dim(parts, start, self._step, axis + 1)
        return piece.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def _add(
        self, x: Array, axis: int | None, piece: Array, number: Int32[Array, ""]
    ) -> Array:
        if axis is None:
            return x + piece
        parts, piece = (self._in_parts(y, axis) for y in (x, piece))
        start = self._start(number)
        piece += lax.dynamic_slice_in_dim(parts, start, self._step, axis + 1)
        parts = lax.dynamic_update_slice_in_dim(parts, piece, start, axis + 1)
        return parts.reshape(x.shape)


def cut_head(model: Any, piece_size: int) -> tuple[CutHead, list[Array]] | None:
    """Cuts a model's head into pieces of about ``piece_size`` tokens, if it can be cut.

    It can if the model is a `CausalLM` and its head is a linear layer or the embedding,
    quantised or not, with LoRA adapters or without. It cannot if the kernel is
    quantised in blocks along the vocabulary, or as ``nvfp4``, which has one number for
    the matrix, if the layer has a custom product or rows for some tokens, or if each
    row has an adapter of its own.

    Args:
        model: a language model.
        piece_size: largest number of tokens in a piece, up to rounding.

    Returns:
        The head and its arrays; None if only all logits can be computed at once.

    Example:
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> head, arrays = cut_head(CausalLM(config, rngs=nnx.Rngs(0)), 64)
        >>> head.num_pieces, [x.shape for x in head.take(arrays, 0)]
        (4, [(64, 64)])
    """
    if not isinstance(model, CausalLM):
        return None
    if "logits" in vars(model) or type(model).logits is not CausalLM.logits:
        return None
    is_tied = model.lm_head is None
    found = _find_weight(model.model.embed_tokens if is_tied else model.lm_head)
    if found is None:
        return None
    weight, axis = found
    if isinstance(weight, QuantizedArray) and (
        weight.axis + weight.ndim == axis or weight.quant_type == "nvfp4"
    ):
        return None
    vocab_size = weight.shape[axis]
    path = ("model", "embed_tokens") if is_tied else ("lm_head",)
    graphdef, state, rest = nnx.split(model, lambda p, _: p[: len(path)] == path, ...)
    # The logits do not depend on other variables: to read one would be an error.
    rest = jax.tree.map(_make_abstract, rest)
    state = jax.tree.map(_without_nesting, state, is_leaf=_is_variable)
    axes, is_trainable = [], []
    for path, variable in jax.tree.leaves_with_path(state, is_leaf=_is_variable):
        # Adapters' own biases are named after their adapters.
        names: list[Any] = [entry.key for entry in path]
        name = "bias" if names[1:2] == ["biases"] else names[-1]
        if name not in _AXES and name not in _WHOLE:
            return None
        is_quantized = isinstance(variable.get_raw_value(), QuantizedArray)
        for x in jax.tree.leaves(variable):
            # Codes and absmax have a row for each token.
            along = 0 if is_quantized else _AXES.get(name)
            axes.append(along if along is None else along % x.ndim)
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            is_trainable.append(is_float and not is_quantized)
    arrays, treedef = jax.tree.flatten(state)
    head = CutHead(
        tuple(axes),
        tuple(is_trainable),
        vocab_size,
        -(-vocab_size // piece_size),
        lambda state: nnx.merge(graphdef, state, rest),
        treedef,
    )
    return head, arrays


def _find_weight(layer: Any) -> tuple[Any, int] | None:
    """Returns a layer's weight, and the axis of the vocabulary; None if it has none."""
    is_adapted = type(layer) is LoraLinear and layer.adapter_index is None
    base: Any = layer.base if is_adapted else layer
    if type(base) in (nnx.Embed, QuantEmbed):
        return base.embedding.get_raw_value(), 0
    if type(base) in (nnx.Linear, QuantLinear):
        try:
            refuse_custom_product(base)
        except NotImplementedError:
            return None
        return base.kernel.get_raw_value(), 1
    return None


def _make_abstract(x: Any) -> Any:
    is_array = isinstance(x, jax.Array)
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array else x


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _without_nesting(variable: Any) -> Any:
    """Decodes nested absmax, because their blocks run across rows."""
    q = variable.get_raw_value()
    if not isinstance(q, QuantizedArray) or q.nested_absmax is None or q.offset is None:
        return variable
    absmax = dequantize_absmax(q.absmax, q.nested_absmax, q.offset)
    q = dataclasses.replace(q, absmax=absmax, nested_absmax=None, offset=None)
    return variable.replace(q)
