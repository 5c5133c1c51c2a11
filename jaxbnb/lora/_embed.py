"""LoraEmbed: a frozen embedding and its adapters."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbnb.lora._base import get_param
from jaxbnb.lora._layer import LoraLayer
from jaxbnb.lora._tokens import TrainedTokens


class LoraEmbed(LoraLayer):
    r"""A frozen embedding with named adapters, which are trainable updates of its rows.

    .. math:: y_i = E_i + s \, A_i B, \qquad s = \alpha / r

    With ``trainable_token_indices``, some rows are replaced instead.

    Attributes:
        base: the adapted layer: ``nnx.Embed`` or `jaxbnb.nnx.QuantEmbed`.
        adapters: ``nnx.Dict`` of `LoraAdapter` or `TrainedTokens` by name.
        active: names of the adapters that are applied; see `set_adapter`.
        adapter_index: the active adapter that each row uses, see `adapter_rows`; None
            if every row uses all of them.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Dict(embed_tokens=nnx.Embed(64, 8, rngs=nnx.Rngs(0)),
        ...                  up=nnx.Linear(8, 16, rngs=nnx.Rngs(1)))
        >>> config = jaxbnb.lora.LoraConfig(trainable_token_indices=[3, 9])
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(2))
        >>> model["embed_tokens"](jnp.array([[3, 4]])).shape
        (1, 2, 8)
        >>> model["embed_tokens"].adapters["default"].tokens.shape
        (2, 8)

    References:
        ``lora.Embedding`` and ``TrainableTokensLayer`` of PEFT.
    """

    @property
    def embedding(self) -> nnx.Variable[Any]:
        """The rows of ``base``."""
        return get_param(self.base)

    @property
    def is_head(self) -> bool:
        """Whether an adapter replaces rows, which a tied head follows."""
        return any(isinstance(x, TrainedTokens) for x in self.adapters.values())

    def __call__(
        self, inputs: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch features"]:
        """Looks up rows.

        Args:
            inputs: ids of the rows.
            out_sharding: None, as Flax's modules pass it.

        Raises:
            NotImplementedError: ``out_sharding`` is not None.
        """
        if out_sharding is not None:
            raise NotImplementedError(
                "an embedding with adapters does not take an out_sharding, got "
                f"{out_sharding}; use a mesh of automatic axes"
            )
        y = self.base(inputs)
        result = y
        for name in self._chosen():
            new = result + self.adapters[name].look_up(inputs, y, self.base)
            result = self._keep_rows(name, new, result)
        return result

    def attend(
        self, query: Float[Array, "*batch features"], out_sharding: Any = None
    ) -> Float[Array, "*batch num_embeddings"]:
        """Multiplies each query by every row, e.g. for the logits of a tied head.

        Replaced rows are those of the head too. Factors change only what is looked up,
        as in PEFT.

        Args:
            query: queries, with any number of axes.
            out_sharding: sharding of the result of ``base.attend``.
        """
        return self.as_head(query, lambda base: base.attend(query, out_sharding))

    def as_head(
        self, hidden: Float[Array, "*batch hidden"], multiply: Callable[[Any], Array]
    ) -> Float[Array, "*batch vocab"]:
        """Computes the logits of a tied head, which follows the replaced rows.

        Args:
            hidden: hidden states.
            multiply: function that multiplies them by the rows of an embedding.
        """
        logits = multiply(self.base)
        for name in self._chosen():
            adapter = self.adapters[name]
            if isinstance(adapter, TrainedTokens):
                new = adapter.replace_logits(hidden, logits)
                logits = self._keep_rows(name, new, logits)
        return logits
