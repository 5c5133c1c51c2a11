"""CausalLM: the model, its attributes named as in Llama's checkpoints."""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxbnb.models._cache import KVCache
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._decoder import Decoder
from jaxbnb.models._generate import generate
from jaxbnb.models._heads import apply_head, copy_embedding, make_head
from jaxbnb.models._names import NamedInFiles
from jaxbnb.models.attention import soften
from jaxbnb.nnx import Remat
from jaxbnb.sharding.axis_types import on_automatic_axes


class CausalLM(NamedInFiles, nnx.Module):
    """A decoder-only model: tokens to the logits of the next token at every position.

    One class serves all families; ``config`` says how they differ. In every family, the
    dotted path of a variable is its name in Hugging Face's Llama checkpoints, except
    that the decoder layers are stacked: ``model.layers.layer.mlp.up_proj.kernel`` is
    ``(num_hidden_layers, hidden, intermediate)``. Linear layers may be replaced, e.g.
    by `jaxbnb.nnx.quantize_model`. ``Llama`` is another name for this class.

    Call it under ``jax.jit`` or ``nnx.jit``. Outside of them, every call compiles the
    loop over the layers again.

    Attributes:
        model: everything up to the last norm; ``model.model(token_ids)`` returns hidden
            states, and `logits` takes all or some of them.
        lm_head: the output head, or None if the embedding is the head.
        config: sizes and variants.

    Args:
        config: sizes and variants.
        dtype: dtype of the computation; None for ``param_dtype``. Norms, rope and
            softmax are always computed in float32, and logits are float32.
        param_dtype: dtype of the variables.
        rngs: random streams; ``params`` seeds the initializers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape
        (2, 64, 128)
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 256)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = param_dtype if dtype is None else dtype
        self.model = Decoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lm_head: nnx.Linear | None = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = make_head(
                *(config.hidden_size, config.vocab_size, dtype, param_dtype, rngs),
                use_bias=config.head_bias,
            )
        self.config = config

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        cache: None = None,
        remat: bool | Remat = False,
    ) -> Float32[Array, "batch seq vocab"]: ...

    @overload
    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        segment_ids: None = None,
        cache: KVCache,
        remat: bool | Remat = False,
    ) -> tuple[Float32[Array, "batch seq vocab"], KVCache]: ...

    @on_automatic_axes
    def __call__(
        self,
        token_ids,
        *,
        attention_mask=None,
        segment_ids=None,
        cache=None,
        remat: bool | Remat = False,
    ):
        """Computes the logits of the token that follows each token.

        Args:
            token_ids: the tokens; they continue those in ``cache``, if there is one.
            attention_mask: False for padding, which no token attends to; positions
                count only the tokens that are True. None for all True.
            segment_ids: number of the document of each token, which does not decrease
                along a row. Tokens attend to their own document only, and positions
                start from 0 in each. None for a document in each row.
            cache: keys and values of the tokens before, which are attended to as well.
            remat: recompute each layer in the backward pass rather than keep its
                intermediate values. A `jaxbnb.nnx.Remat` says which inputs to keep,
                and where.

        Returns:
            The logits and, if there is a ``cache``, the cache extended by these tokens.
            Logits at padding are meaningless.

        Raises:
            ValueError: there are more tokens than the model takes, or than the cache
                has room for; ``segment_ids`` decrease, or come with a cache. Under
                ``jax.jit``, their order is unknown and not checked.
            TypeError: ``segment_ids`` are not integers.
        """
        options = {
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "remat": remat,
        }
        if cache is None:
            return self.logits(self.model(token_ids, **options))
        hidden, cache = self.model(token_ids, cache=cache, **options)
        return self.logits(hidden), cache

    def generate(
        self,
        token_ids: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
        max_new_tokens: int,
        **options: Any,
    ) -> Int32[Array, "batch max_new_tokens"]:
        """Continues each prompt; see `jaxbnb.models.generate` for the options.

        Args:
            token_ids: prompts, padded on the left.
            max_new_tokens: number of tokens to generate.
            **options: ``temperature``, ``top_k``, ``top_p``, ``key``,
                ``eos_token_id``, ``pad_token_id``, ``attention_mask``, ``cache_dtype``.
        """
        return generate(self, token_ids, max_new_tokens, **options)

    def untie_head(self) -> None:
        """Makes the output head a copy of the embedding, if it is the embedding itself.

        The model computes the same as before, up to rounding if the embedding is
        quantised. An adapter on ``lm_head`` needs this, because the embedding must not
        change.

        Raises:
            ValueError: an adapter trains the embedding as the head, too.

        Example:
            >>> from flax import nnx
            >>> from jaxbnb.models import CausalLM, DecoderConfig
            >>> config = DecoderConfig(
            ...     vocab_size=256, hidden_size=64, intermediate_size=128,
            ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            ...     head_dim=16, tie_word_embeddings=True)
            >>> model = CausalLM(config, rngs=nnx.Rngs(0))
            >>> model.untie_head()
            >>> model.lm_head.kernel.shape, model.config.tie_word_embeddings
            ((64, 256), False)
        """
        if self.lm_head is not None:
            return
        self.lm_head = copy_embedding(self.model.embed_tokens, self.model.dtype)
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)

    @on_automatic_axes
    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float32[Array, "*batch vocab"]:
        """Applies the output head to hidden states: all, or only those a loss needs."""
        head, vocab_size = self.lm_head, self.config.vocab_size
        logits = apply_head(head, self.model.embed_tokens, hidden, vocab_size)
        return soften(logits, self.config.logit_softcap)
