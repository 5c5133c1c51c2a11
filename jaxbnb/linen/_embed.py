"""QuantEmbed: nn.Embed with a frozen, quantised embedding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float, Int

from jaxbnb.core import QuantConfig, embed, matmul
from jaxbnb.core.config import as_config
from jaxbnb.linen.boxes import quantize_boxed


class QuantEmbed(nn.Module):
    """An embedding whose rows are a `jaxbnb.QuantizedArray`.

    Only the rows that are looked up are decoded. `attend` makes it the output head of a
    model with tied embeddings. As in `QuantDense`, the embedding is not a parameter: it
    lives in the collection ``"quantized"``. To use an existing one, replace the random
    embedding from ``init`` by ``config.quantize_embedding(embedding)``.

    Attributes:
        num_embeddings: size of the vocabulary.
        features: size of a row.
        config: format of the embedding, and compute dtype of `attend`: a
            `jaxbnb.QuantConfig`, or a format's name.
        dtype: dtype of the result; None for ``param_dtype``, or in `attend` for the
            dtype of the query.
        param_dtype: dtype of the embedding before it is quantised.
        embedding_init: initializer of the embedding.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> layer = jaxbnb.linen.QuantEmbed(num_embeddings=512, features=64)
        >>> ids = jnp.array([[1, 2, 3]])
        >>> variables = layer.init(jax.random.key(0), ids)
        >>> list(variables), variables["quantized"]["embedding"].bits_per_param
        (['quantized'], 4.5)
        >>> rows = layer.apply(variables, ids)
        >>> rows.shape, layer.apply(variables, rows, method="attend").shape
        ((1, 3, 64), (1, 3, 512))
    """

    num_embeddings: int
    features: int
    config: QuantConfig | str = QuantConfig()
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    embedding_init: Initializer = nn.linear.default_embed_init

    def setup(self):
        config = as_config(self.config)

        def init_embedding():
            shape = (self.num_embeddings, self.features)
            embedding = self.embedding_init(
                self.make_rng("params"), shape, jnp.dtype(self.param_dtype)
            )
            return quantize_boxed(embedding, config.quantize_embedding)

        self.embedding = self.variable("quantized", "embedding", init_embedding)

    def __call__(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Looks up rows; like ``nn.Embed``, NaN for an id that is out of range."""
        return embed(inputs, self.embedding.value, dtype=self.dtype)

    def attend(
        self, query: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch num_embeddings"]:
        """Multiplies each query by every row, e.g. for the logits of a tied head."""
        config = as_config(self.config)
        x = query if self.dtype is None else query.astype(self.dtype)
        table = self.embedding.value.mT
        return matmul(
            x,
            table,
            compute_dtype=config.compute_dtype,
            outlier_threshold=config.outlier_threshold,
            act_quant_type=config.act_quant_type,
        )
