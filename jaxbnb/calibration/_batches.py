"""Batches of text in the form that a language model's calibration needs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxbnb.data import TrainBatch
from jaxbnb.models import EncoderDecoderLM
from jaxbnb.models.tokens import as_int32, check_vocabulary, token_array

NEEDED = (
    "64 windows of 512 tokens, about 130,000 characters of English, are enough; the "
    "text should be like that which the model will see"
)
_TAKEN = "batches are integer arrays (rows, tokens), or those of jaxbnb.data.Batches"
# Number of positions with logits at a time: 256 x 49,152 float32 are 48 MiB.
_CHUNK = 256


class Text(NamedTuple):
    """A batch of text.

    Attributes:
        tokens: token ids.
        segment_ids: number of the document of each token; None for one in each row.
        is_real: whether each token counts. Padding does not.
    """

    tokens: Int[np.ndarray | jax.Array, "rows tokens"]
    segment_ids: Int[np.ndarray | jax.Array, "rows tokens"] | None
    is_real: Bool[np.ndarray | jax.Array, "rows tokens"]


def check_language_model(model: Any, otherwise: str = "") -> None:
    """Raises TypeError unless a model reads nothing but tokens, and gives logits.

    Args:
        model: any model.
        otherwise: what to do with another one, for the error.
    """
    is_language_model = all(
        callable(getattr(model, name, None)) for name in ("model", "logits")
    )
    if isinstance(model, EncoderDecoderLM) or not is_language_model:
        raise TypeError(
            "model is not a language model with model.model(tokens) and "
            f"model.logits(hidden), but of type {type(model).__name__}{otherwise}"
        )


def read_text(batches: Iterable[Any], model: Any) -> list[Text]:
    """Returns batches of text in one form.

    Raises:
        TypeError: a batch does not hold integers.
        ValueError: a token is outside the vocabulary.
    """
    return [_read_batch(x, f"batch {i}", model) for i, x in enumerate(batches)]


def _read_batch(x: Any, name: str, model: Any) -> Text:
    segment_ids = None
    if isinstance(x, TrainBatch):
        tokens, mask, segment_ids = (
            np.asarray(part).reshape(-1, part.shape[-1])
            for part in (x.tokens, x.mask, x.segment_ids)
        )
        # A token counts if it is a target, or predicts one.
        is_real = mask | np.pad(mask[:, 1:], [(0, 0), (0, 1)])
    else:
        tokens = token_array(x, f"{name}: its tokens", "Cut them to one length", _TAKEN)
        is_real = np.ones(tokens.shape, bool)
    if hasattr(getattr(model, "config", None), "vocab_size"):
        check_vocabulary(tokens, model.config.vocab_size, name)
    return Text(as_int32(tokens), segment_ids, is_real)


def hidden_states(model: Any, batch: Text) -> Float[Array, "rows tokens hidden"]:
    """Runs a language model up to its head."""
    if batch.segment_ids is None:
        return model.model(batch.tokens)
    return model.model(batch.tokens, segment_ids=batch.segment_ids)


def sampled_loss(model: Any, batch: Text, key: Array) -> Float32[Array, ""]:
    """Sums the losses of next tokens that are drawn from the model itself.

    The second moment of its gradients is the Fisher information.
    """
    rows = hidden_states(model, batch).reshape(batch.tokens.size, -1)
    chunks = in_chunks((rows, batch.is_real.reshape(-1)))

    @jax.checkpoint
    def add(total, chunk):
        number, (rows, is_real) = chunk
        losses = sample_losses(model.logits(rows), jax.random.fold_in(key, number))
        return total + jnp.sum(jnp.where(is_real, losses, 0.0)), None

    numbers = jnp.arange(len(chunks[1]))
    return jax.lax.scan(add, jnp.float32(0), (numbers, chunks))[0]


def sample_losses(
    logits: Float[Array, "*batch classes"], key: Array
) -> Float32[Array, "*batch"]:
    """Draws a label for each row of logits, and returns their losses."""
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    return -jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def in_chunks(rows: Any) -> Any:
    """Splits the first axis of each array in chunks; the last is filled with zeros."""

    def split(x):
        x = jnp.asarray(x)
        size = max(1, min(_CHUNK, len(x)))
        padded = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, rows)
