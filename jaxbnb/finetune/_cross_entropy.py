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
from jaxbnb.sharding.activations import constrain, count_vocab_parts

# Number of positions with all their logits at a time.
CHUNK = 256
# Number of logits of a text from which on the vocabulary is cut: 48 MiB of float32.
LOGITS = 256 * 49_152
# Number of positions, and of tokens of the vocabulary, in a piece: 16 MiB of float32.
PIECE = (1024, 4096)


def token_losses(
    model: CausalLM,
    hidden: Float[Array, "batch seq hidden"],
    targets: Int32[Array, "batch seq"],
) -> Float32[Array, "batch seq"]:
    """Computes the cross-entropy, in nats, of the target at each position.

    This is minus the target's log-probability. The logits are computed for one chunk of
    positions at a time, and again in the backward pass. If the logits would be many,
    the vocabulary is cut into pieces too, and the sum of exponentials is a running one.
    `jaxbnb.models.head.cut_head` says which heads can be cut.

    Args:
        model: model that computes the logits of hidden states.
        hidden: hidden states.
        targets: token that each position should predict.

    Returns:
        The losses. NaN for a target outside the vocabulary.
    """
    # Devices that share a piece compute as many logits each as one device alone.
    cut = cut_head(model, PIECE[1] * count_vocab_parts())
    if cut is None or targets.size * cut[0].vocab_size <= LOGITS:
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
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, _renew_rngs(state, 0, 1)).logits(row)

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
        rows = constrain(rows, "group", None)

        def add_piece(carry, scanned):
            most, total, found = carry
            index, column = scanned
            piece = head.take(arrays, index)
            logits = _compute_logits(head, piece, rows, number, len(hidden))
            at_target = jnp.take_along_axis(logits, column[:, None], axis=-1)[:, 0]
            found += jnp.where(column >= 0, at_target, 0.0)
            if (is_new := head.is_new(index)) is not None:
                logits = jnp.where(is_new, logits, -jnp.inf)
            new_most = jnp.maximum(most, logits.max(axis=-1))
            total = total * jnp.exp(most - new_most)
            total += jnp.exp(logits - new_most[:, None]).sum(axis=-1)
            return (new_most, total, found), None

        zeros = jnp.zeros(targets.shape, jnp.float32)
        # A finite value, so that a piece of logits that are all -inf adds 0.
        carry = zeros + jnp.finfo(jnp.float32).min, zeros, zeros
        scanned = jnp.arange(head.num_pieces), head.columns(targets)
        (most, total, found), _ = jax.lax.scan(add_piece, carry, scanned)
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
        rows = constrain(rows, "group", None)

        def add_piece(carry, scanned):
            d_rows, d_arrays = carry
            index, column = scanned
            piece = head.take(arrays, index)
            trainable, frozen = _split(piece, head.is_trainable)

            def compute_logits(trainable, rows):
                piece = _join(trainable, frozen)
                return _compute_logits(head, piece, rows, number, count)

            logits, pull_back = jax.vjp(compute_logits, trainable, rows)
            is_target = jnp.arange(logits.shape[-1]) == column[:, None]
            d_logits = jnp.exp(logits - log_sum[:, None]) - is_target.astype(
                jnp.float32
            )
            d_logits *= d_loss[:, None]
            if (is_new := head.is_new(index)) is not None:
                d_logits = jnp.where(is_new, d_logits, 0.0)
            d_piece, more = pull_back(d_logits)
            d_rows += more.astype(jnp.float32)
            return (d_rows, head.add(d_arrays, d_piece, index)), None

        carry = jnp.zeros(rows.shape, jnp.float32), d_arrays
        scanned = jnp.arange(head.num_pieces), head.columns(targets)
        (d_rows, d_arrays), _ = jax.lax.scan(add_piece, carry, scanned)
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


def _renew_rngs(state: nnx.State, number: Array | int, total: int) -> nnx.State:
    """Copies the counts of random streams, and gives each of ``total`` calls its own.

    Dropout counts its calls in these variables, inside the loop that calls it.
    """
    counts, rest = nnx.split_state(state, nnx.RngCount, ...)
    counts = jax.tree.map(lambda x: x * total + jnp.asarray(number, x.dtype), counts)
    return nnx.merge_state(counts, rest)


def _split(arrays: list[Array], chosen: tuple[bool, ...]) -> tuple[list, list]:
    """Splits a list into the chosen arrays and the others, with None in the gaps."""
    first = [x if yes else None for x, yes in zip(arrays, chosen, strict=True)]
    second = [None if yes else x for x, yes in zip(arrays, chosen, strict=True)]
    return first, second


def _join(first: list[Any], second: list[Any]) -> list[Array]:
    """Undoes `_split`."""
    return [y if x is None else x for x, y in zip(first, second, strict=True)]
