"""VisionLM: a decoder that reads images between its tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxbnb.models._cache import KVCache
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._encoder_decoder import EncoderLayer, run_encoder
from jaxbnb.models._layer import make_norm, normalize
from jaxbnb.models._pairs import Pairs
from jaxbnb.models._vision_config import VisionLMConfig
from jaxbnb.nnx import LayerStack, Remat
from jaxbnb.sharding.activations import constrain, gathered
from jaxbnb.sharding.axis_types import check_axes, on_automatic_axes

Images = Float[Array, "images channels height width"]


class VisionTower(nnx.Module):
    """Pixels to hidden states of patches: SigLIP's encoder."""

    def __init__(self, config: VisionLMConfig, **options: Any):
        hidden, side = config.vision.hidden_size, config.patch_size
        # Width first, so that the kernel is the file's with all axes reversed.
        self.patches = nnx.Conv(
            config.num_channels,
            hidden,
            kernel_size=(side, side),
            strides=(side, side),
            padding="VALID",
            **options,
        )
        self.positions = nnx.Embed(config.patches_per_side**2, hidden, **options)
        rngs = options.pop("rngs")
        self.layers = LayerStack(
            lambda rngs: EncoderLayer(config.vision, rngs=rngs, **options),
            config.vision.num_hidden_layers,
            rngs=rngs,
        )
        self.norm = make_norm(config.vision, options["param_dtype"], rngs)
        self.config = config
        self.dtype = options["dtype"]

    def __call__(
        self, images: Images, *, remat: bool | Remat = False
    ) -> Float[Array, "images patches hidden"]:
        config = self.config
        want = (config.num_channels, config.image_size, config.image_size)
        if images.ndim != 4 or images.shape[1:] != want:
            raise ValueError(
                "images must have the shape (images, channels, height, width), with "
                f"{want} after the first; got {images.shape}"
            )
        patches = gathered(self.patches)
        x = patches(images.transpose(0, 3, 2, 1).astype(self.dtype))
        x = x.swapaxes(1, 2).reshape(len(images), -1, x.shape[-1])
        x = x + self.positions(jnp.asarray(place_patches(config.patches_per_side)))
        x = run_encoder(self.layers, x, Pairs(), remat)
        return constrain(normalize(self.norm, x), "batch", None, None)


class VisionLM(CausalLM):
    """A decoder that reads images: tokens and pixels to the logits of the next token.

    It is a `CausalLM`, and without images it computes the same. `with_images` gives a
    model that reads images where a text has ``config.image_token_id``.
    `load_pretrained` quantises only the decoder's layers.

    Attributes:
        vision: the encoder of images.
        connector: the linear layer from patches to the decoder's hidden states.
        model: see `CausalLM`, also for the others.
        lm_head: the output head, or None if the embedding is the head.
        config: sizes and variants.

    Args:
        config: sizes and variants.
        dtype: dtype of the computation; None for ``param_dtype``.
        param_dtype: dtype of the variables.
        rngs: random streams; ``params`` seeds the initializers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import VisionLM, VisionLMConfig
        >>> config = VisionLMConfig.from_huggingface(
        ...     {"model_type": "smolvlm", "image_token_id": 3, "text_config":
        ...      {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        ...       "num_hidden_layers": 2, "num_attention_heads": 2}, "vision_config":
        ...      {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        ...       "num_attention_heads": 2, "image_size": 16, "patch_size": 4}})
        >>> tokens, images = jnp.array([[1, 3, 3, 3, 3, 2]]), jnp.ones((1, 3, 16, 16))
        >>> def run():
        ...     model = VisionLM(config, rngs=nnx.Rngs(0))
        ...     return model.with_images(images)(tokens)
        >>> nnx.eval_shape(run).shape
        (1, 6, 64)
    """

    config: VisionLMConfig

    def __init__(
        self,
        config: VisionLMConfig,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dtype = param_dtype if dtype is None else dtype
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision = VisionTower(config, **options)
        self.connector = nnx.Linear(
            config.vision.hidden_size * config.scale_factor**2,
            config.hidden_size,
            use_bias=False,
            **options,
        )

    @on_automatic_axes
    def encode_images(
        self, images: Images, *, remat: bool | Remat = False
    ) -> Float[Array, "images tokens hidden"]:
        """Computes what the decoder reads in place of an image's tokens.

        Args:
            images: the pixels, as transformers' image processors return them: with the
                channels first, and each of the size that the model takes.
            remat: recompute each layer in the backward pass.

        Raises:
            ValueError: images have another shape.
        """
        check_axes(self)
        x = self.vision(images, remat=remat)
        size = self.config.scale_factor
        side = self.config.patches_per_side // size
        # The patches of a square become the features of one token.
        x = x.reshape(len(x), side, size, side, size, -1).swapaxes(2, 3)
        return self.connector(x.reshape(len(x), side * side, -1))

    def with_images(
        self, images: Images, *, remat: bool | Remat = False
    ) -> "IllustratedLM":
        """Returns a model that reads images where a text has the token for images.

        `generate`, `jaxbnb.finetune.next_token_loss` and others take it like a
        `CausalLM`. It shares this model's variables.

        Args:
            images: see `encode_images`; in the order of their tokens, row by row.
            remat: recompute each layer of the encoder in the backward pass.
        """
        return IllustratedLM(self, self.encode_images(images, remat=remat))


class IllustratedLM(nnx.Module):
    """A `VisionLM` together with the images that its next text shows.

    Attributes:
        model: everything up to the last norm, as in `CausalLM`.
        config: sizes and variants.
    """

    def __init__(self, base: VisionLM, features: Float[Array, "images tokens hidden"]):
        self.base = base
        self.model = _Reader(base, features)
        self.config = base.config

    @on_automatic_axes
    def __call__(
        self, token_ids: Int[Array, "batch seq"], **options: Any
    ) -> Float32[Array, "batch seq vocab"] | tuple[Float32[Array, "..."], KVCache]:
        """Computes the logits of the token that follows each token.

        Args:
            token_ids: the tokens; each image has ``config.tokens_per_image`` of
                ``config.image_token_id``.
            **options: ``attention_mask``, ``segment_ids``, ``cache`` and ``remat`` of
                `CausalLM`.

        Raises:
            ValueError: the tokens for images are more or fewer than the images have.
                Under ``jax.jit``, their number is unknown and not checked.
        """
        hidden = self.model(token_ids, **options)
        if options.get("cache") is None:
            return self.logits(hidden)
        return self.logits(hidden[0]), hidden[1]

    def logits(
        self, hidden: Float[Array, "*batch hidden"]
    ) -> Float32[Array, "*batch vocab"]:
        """Applies the output head to hidden states."""
        return self.base.logits(hidden)


class _Reader(nnx.Module):
    """The decoder of a `VisionLM`, which reads images among its tokens."""

    def __init__(self, base: VisionLM, features: Float[Array, "images tokens hidden"]):
        self.decoder = base.model
        self.features = nnx.Variable(features)
        self.config = base.config
        self.dtype = base.model.dtype

    def __call__(
        self,
        token_ids: Int[Array, "batch seq"],
        *,
        cache: KVCache | None = None,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        remat: bool | Remat = False,
    ) -> Any:
        decoder: Any = self.decoder
        embeddings = None
        # A single token continues a text that has been read.
        if token_ids.shape[1] > 1:
            embeddings = self._embed(token_ids)
        return decoder(
            token_ids,
            embeddings=embeddings,
            cache=cache,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            remat=remat,
        )

    def _embed(self, token_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq h"]:
        embeddings = self.decoder.embed(token_ids)
        features = self.features[...].reshape(-1, embeddings.shape[-1])
        token = self.config.image_token_id
        if not isinstance(token_ids, Tracer):
            count = np.count_nonzero(np.asarray(token_ids) == token)
            if count != len(features):
                raise ValueError(
                    f"token_ids have image_token_id {token} {count} times, and the "
                    f"images are {len(features)} tokens"
                )
        is_image = token_ids == token
        index = jnp.cumsum(is_image.reshape(-1)).reshape(is_image.shape) - 1
        images = features.at[index].get(mode="clip").astype(embeddings.dtype)
        return jnp.where(is_image[..., None], images, embeddings)


def place_patches(side: int) -> Int[np.ndarray, " patches"]:
    """Returns the position of each patch of a square image, row by row.

    transformers computes them in float32 from fractions of the image, and some numbers
    of patches lose a position to rounding. Models were trained with these positions.

    Example:
        >>> place_patches(2).tolist()
        [0, 1, 2, 3]
    """
    step = np.float32(1) / np.float32(side)
    fractions = np.minimum(np.arange(side, dtype=np.float32) * step, 1 - 1e-6)
    bounds = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    row = np.searchsorted(bounds, fractions.astype(np.float32), side="right")
    return (row[:, None] * side + row).reshape(-1)
