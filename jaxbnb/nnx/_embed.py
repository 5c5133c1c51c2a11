"""QuantEmbed: nnx.Embed with a frozen, quantised embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_embed_init
from flax.typing import Initializer
from jaxtyping import Array, Float, Int

from jaxbnb.core import QuantConfig, embed, matmul
from jaxbnb.core.config import as_config
from jaxbnb.nnx._param import decode_param, quantize_embedding, shard_result


class QuantEmbed(nnx.Module):
    """An embedding whose rows are a `jaxbnb.QuantizedArray`.

    Only the rows that are looked up are decoded. `attend` makes it the output head of a
    model with tied embeddings.

    Attributes:
        embedding: `QuantParam` of shape ``(num_embeddings, features)``.

    Args:
        num_embeddings: size of the vocabulary.
        features: size of a row.
        config: format of the embedding, and compute dtype of `attend`: a
            `jaxbnb.QuantConfig`, or a format's name.
        dtype: dtype of the result; None for ``param_dtype``, or in `attend` for the
            dtype of the query.
        param_dtype: dtype of the embedding before it is quantised.
        embedding_init: initializer of the embedding.
        rngs: its ``params`` stream seeds the initializer.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> layer = jaxbnb.nnx.QuantEmbed(512, 64, rngs=nnx.Rngs(0))
        >>> rows = layer(jnp.array([[1, 2, 3]]))
        >>> rows.shape, layer.attend(rows).shape
        ((1, 3, 64), (1, 3, 512))
        >>> nnx.state(layer, nnx.Param)
        State({})
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        rngs: nnx.Rngs,
    ):
        config = as_config(config)
        shape = (num_embeddings, features)
        embedding = nnx.Param(embedding_init(rngs.params(), shape, param_dtype))
        self.embedding = quantize_embedding(embedding, config)
        self.num_embeddings = num_embeddings
        self.features = features
        self.config = config
        self.dtype = dtype

    @classmethod
    def from_embed(cls, layer: nnx.Embed, config: QuantConfig | str) -> "QuantEmbed":
        """Makes the layer from the embedding of ``layer``, which it quantises.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = nnx.Embed(512, 64, rngs=nnx.Rngs(0))
            >>> config = jaxbnb.QuantConfig("int8")
            >>> jaxbnb.nnx.QuantEmbed.from_embed(layer, config).embedding.shape
            (512, 64)
        """
        config = as_config(config)
        # Abstract, because a random embedding would take as much memory again.
        quantized = nnx.eval_shape(
            lambda: cls(
                layer.num_embeddings,
                layer.features,
                config=config,
                dtype=layer.dtype,
                param_dtype=layer.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        quantized.embedding = quantize_embedding(layer.embedding, config)
        return quantized

    def to_embed(self, dtype: jax.typing.DTypeLike | None = None) -> nnx.Embed:
        """Decodes the rows to ``dtype``: the inverse of `from_embed`.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = jaxbnb.nnx.QuantEmbed(64, 32, rngs=nnx.Rngs(0))
            >>> layer.to_embed().embedding.shape
            (64, 32)
        """
        embedding = decode_param(self.embedding, dtype)
        layer = nnx.eval_shape(
            lambda: nnx.Embed(
                self.num_embeddings,
                self.features,
                dtype=self.dtype,
                param_dtype=embedding.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        layer.embedding = embedding
        return layer

    def __call__(
        self, inputs: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch features"]:
        """Looks up rows; like ``nnx.Embed``, NaN for an id that is out of range.

        Args:
            inputs: ids of the rows.
            out_sharding: sharding of the result, on a mesh with explicit axes. JAX
                needs one if ids or rows are sharded.
        """

        def look_up(ids, rows):
            return embed(ids, rows, dtype=self.dtype)

        return shard_result(look_up, out_sharding)(inputs, self.embedding[...])

    def attend(
        self, query: Float[Array, "*batch features"], out_sharding: Any = None
    ) -> Float[Array, "*batch num_embeddings"]:
        """Multiplies each query by every row, e.g. for the logits of a tied head.

        Args:
            query: queries, with any number of axes.
            out_sharding: sharding of the result, on a mesh with explicit axes.
        """

        def multiply(x, rows):
            return matmul(
                x,
                rows.mT,
                compute_dtype=self.config.compute_dtype,
                outlier_threshold=self.config.outlier_threshold,
                act_quant_type=self.config.act_quant_type,
            )

        x = query if self.dtype is None else query.astype(self.dtype)
        return shard_result(multiply, out_sharding)(x, self.embedding[...])
