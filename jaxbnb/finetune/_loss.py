"""The loss of a language model, and its perplexity on held-out text."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int

from jaxbnb.core.compiling import jit_model
from jaxbnb.finetune._cross_entropy import is_known, token_losses
from jaxbnb.finetune._data import as_batch, check_values
from jaxbnb.models import CausalLM, EncoderDecoderLM
from jaxbnb.models.tokens import as_int32
from jaxbnb.nnx import Remat
from jaxbnb.sharding import find_mesh, use_mesh
from jaxbnb.sharding.axis_types import change_mesh, on_automatic_axes


def next_token_loss(
    model: CausalLM | EncoderDecoderLM,
    tokens: Int[Array, "batch seq"],
    *,
    mask: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    source_ids: Int[Array, "batch source"] | None = None,
    source_mask: Bool[Array, "batch source"] | None = None,
    remat: bool | Remat = False,
) -> Float32[Array, ""]:
    """Computes the mean cross-entropy, in nats, of each token given those before it.

    The logits are by far the largest array of a small model. They are computed for one
    chunk of positions at a time, and again in the backward pass.

    Args:
        model: model that gives hidden states and their logits.
        tokens: token ids; all except the first of each row are targets.
        mask: whether each token counts as a target; None for all.
        segment_ids: number of the document of each token, as in `CausalLM`. The first
            token of each is not a target. None for a document in each row.
        source_ids: tokens that the encoder of an `EncoderDecoderLM` reads, or log-mel
            features. ``tokens`` are then the decoder's, and begin with its start token.
            None for a decoder.
        source_mask: whether each of these is real, and not padding; None for all.
        remat: recompute each layer in the backward pass (gradient checkpointing);
            a `jaxbnb.nnx.Remat` says which inputs to keep, and where.

    Returns:
        The mean over the targets. NaN if there are none, or if any token is outside the
        vocabulary.

    Raises:
        TypeError: a source is missing for an encoder-decoder, or given for a decoder.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> loss = jaxbnb.finetune.next_token_loss(model, jnp.arange(16)[None])
        >>> loss.shape, bool(3 < loss < 6)
        ((), True)
    """
    total, count = sum_token_losses(
        model,
        tokens,
        mask=mask,
        segment_ids=segment_ids,
        source_ids=source_ids,
        source_mask=source_mask,
        remat=remat,
    )
    return total / count


@on_automatic_axes
def sum_token_losses(
    model: CausalLM | EncoderDecoderLM,
    tokens: Int[Array, "batch seq"],
    *,
    mask: Bool[Array, "batch seq"] | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    source_ids: Int[Array, "batch source"] | None = None,
    source_mask: Bool[Array, "batch source"] | None = None,
    remat: bool | Remat = False,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum that `next_token_loss` divides, and the number of targets."""
    source = None
    if source_ids is not None:
        is_audio = jnp.issubdtype(source_ids.dtype, jnp.floating)
        source = source_ids if is_audio else as_int32(source_ids), source_mask
    losses, counts = _measure_targets(model, tokens, mask, segment_ids, remat, source)
    return jnp.sum(losses), jnp.sum(counts)


@on_automatic_axes
def target_losses(
    model: CausalLM,
    tokens: Int[Array, "batch seq"],
    *,
    mask: Bool[Array, "batch seq"] | None = None,
    remat: bool | Remat = False,
) -> Float32[Array, "batch seq"]:
    """Returns the cross-entropy of each target, at the position before it, else 0."""
    losses, _ = _measure_targets(model, tokens, mask, None, remat)
    return losses


def _measure_targets(
    model: Any,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    remat: bool | Remat,
    source: tuple[Array, Array | None] | None = None,
) -> tuple[Float32[Array, "batch seq"], Float32[Array, "batch seq"]]:
    """Returns the loss at each position, or 0, and whether it counts."""
    # uint8, for one, could not hold the vocabulary's size to compare with.
    tokens = as_int32(tokens)
    is_target = jnp.ones(tokens.shape, bool) if mask is None else mask
    if isinstance(model, EncoderDecoderLM) != (source is not None):
        raise TypeError(
            f"model is a {type(model).__name__}; an EncoderDecoderLM needs source_ids, "
            "which jaxbnb.finetune.next_token_loss and fit take, and other models need "
            "none"
        )
    if source is not None:
        ids, real = source
        encoded = model.model.encode(ids, attention_mask=real, remat=remat)
        hidden = model.model(tokens, source=encoded, remat=remat)
    elif segment_ids is None:
        hidden = model.model(tokens, remat=remat)
    else:
        hidden = model.model(tokens, segment_ids=segment_ids, remat=remat)
        is_target = is_target & (segment_ids == jnp.roll(segment_ids, 1, axis=1))
    # Each position predicts the token after it. The last one of a row has none.
    targets, counts = (jnp.roll(x, -1, axis=1) for x in (tokens, is_target))
    counts = counts.astype(jnp.float32).at[:, -1].set(0.0)
    losses = token_losses(model, hidden, targets)
    # The loss at a position that does not count may be infinite.
    losses = jnp.where(counts > 0, counts * losses, 0.0)
    losses = jnp.where(is_known(model, hidden, tokens).all(), losses, jnp.nan)
    return losses, counts


def perplexity(
    model: CausalLM,
    windows: Int[np.ndarray, "windows length"],
    *,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Computes the exponential of the mean loss over all windows, without dropout.

    Args:
        model: a language model.
        windows: token ids; each row stands alone and has ``length - 1`` predictions.
        progress: called after each window with the number of windows done and the
            perplexity so far.

    Raises:
        TypeError: the windows do not hold integers, or ``model`` is not a language
            model.
        ValueError: there are no windows, or one has a token outside the vocabulary.
        FloatingPointError: the loss of a window is not finite.

    Example:
        >>> import numpy as np, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> jaxbnb.finetune.perplexity(model, np.zeros((2, 8), np.int32)) > 1
        True
    """
    check_language_model(model)
    if len(windows) == 0:
        raise ValueError("perplexity needs at least one window of tokens; got none")
    graphdef, state = nnx.split(model)
    mesh = find_mesh(state)
    state = change_mesh(state, mesh)
    losses = []
    for number, window in enumerate(windows):
        batch = as_batch([window], f"window {number}")
        tokens = as_int32(batch.tokens)
        with use_mesh(mesh):
            loss = float(_window_loss(graphdef, state, tokens))
        if not math.isfinite(loss):
            check_values(batch, get_vocabulary_size(model), f"window {number}")
            raise FloatingPointError(f"window {number} has a loss of {loss}")
        losses.append(loss)
        if progress is not None:
            progress(len(losses), math.exp(float(np.mean(losses))))
    return math.exp(float(np.mean(losses)))


def check_language_model(model: Any, *, may_have_source: bool = False) -> None:
    """Raises TypeError for a model without hidden states and logits.

    Args:
        model: any model.
        may_have_source: whether it may be an encoder-decoder.
    """
    if isinstance(model, EncoderDecoderLM) and not may_have_source:
        raise TypeError(
            "model is an EncoderDecoderLM, and a decoder such as CausalLM is needed. "
            "jaxbnb.finetune.fit trains an encoder-decoder"
        )
    if not all(callable(getattr(model, name, None)) for name in ("model", "logits")):
        raise TypeError(
            "model must be a language model, such as jaxbnb.load_pretrained returns: "
            "model.model(tokens, remat=...) gives hidden states and "
            f"model.logits(hidden) their logits; got {type(model).__name__}"
        )


def get_vocabulary_size(model: Any) -> int:
    """Returns the number of tokens that a model gives logits for."""
    if isinstance(model, EncoderDecoderLM):
        return model.config.vocab_size
    graphdef, state = nnx.split(model)

    def logits(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model.model(tokens))

    # Without shardings, because explicit axes would need one for the tokens too.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(logits, shapes, token).shape[-1]


@jit_model(static_argnums=0)
def _window_loss(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    model.eval()
    return next_token_loss(model, tokens)
