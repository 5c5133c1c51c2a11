"""EncoderModel: BERT, RoBERTa and ViT, with a head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._encoder_config import EncoderConfig
from jaxbnb.models._encoder_decoder import EncoderLayer, run_encoder
from jaxbnb.models._heads import apply_head, embed_tokens
from jaxbnb.models._layer import MLP, make_norm, normalize
from jaxbnb.models._names import NamedInFiles
from jaxbnb.models._pairs import PairAttention, Pairs
from jaxbnb.nnx import LayerStack, Remat
from jaxbnb.sharding.activations import constrain, gathered
from jaxbnb.sharding.axis_types import check_axes, on_automatic_axes


class PostNormLayer(nnx.Module):
    """Self-attention in both directions and an MLP, each followed by a norm."""

    def __init__(self, config: DecoderConfig, **options: Any):
        norm = functools.partial(
            make_norm, config, options["param_dtype"], options["rngs"]
        )
        self.self_attn = PairAttention(config, **options)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, **options)
        self.post_feedforward_layernorm = norm()

    def __call__(
        self, x: Float[Array, "batch seq hidden"], pairs: Pairs
    ) -> Float[Array, "batch seq hidden"]:
        y = self.self_attn(x, *self.self_attn.read(x), pairs)
        x = normalize(self.post_attention_layernorm, x + y)
        return normalize(self.post_feedforward_layernorm, x + self.mlp(x))


class TextEncoder(nnx.Module):
    """Tokens to hidden states."""

    def __init__(self, config: EncoderConfig, **options: Any):
        layer = config.layer
        embed = functools.partial(nnx.Embed, features=layer.hidden_size, **options)
        self.embed_tokens = embed(layer.vocab_size)
        self.embed_positions = embed(
            layer.max_position_embeddings + layer.position_offset
        )
        self.embed_types = embed(config.num_token_types)
        self.embed_norm = make_norm(layer, options["param_dtype"], options["rngs"])
        self.layers = _make_layers(config, **options)
        self.config = config
        self.dtype = options["dtype"]

    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None,
        token_type_ids: Int[Array, "batch seq"] | None,
        remat: bool | Remat,
    ) -> Float[Array, "batch seq hidden"]:
        shape, most = token_ids.shape, self.config.layer.max_position_embeddings
        for name, array in (
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
        ):
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{name} must have the shape of the tokens, {shape}; got "
                    f"{array.shape}"
                )
        if not 0 < shape[1] <= most:
            raise ValueError(
                f"there are {shape[1]} tokens; this model takes 1 to {most} "
                "(max_position_embeddings)"
            )
        is_real = None if attention_mask is None else attention_mask.astype(jnp.bool_)
        offset = self.config.layer.position_offset
        positions = jnp.arange(shape[1])[None] + offset
        if is_real is not None and not self.config.counts_padding:
            # Padding has the position before the first.
            count = jnp.cumsum(is_real.astype(jnp.int32), axis=1)
            positions = jnp.where(is_real, count, 0) + offset - 1
        types = jnp.zeros((1, 1), jnp.int32)
        types = types if token_type_ids is None else token_type_ids
        x = embed_tokens(self.embed_tokens, token_ids) + self.embed_types(types)
        x = normalize(self.embed_norm, x + self.embed_positions(positions))
        x = run_encoder(self.layers, x, Pairs(is_real), remat)
        return constrain(x, "batch", None, None)


class ImageEncoder(nnx.Module):
    """Pixels to hidden states of patches, after those of one or two more tokens."""

    def __init__(self, config: EncoderConfig, **options: Any):
        assert config.patch_size is not None
        hidden = config.layer.hidden_size
        tall, wide = config.patch_size
        # Width first, so that the kernel is the file's with all axes reversed.
        self.patches = nnx.Conv(
            config.num_channels,
            hidden,
            kernel_size=(wide, tall),
            strides=(wide, tall),
            padding="VALID",
            **options,
        )
        dtype = options["param_dtype"]
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden), dtype))
        if config.num_extra_tokens == 2:
            self.distillation_token = nnx.Param(jnp.zeros((1, 1, hidden), dtype))
        positions = config.layer.max_position_embeddings
        self.position_embeddings = nnx.Param(jnp.zeros((1, positions, hidden), dtype))
        self.layers = _make_layers(config, **options)
        self.norm = make_norm(config.layer, dtype, options["rngs"])
        self.config = config
        self.dtype = options["dtype"]

    def __call__(
        self,
        pixels: Float[Array, "batch channels height width"],
        *,
        remat: bool | Remat,
    ) -> Float[Array, "batch seq hidden"]:
        config = self.config
        want = (config.num_channels, *(config.image_size or ()))
        if pixels.ndim != 4 or pixels.shape[1:] != want:
            raise ValueError(
                f"images must have the shape (batch, channels, height, width), with "
                f"{want} after the first; got {pixels.shape}"
            )
        patches = gathered(self.patches)
        x = patches(pixels.transpose(0, 3, 2, 1).astype(self.dtype))
        x = x.swapaxes(1, 2).reshape(len(pixels), -1, config.layer.hidden_size)
        extra = [self.cls_token[...]]
        if config.num_extra_tokens == 2:
            extra.append(self.distillation_token[...])
        extra = [jnp.broadcast_to(y, (len(x), 1, x.shape[-1])) for y in extra]
        x = jnp.concatenate([*(y.astype(x.dtype) for y in extra), x], axis=1)
        x = x + self.position_embeddings[...].astype(x.dtype)
        x = run_encoder(self.layers, x, Pairs(), remat)
        return constrain(normalize(self.norm, x), "batch", None, None)


class ClassHead(nnx.Module):
    """The first token's hidden state to logits of classes."""

    def __init__(self, config: EncoderConfig, **options: Any):
        hidden = config.layer.hidden_size
        if config.has_dense:
            self.dense = nnx.Linear(hidden, hidden, **options)
        self.out_proj = nnx.Linear(hidden, config.num_labels, **options)
        self.has_dense = config.has_dense

    def __call__(
        self, hidden: Float[Array, "batch seq hidden"], embed: Any
    ) -> Float32[Array, "batch labels"]:
        del embed
        x = hidden[:, 0]
        if self.has_dense:
            x = jnp.tanh(self.dense(x))
        return self.out_proj(x).astype(jnp.float32)


class TokenHead(nnx.Module):
    """Each token's hidden state to logits of the vocabulary."""

    def __init__(self, config: EncoderConfig, **options: Any):
        layer = config.layer
        self.dense = nnx.Linear(layer.hidden_size, layer.hidden_size, **options)
        self.norm = make_norm(layer, options["param_dtype"], options["rngs"])
        self.bias = nnx.Param(jnp.zeros(layer.vocab_size, options["param_dtype"]))

    def __call__(
        self, hidden: Float[Array, "batch seq hidden"], embed: Any
    ) -> Float32[Array, "batch seq vocab"]:
        x = jax.nn.gelu(self.dense(hidden), approximate=False)
        x = normalize(self.norm, x)
        vocab_size = self.bias.shape[0]
        logits = apply_head(None, embed, x, vocab_size)
        return logits + self.bias[...].astype(jnp.float32)


class EncoderModel(NamedInFiles, nnx.Module):
    """An encoder with a head: a text or an image to logits.

    Layers are stacked and named as in a `CausalLM`:
    ``model.layers.layer.self_attn.q_proj.kernel`` is ``(num_hidden_layers, hidden,
    hidden)``. Linear layers may be replaced, e.g. by `jaxbnb.nnx.quantize_model` or
    `jaxbnb.lora.add_adapter`. Call it under ``jax.jit`` or ``nnx.jit``.

    Attributes:
        model: everything before the head; gives the hidden states.
        head: the head: ``head.out_proj`` gives classes; a head of tokens ends with the
            embedding, and ``head.bias``.
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
        >>> from jaxbnb.models import EncoderConfig, EncoderModel
        >>> config = EncoderConfig.from_huggingface(
        ...     {"model_type": "bert", "vocab_size": 64, "hidden_size": 32,
        ...      "intermediate_size": 64, "num_hidden_layers": 2,
        ...      "num_attention_heads": 2, "max_position_embeddings": 16,
        ...      "architectures": ["BertForSequenceClassification"]})
        >>> model = EncoderModel(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 2)
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = param_dtype if dtype is None else dtype
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        body = ImageEncoder if config.num_channels else TextEncoder
        self.model: Any = body(config, **options)
        head = ClassHead if config.head == "classes" else TokenHead
        self.head: Any = head(config, **options)
        self.config = config

    @on_automatic_axes
    def __call__(
        self,
        inputs: Int[Array, "batch seq"] | Float[Array, "batch channels height width"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        remat: bool | Remat = False,
    ) -> Float32[Array, "batch labels"] | Float32[Array, "batch seq vocab"]:
        """Computes the logits of classes, or those of the vocabulary at each token.

        Args:
            inputs: tokens, padded on either side; or the pixels that transformers'
                image processors return, with the channels first.
            attention_mask: False for padding of tokens; None for no padding.
            token_type_ids: kind of each token, such as 0 for the first text and 1 for
                the second; None for zeros.
            remat: recompute each layer in the backward pass rather than keep its
                intermediate values.

        Raises:
            ValueError: shapes do not fit the model, or tokens' options are given for
                images.
        """
        check_axes(self)
        if not self.config.num_channels:
            hidden = self.model(
                inputs,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                remat=remat,
            )
            return self.head(hidden, self.model.embed_tokens)
        if attention_mask is not None or token_type_ids is not None:
            raise ValueError(
                "attention_mask and token_type_ids are for tokens, and this model "
                "takes images"
            )
        return self.head(self.model(inputs, remat=remat), None)

    def replace_head(self, num_labels: int, *, rngs: nnx.Rngs) -> None:
        """Gives the model a new, random head of classes, in place.

        Args:
            num_labels: number of classes.
            rngs: random streams; ``params`` seeds the initializers.

        Raises:
            ValueError: ``num_labels`` is not a positive int.

        Example:
            >>> from flax import nnx
            >>> from jaxbnb.models import EncoderConfig, EncoderModel
            >>> config = EncoderConfig.from_huggingface(
            ...     {"model_type": "bert", "vocab_size": 64, "hidden_size": 32,
            ...      "intermediate_size": 64, "num_hidden_layers": 2,
            ...      "num_attention_heads": 2, "max_position_embeddings": 16,
            ...      "architectures": ["BertForMaskedLM"]})
            >>> model = EncoderModel(config, rngs=nnx.Rngs(0))
            >>> model.replace_head(5, rngs=nnx.Rngs(1))
            >>> model.head.out_proj.kernel.shape
            (32, 5)
        """
        config = dataclasses.replace(self.config, head="classes", num_labels=num_labels)
        norm = nnx.state(self.model, lambda path, _: path[-1] == "scale")
        param_dtype = jax.tree.leaves(norm)[0].dtype
        options = {"dtype": self.model.dtype, "param_dtype": param_dtype}
        self.head = ClassHead(config, **options, rngs=rngs)
        self.config = config


def _make_layers(
    config: EncoderConfig, *, rngs: nnx.Rngs, **options: Any
) -> LayerStack:
    kind = EncoderLayer if config.norms_first else PostNormLayer
    return LayerStack(
        lambda rngs: kind(config.layer, rngs=rngs, **options),
        config.layer.num_hidden_layers,
        rngs=rngs,
    )
