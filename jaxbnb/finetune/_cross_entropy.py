"""The loss of each token, without all logits at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxbnb.models import CausalLM
from jaxbnb.models.head import CutHead, cut_head

# Number of positions with all logits at a time: 256 x 49,152 float32 are 48 MiB.
CHUNK = 256
# Number of positions, and of tokens, in a piece.
PIECE = (2048, 8192)
# All logits of a position are computed at once for a vocabulary of up to this size.
WHOLE_VOCABULARY = 2**16


def token_losses(
    model: CausalLM,
    hidden: Float[Array, "batch seq hidden"],
    targets: Int32[Array, "batch seq"],
) -> Float32[Array, "batch seq"]:
    """Computes the cross-entropy, in nats, of the target at each position.

    This is minus the target's log-probability. The logits are computed for one chunk of
    positions at a time, and again in the backward pass. A large vocabulary is cut into
    pieces too, with a running sum of exponentials, if the head can be cut; see
    `jaxbnb.models.head.cut_head`.

    Args:
        model: model that computes the logits of hidden states.
        hidden: hidden states.
        targets: token that each position should predict.

    Returns:
        The losses. NaN for a target outside the vocabulary.
    """
    cut = cut_head(model, PIECE[1])
    if cut is None or cut[0].vocab_size <= WHOLE_VOCABULARY:
        size, compute = CHUNK, functools.partial(_losses_at_once, model)
    else:
        head, arrays = cut
        size, compute = PIECE[0], functools.partial(_losses_in_pieces, head, arrays)
    size = max(1, min(size, targets.size))
    num_chunks = -(-targets.size // size)

    def in_chunks(x):
        rows = x.reshape(-1, *x.shape[2:])
        short = num_chunks * size - len(rows)
        rows = jnp.pad(rows, [(0, short)] + [(0, 0)] * (rows.ndim - 1))
        # Take equally many from each part of the batch, so that every device that holds
        # a part has work.
        return jnp.moveaxis(rows.reshape(size, num_chunks, *rows.shape[1:]), 1, 0)

    losses = compute(in_chunks(hidden), in_chunks(targets))
    losses = losses.T.reshape(-1)[: targets.size].reshape(targets.shape)
    # Nothing can raise here, and indexing would count a negative id from the end.
    return jnp.where(is_known(model, hidden, targets), losses, jnp.nan)


def is_known(
    model: CausalLM,
    hidden: Float[Array, "batch seq hidden"],
    tokens: Int32[Array, "batch seq"],
) -> Bool[Array, "batch seq"]:
    """Returns whether tokens are in the vocabulary, the last axis of the logits."""

    def logits(row):
        return nnx.merge(*nnx.split(model)).logits(row)

    vocab_size = jax.eval_shape(logits, hidden[:1, :1]).shape[-1]
    return (tokens >= 0) & (tokens < vocab_size)


def _losses_at_once(model: CausalLM, hidden: Array, targets: Array) -> Array:
    """Returns the losses of chunks, ``(chunks, rows)``, from all logits of a chunk."""

    @jax.checkpoint
    def compute(number, rows, targets):
        graphdef, state = nnx.split(model)
        state = _renew_rngs(state, number, len(hidden))
        logits = nnx.merge(graphdef, state).logits(rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    chunks = jnp.arange(len(hidden)), hidden, targets
    return jax.lax.map(lambda chunk: compute(*chunk), chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses_in_pieces(
    head: CutHead, arrays: list[Array], hidden: Array, targets: Array
) -> Array:
    """Returns the losses of chunks, from the logits of a piece of the vocabulary."""
    return _forward(head, arrays, hidden, targets)[0]


def _forward(head, arrays, hidden, targets):
    def compute(chunk):
        number, rows, targets = chunk

        def add_piece(carry, index):
            most, total, found = carry
            ids = head.ids(index)
            piece = head.take(arrays, index)
            logits = _compute_logits(head, piece, rows, number, len(hidden))
            logits = jnp.where(ids >= 0, logits, -jnp.inf)
            new_most = jnp.maximum(most, logits.max(axis=-1))
            total = total * jnp.exp(most - new_most)
            total += jnp.exp(logits - new_most[:, None]).sum(axis=-1)
            found += jnp.where(ids == targets[:, None], logits, 0.0).sum(axis=-1)
            return (new_most, total, found), None

        zeros = jnp.zeros(targets.shape, jnp.float32)
        # A finite value, so that a piece of logits that are all -inf adds 0.
        carry = zeros + jnp.finfo(jnp.float32).min, zeros, zeros
        indices = jnp.arange(head.num_pieces)
        (most, total, found), _ = jax.lax.scan(add_piece, carry, indices)
        log_sum = most + jnp.log(total)
        return log_sum - found, log_sum

    chunks = jnp.arange(len(hidden)), hidden, targets
    losses, log_sums = jax.lax.map(compute, chunks)
    return losses, (arrays, *chunks, log_sums)


def _backward(head, residuals, d_losses):
    arrays, *chunks = residuals
    count = len(d_losses)

    def differentiate(d_arrays, chunk):
        number, rows, targets, log_sum, d_loss = chunk

        def add_piece(carry, index):
            d_rows, d_arrays = carry
            piece = head.take(arrays, index)
            trainable, frozen = _split(piece, head.is_trainable)

            def compute_logits(trainable, rows):
                piece = _join(trainable, frozen)
                return _compute_logits(head, piece, rows, number, count)

            logits, pull_back = jax.vjp(compute_logits, trainable, rows)
            ids = head.ids(index)
            d_logits = jnp.exp(logits - log_sum[:, None]) - (ids == targets[:, None])
            d_logits = jnp.where(ids >= 0, d_loss[:, None] * d_logits, 0.0)
            d_piece, more = pull_back(d_logits)
            d_rows += more.astype(jnp.float32)
            return (d_rows, head.add(d_arrays, d_piece, index)), None

        carry = jnp.zeros(rows.shape, jnp.float32), d_arrays
        indices = jnp.arange(head.num_pieces)
        (d_rows, d_arrays), _ = jax.lax.scan(add_piece, carry, indices)
        return d_arrays, d_rows.astype(rows.dtype)

    trainable, _ = _split(arrays, head.is_trainable)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    d_arrays, d_hidden = jax.lax.scan(differentiate, zeros, (*chunks, d_losses))
    return d_arrays, d_hidden, None


_losses_in_pieces.defvjp(_forward, _backward)


def _compute_logits(
    head: CutHead, piece: list[Array], rows: Array, number: Array, total: int
) -> Array:
    # The same random numbers for each piece of the vocabulary.
    return head.logits(piece, rows, lambda state: _renew_rngs(state, number, total))


def _renew_rngs(state: nnx.State, number: Array, total: int) -> nnx.State:
    """Gives each of ``total`` calls random numbers of its own, e.g. for dropout."""
    counts, rest = nnx.split_state(state, nnx.RngCount, ...)
    counts = jax.tree.map(lambda x: x * total + number.astype(x.dtype), counts)
    return nnx.merge_state(counts, rest)


def _split(arrays: list[Array], chosen: tuple[bool, ...]) -> tuple[list, list]:
    """Splits a list into the chosen arrays and the others, with None in the gaps."""
    first = [x if yes else None for x, yes in zip(arrays, chosen, strict=True)]
    second = [None if yes else x for x, yes in zip(arrays, chosen, strict=True)]
    return first, second


def _join(first: list[Any], second: list[Any]) -> list[Array]:
    """Undoes `_split`."""
    return [y if x is None else x for x, y in zip(first, second, strict=True)]
