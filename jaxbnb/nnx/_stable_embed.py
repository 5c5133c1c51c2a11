"""StableEmbed: an embedding that trains stably with 8-bit optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float, Int


class StableEmbed(nnx.Embed):
    """``nnx.Embed`` with a layer norm after it and 32-bit optimizer state.

    The gradients of an embedding are sparse, and their sizes differ widely. That is the
    hardest case for quantised optimizer state. Here, the embedding starts from Xavier's
    uniform distribution, each row that is looked up is normalised in float32, and the
    parameters declare ``state_bits=32``: the optimizers of `jaxbnb.optim` keep float32
    moments for them. Any other Flax layer can declare it in the same way:
    ``nnx.Embed(..., embedding_metadata={"state_bits": 32})``.

    Attributes:
        embedding: ``nnx.Param`` of shape ``(num_embeddings, features)``.
        norm: ``nnx.LayerNorm`` over ``features``.

    Args:
        num_embeddings: size of the vocabulary.
        features: size of a row.
        dtype: dtype of the result; None for the dtype of the embedding.
        param_dtype: dtype of the embedding; the norm's parameters are float32.
        embedding_init: initializer of the embedding.
        epsilon: added to the variance in the norm.
        rngs: its ``params`` stream seeds the initializer.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> embed = jaxbnb.nnx.StableEmbed(512, 64, rngs=nnx.Rngs(0))
        >>> embed(jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
        >>> params = nnx.state(embed, nnx.Param)
        >>> print(jaxbnb.optim.state_table(jaxbnb.adamw8bit(1e-3), params))
        parameter   shape      dtype    state     bytes  per element
        embedding   (512, 64)  float32  float32  262152         8.00
        norm.bias   (64,)      float32  float32     520         8.12
        norm.scale  (64,)      float32  float32     520         8.12
        other                           int32         4
        total                                    263196         8.00

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021, section
        2.3; ``bitsandbytes.nn.StableEmbedding``.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        embedding_init: Initializer = nnx.initializers.xavier_uniform(),  # noqa: B008
        epsilon: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        declared = {"state_bits": 32}
        super().__init__(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=embedding_init,
            embedding_metadata=declared,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(
            features,
            epsilon=epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_metadata=declared,
            bias_metadata=declared,
            rngs=rngs,
        )

    def __call__(
        self, inputs: Int[Array, "*batch"], out_sharding: Any = None
    ) -> Float[Array, "*batch features"]:
        """Looks up rows and normalises them; ``out_sharding`` as in ``nnx.Embed``."""
        rows = super().__call__(inputs, out_sharding=out_sharding)
        return self.norm(rows).astype(self.dtype)
