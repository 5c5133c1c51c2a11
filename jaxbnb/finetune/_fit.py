"""fit: the training loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxbnb.core import tree_nbytes
from jaxbnb.finetune._data import as_batch, check_batches, check_values
from jaxbnb.finetune._loss import check_language_model, vocabulary_size
from jaxbnb.finetune._mesh import place_of
from jaxbnb.finetune._step import (
    advance_rngs,
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)
from jaxbnb.models.tokens import as_int32


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did and took.

    Attributes:
        losses: of each step, before its update, in nats a token.
        seconds: of the steps, without compilation.
        tokens_per_second: over all batches, padding included, without compilation.
        trainable_bytes: of the trained variables.
        optimizer_bytes: of the optimizer's state.
        peak_bytes: peak of the compiled step on each device, as `peak_bytes` counts,
            for the batch that took the most.
    """

    losses: list[float]
    seconds: float
    tokens_per_second: float
    trainable_bytes: int
    optimizer_bytes: int
    peak_bytes: int


def fit(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    wrt: Any = nnx.LoRAParam,
    remat: bool = True,
    progress: Callable[[int, float, float], None] | None = None,
) -> FitResult:
    """Trains ``model`` in place: one step a batch.

    A batch has one of these forms, in NumPy arrays, JAX arrays, lists of equal length,
    or anything that NumPy takes for an array, with integers of any dtype:

    - token ids ``(rows, tokens)``: every token but the first of a row is a target;
    - a pair ``(tokens, mask)``: they are targets where the mask is True or 1, and all
      are if it is None;
    - a dict as in transformers: ``input_ids``, optionally with ``attention_mask`` (0
      for padding before or after a row) and ``labels`` (-100 for tokens that are not
      targets).

    The loss of a step is the mean over the targets of its batch. Batches may differ in
    shape, such as a smaller last one: the step is compiled once for each shape.

    The step runs on the mesh of the model, else of the first batch, else of the context
    (``jax.set_mesh``), if there is one. Variables stay divided as they are, and each
    device gets a copy of those that are not on the mesh yet. Rows of a batch are
    divided along all axes of the mesh that divide no variable. For another division,
    such as along the axis that divides the variables, place the batches yourself:
    ``jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))``. The trained
    variables return to where they were. Explicit axes are automatic during the run.

    Args:
        model: a language model.
        tx: the optimizer.
        batches: batches, in any of the forms above.
        wrt: filter of what is trained.
        remat: recompute each layer in the backward pass: gradient checkpointing.
        progress: called after each step with its number, its loss and tokens/s.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: a batch is none of the above, ``batches`` is a single one, ``model``
            is not a language model, or ``tx`` is not an Optax transformation.
        ValueError: there are no batches, or nothing to train; or a batch has a token
            outside the vocabulary, no target, or shapes that do not fit.
        FloatingPointError: a loss is not finite.

    After an error or an interruption, the model has what it had learned by then.

    Example:
        >>> import numpy as np, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(r=4), rngs=nnx.Rngs(1))
        >>> batches = [np.arange(16, dtype=np.int32)[None]] * 8
        >>> result = jaxbnb.finetune.fit(model, jaxbnb.adamw8bit(1e-2), batches)
        >>> result.losses[-1] < result.losses[0]
        True
    """
    check_language_model(model)
    check_batches(batches)
    graphdef, trainable, frozen = split_trainable(model, wrt)
    before, vocab_size = trainable, vocabulary_size(model)
    step = train_step(graphdef, tx, remat=remat)
    compiled: dict[Any, jax.stages.Compiled] = {}
    losses: list[float] = []
    seconds, tokens, opt_state, place = 0.0, 0, None, None
    try:
        for number, given in enumerate(batches, 1):
            name = f"batch {number}"
            batch = as_batch(given, name)
            if isinstance(batch.tokens, np.ndarray):
                check_values(batch, vocab_size, name)
            if place is None:
                place = place_of((trainable, frozen), batch.tokens)
                trainable, frozen = place.variables((trainable, frozen))
                with place.context():
                    # Copied to be donated: the model keeps its own until the run ends.
                    trainable = jax.tree.map(jnp.copy, trainable)
                    opt_state = place.variables(tx.init(trainable))
            # Cast after the check, which names the token as it was given.
            cast = batch._replace(tokens=as_int32(batch.tokens))
            placed: Any = place.batch(cast, name)
            # Without a mesh, a sharding would bind the trained variables to the device.
            sharding = placed.tokens.sharding if place.mesh else None
            kind = placed.tokens.shape, sharding
            if kind not in compiled:
                with place.context(), _noted(f"{name} has the shape {kind[0]}"):
                    compiled[kind] = compile_train_step(
                        step,
                        trainable,
                        opt_state,
                        frozen,
                        kind[0],
                        masked=True,
                        batch_sharding=sharding,
                    )
            start = time.perf_counter()
            trainable, opt_state, loss = compiled[kind](
                trainable, opt_state, frozen, *placed
            )
            with place.context():
                frozen = advance_rngs(frozen)
            losses.append(float(loss))
            seconds += time.perf_counter() - start
            tokens += batch.tokens.size
            if not math.isfinite(losses[-1]):
                check_values(batch, vocab_size, name)
                raise FloatingPointError(
                    f"the loss of step {number} is {losses[-1]}; lower the learning "
                    "rate, or clip with optax.clip_by_global_norm"
                )
            if progress is not None:
                progress(number, losses[-1], tokens / seconds)
    finally:
        if place is not None:
            nnx.update(model, place.back(trainable, before))
    if place is None:
        raise ValueError("there are no batches to train on")
    return FitResult(
        losses,
        seconds,
        tokens / seconds,
        tree_nbytes(trainable),
        tree_nbytes(opt_state),
        max(map(peak_bytes, compiled.values())),
    )


@contextlib.contextmanager
def _noted(note: str):
    try:
        yield
    except ValueError as error:
        error.add_note(note)
        raise
