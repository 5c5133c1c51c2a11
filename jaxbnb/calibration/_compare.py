"""compare: how far a quantised model's predictions are from the float model's."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.calibration._batches import (
    Text,
    check_language_model,
    hidden_states,
    in_chunks,
    read_text,
)
from jaxbnb.core.compiling import jit_model


class Comparison(NamedTuple):
    """Predictions of a model, compared with those of another on the same text.

    Attributes:
        kl: mean Kullback-Leibler divergence of the next-token distribution, in nats.
        perplexity: perplexity of the model.
        reference_perplexity: perplexity of the model it is compared with.
    """

    kl: float
    perplexity: float
    reference_perplexity: float


def compare(model: Any, reference: Any, batches: Iterable[Any]) -> Comparison:
    """Compares the next-token distributions of two language models.

    Args:
        model: a language model, e.g. quantised.
        reference: the model to compare it with, e.g. before it was quantised.
        batches: text as for `calibrate`, but not the same text.

    Raises:
        TypeError: one of the two is not a language model, or a batch does not hold
            integers.
        ValueError: there are no batches, or no token to predict.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> quantized = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.nnx.quantize_model(quantized, "int4")
        >>> result = jaxbnb.calibration.compare(
        ...     quantized, model, [jnp.arange(64)[None]])
        >>> 0 < result.kl < 0.1
        True
    """
    for each in (model, reference):
        check_language_model(each)
    parts = [nnx.split(model), nnx.split(reference)]
    sums = np.zeros(4)
    for batch in read_text(batches, reference):
        sums += np.asarray(_compare(*parts[0], *parts[1], batch), np.float64)
    kl, loss, reference_loss, count = sums
    if not count:
        raise ValueError("the batches have no token to predict: a row needs two")
    return Comparison(
        float(kl / count), math.exp(loss / count), math.exp(reference_loss / count)
    )


@jit_model(static_argnums=(0, 2))
def _compare(graphdef, state, reference_graphdef, reference_state, batch: Text):
    models = nnx.merge(graphdef, state), nnx.merge(reference_graphdef, reference_state)
    for model in models:
        model.eval()
    hidden = [hidden_states(m, batch).reshape(batch.tokens.size, -1) for m in models]
    # Each position predicts the token after it, in the same document.
    counts = jnp.asarray(batch.is_real)
    if batch.segment_ids is not None:
        same = batch.segment_ids == jnp.roll(batch.segment_ids, -1, axis=1)
        counts = counts & same
    counts = counts.astype(jnp.float32).at[:, -1].set(0.0).reshape(-1)
    targets = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1).reshape(-1)

    def add(sums, chunk):
        *rows, targets, counts = chunk
        log_p, log_q = (
            jax.nn.log_softmax(m.logits(x)) for m, x in zip(models, rows, strict=True)
        )
        kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        losses = [
            -jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0]
            for x in (log_p, log_q)
        ]
        values = jnp.stack([kl, *losses, jnp.ones_like(kl)])
        return sums + jnp.sum(jnp.where(counts > 0, values, 0.0), axis=1), None

    chunks = in_chunks((*hidden, targets, counts))
    return jax.lax.scan(add, jnp.zeros(4), chunks)[0]
