"""StableEmbed: an embedding that trains stably with 8-bit optimizers."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from flax.core.meta import AxisMetadata
from flax.typing import Initializer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


class StateBits(struct.PyTreeNode, AxisMetadata):
    """A box around a parameter that declares the bits of its optimizer state.

    Like ``nn.Partitioned``, it is a pytree of the parameter, and Linen takes it off
    when a module reads the parameter.

    Attributes:
        value: parameter, or another box.
        state_bits: bits of each element of a moment, which must be 32.
    """

    value: Any
    state_bits: int = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        inside = self.value
        return inside.unbox() if isinstance(inside, AxisMetadata) else inside

    def replace_boxed(self, val: Any) -> "StateBits":
        inside = self.value
        if isinstance(inside, AxisMetadata):
            val = inside.replace_boxed(val)
        return self.replace(value=val)

    def get_partition_spec(self) -> PartitionSpec:
        """Returns the spec of the parameter, from a box inside this one, for Flax."""
        inside = self.value
        has_spec = hasattr(inside, "get_partition_spec")
        return inside.get_partition_spec() if has_spec else PartitionSpec()

    def add_axis(self, index: int, params: dict[Any, Any]) -> "StateBits":
        """Adds an axis to a box inside this one; Flax calls it for stacked layers."""
        return self._inside("add_axis", index, params)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "StateBits":
        """Inverts `add_axis`."""
        return self._inside("remove_axis", index, params)

    def _inside(self, method: str, *args) -> "StateBits":
        if not isinstance(self.value, AxisMetadata):
            return self
        return self.replace(value=getattr(self.value, method)(*args))


def with_state_bits(
    init: Callable[..., Any], state_bits: int = 32
) -> Callable[..., StateBits]:
    """Makes an initializer that declares the bits of a parameter's optimizer state.

    Args:
        init: Flax initializer.
        state_bits: bits of each element of a moment. It must be 32: the optimizers of
            `jaxbnb.optim` keep the moments of the parameter in float32.

    Returns:
        An initializer that puts the parameter in a `StateBits` box.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> init = jaxbnb.linen.with_state_bits(nn.initializers.normal())
        >>> layer = nn.Dense(256, kernel_init=init)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> print(jaxbnb.optim.state_table(jaxbnb.adamw8bit(1e-3), params))
        parameter  shape      dtype    state     bytes  per element
        bias       (256,)     float32  float32    2056         8.03
        kernel     (64, 256)  float32  float32  131080         8.00
        other                          int32         4
        total                                   133140         8.00
    """

    def init_boxed(*args, **kwargs):
        return StateBits(init(*args, **kwargs), state_bits=state_bits)

    return init_boxed


class StableEmbed(nn.Embed):
    """``nn.Embed`` with a layer norm after it and 32-bit optimizer state.

    The gradients of an embedding are sparse, and their sizes differ widely. That is the
    hardest case for quantised optimizer state. Here, the embedding starts from Xavier's
    uniform distribution, each row that is looked up is normalised in float32, and the
    parameters declare ``state_bits=32`` (see `with_state_bits`): the optimizers of
    `jaxbnb.optim` keep float32 moments for them.

    Attributes:
        num_embeddings: size of the vocabulary.
        features: size of a row.
        dtype: dtype of the result; None for the dtype of the embedding.
        param_dtype: dtype of the embedding; the norm's parameters are float32.
        embedding_init: initializer of the embedding.
        epsilon: added to the variance in the norm.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> embed = jaxbnb.linen.StableEmbed(num_embeddings=512, features=64)
        >>> params = embed.init(jax.random.key(0), jnp.array([1]))["params"]
        >>> params["embedding"].state_bits
        32
        >>> embed.apply({"params": params}, jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021, section
        2.3; ``bitsandbytes.nn.StableEmbedding``.
    """

    embedding_init: Initializer = nn.initializers.xavier_uniform()
    epsilon: float = 1e-5

    def setup(self):
        self.embedding = self.param(
            "embedding",
            with_state_bits(self.embedding_init),
            (self.num_embeddings, self.features),
            self.param_dtype,
        )
        self.norm = nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_init=with_state_bits(nn.initializers.ones),
            bias_init=with_state_bits(nn.initializers.zeros),
        )

    def __call__(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Looks up rows and normalises them."""
        rows = super().__call__(inputs)
        return self.norm(rows).astype(rows.dtype)
