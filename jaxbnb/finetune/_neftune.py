"""NEFTune: noise on the embedded tokens while a model trains."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.models import CausalLM


class EmbeddingNoise(nnx.Module):
    """Adds uniform noise in training, and nothing after ``model.eval()``.

    The noise is between ``-alpha / sqrt(seq * hidden)`` and its opposite, as in the
    paper and in TRL.

    Args:
        alpha: strength of the noise, 5 to 15 in the paper.
        rngs: random streams; one is drawn from for each batch.

    References:
        Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning, 2023.
    """

    def __init__(self, alpha: float, *, rngs: nnx.Rngs):
        self.alpha = alpha
        self.deterministic = False
        self.rngs = rngs.dropout.fork()

    def __call__(
        self, x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        """Returns embedded tokens with noise."""
        if self.deterministic:
            return x
        limit = self.alpha / math.sqrt(x.shape[1] * x.shape[2])
        noise = jax.random.uniform(
            self.rngs(), x.shape, jnp.float32, minval=-limit, maxval=limit
        )
        return x + noise.astype(x.dtype)


@contextlib.contextmanager
def embedding_noise(
    model: CausalLM, alpha: float | None, *, seed: int
) -> Iterator[None]:
    """Gives a model noise on its embedded tokens within a context; None for none."""
    decoder: Any = model.model
    if alpha is not None:
        decoder.embed_noise = EmbeddingNoise(alpha, rngs=nnx.Rngs(dropout=seed))
    try:
        yield
    finally:
        decoder.embed_noise = None
