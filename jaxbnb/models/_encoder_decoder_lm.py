"""EncoderDecoderLM: T5, its relatives, and Whisper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxbnb.models._encoder_decoder import EncoderDecoder
from jaxbnb.models._encoder_decoder_config import (
    EncoderDecoderConfig,
    replace_fields,
)
from jaxbnb.models._generate import generate
from jaxbnb.models._heads import apply_head, copy_embedding, make_head
from jaxbnb.models._names import NamedInFiles
from jaxbnb.nnx import Remat
from jaxbnb.sharding.axis_types import on_automatic_axes


class EncoderDecoderLM(NamedInFiles, nnx.Module):
    """An encoder-decoder: reads a text, or audio, and gives the logits of another text.

    Its parts have the names of a `CausalLM`, in two stacks:
    ``model.encoder.layers.layer.mlp.up_proj.kernel`` is ``(num_encoder_layers, hidden,
    intermediate)``, and ``model.decoder.layers.layer.cross_attn.q_proj.kernel`` belongs
    to attention from the decoder to the source. Linear layers may be replaced, e.g. by
    `jaxbnb.nnx.quantize_model` or `jaxbnb.lora.add_adapter`.

    Call it under ``jax.jit`` or ``nnx.jit``. Outside of them, every call compiles the
    loops over the layers again.

    Attributes:
        model: everything up to the last norm. ``model.model.encode`` reads a source,
            ``model.model`` gives the decoder's hidden states, and `logits` takes all or
            some of them.
        lm_head: the output head, or None if the embedding is the head.
        config: sizes and variants.

    Args:
        config: sizes and variants.
        dtype: dtype of the computation; None for ``param_dtype``. Norms and softmax are
            always computed in float32, and logits are float32.
        param_dtype: dtype of the variables.
        rngs: random streams; ``params`` seeds the initializers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import EncoderDecoderConfig, EncoderDecoderLM
        >>> config = EncoderDecoderConfig.from_huggingface(
        ...     {"model_type": "t5", "vocab_size": 256, "d_model": 64, "d_kv": 16,
        ...      "d_ff": 128, "num_layers": 2, "num_heads": 4})
        >>> model = EncoderDecoderLM(config, rngs=nnx.Rngs(0))
        >>> source, target = jnp.array([[5, 6, 7, 1]]), jnp.array([[0, 8, 9]])
        >>> model(source, target).shape
        (1, 3, 256)
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = param_dtype if dtype is None else dtype
        self.model = EncoderDecoder(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.lm_head: nnx.Linear | None = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = make_head(
                config.decoder.hidden_size, config.vocab_size, dtype, param_dtype, rngs
            )
        self.config = config

    @on_automatic_axes
    def __call__(
        self,
        inputs: Int[Array, "batch source"] | Float[Array, "batch mel_bins frames"],
        decoder_token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch source"] | None = None,
        decoder_attention_mask: Bool[Array, "batch seq"] | None = None,
        remat: bool | Remat = False,
    ) -> Float32[Array, "batch seq vocab"]:
        """Computes the logits of the token that follows each of the decoder's.

        Args:
            inputs: tokens of the source, padded on either side; or the log-mel features
                of audio that transformers' feature extractor returns.
            decoder_token_ids: tokens of the decoder. They begin with
                ``config.decoder_start_token_id``.
            attention_mask: False for padding of the source; None for no padding.
            decoder_attention_mask: False for padding among the decoder's tokens.
                Padding on the right needs none: no token before it sees it.
            remat: recompute each layer in the backward pass rather than keep its
                intermediate values. A `jaxbnb.nnx.Remat` says which inputs to keep,
                and where.

        Raises:
            ValueError: a mask has another shape than its tokens, features have another
                than the model takes, or there are more tokens than it takes.
        """
        source = self.model.encode(inputs, attention_mask=attention_mask, remat=remat)
        hidden = self.model(
            decoder_token_ids,
            source=source,
            attention_mask=decoder_attention_mask,
            remat=remat,
        )
        return self.logits(hidden)

    def generate(
        self,
        inputs: Int[Array | np.ndarray, "batch source"]
        | Float[Array | np.ndarray, "batch mel_bins frames"],
        max_new_tokens: int,
        **options: Any,
    ) -> Int32[Array, "batch max_new_tokens"]:
        """Writes a text for each source; see `jaxbnb.models.generate` for the options.

        Args:
            inputs: tokens of sources, padded on either side; or log-mel features.
            max_new_tokens: number of tokens to generate.
            **options: ``temperature``, ``top_k``, ``top_p``, ``key``,
                ``eos_token_id``, ``pad_token_id``, ``attention_mask``, ``cache_dtype``,
                ``decoder_token_ids``.
        """
        return generate(self, inputs, max_new_tokens, **options)

    def shift_right(self, labels: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
        """Returns the decoder's input for targets: each token's predecessor.

        Rows begin with ``config.decoder_start_token_id``. Labels below 0, which
        transformers writes for tokens that are not targets, become padding.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from jaxbnb.models import EncoderDecoderConfig, EncoderDecoderLM
            >>> config = EncoderDecoderConfig.from_huggingface(
            ...     {"model_type": "t5", "vocab_size": 256, "d_model": 64, "d_kv": 16,
            ...      "d_ff": 128, "num_layers": 2, "num_heads": 4})
            >>> model = nnx.eval_shape(
            ...     lambda: EncoderDecoderLM(config, rngs=nnx.Rngs(0)))
            >>> model.shift_right(jnp.array([[8, 9, 1, -100]])).tolist()
            [[0, 8, 9, 1]]
        """
        before = jnp.roll(labels, 1, axis=1)
        before = before.at[:, 0].set(self.config.decoder_start_token_id)
        return jnp.where(before < 0, self.config.pad_token_id, before)

    def untie_head(self) -> None:
        """Makes the output head a copy of the embedding, if it is the embedding itself.

        The model computes the same as before, up to rounding if the embedding is
        quantised. An adapter on ``lm_head`` needs this, because the embedding must not
        change.

        Raises:
            ValueError: an adapter trains the embedding as the head, too.
        """
        if self.lm_head is not None:
            return
        self.lm_head = copy_embedding(self.model.embed_tokens, self.model.dtype)
        self.config = replace_fields(self.config, tie_word_embeddings=False)

    @on_automatic_axes
    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float32[Array, "*batch vocab"]:
        """Applies the output head to hidden states: all, or only those a loss needs."""
        if self.config.scales_head:
            scale = self.config.decoder.hidden_size**-0.5
            hidden = hidden * jnp.asarray(scale, hidden.dtype)
        head, vocab_size = self.lm_head, self.config.vocab_size
        return apply_head(head, self.model.embed_tokens, hidden, vocab_size)
