"""A small language model of random weights, and random tokens for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.models import CausalLM, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


def make_model(rng: np.random.Generator | None = None) -> CausalLM:
    """Makes the model without its initializers, which take longest to compile."""
    rng = rng or np.random.default_rng(0)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: CausalLM(CONFIG, rngs=nnx.Rngs(0)))
    )

    def draw(x):
        scale = x.shape[-2] ** -0.5 if len(x.shape) > 1 else 1.0
        return jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def tokens(count: int, seed: int = 0) -> list[np.ndarray]:
    """Draws batches of four rows."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, (4, 32)).astype(np.int32) for _ in range(count)]
