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
from jaxbnb.finetune._loss import check_language_model, get_vocabulary_size
from jaxbnb.finetune._mesh import find_place
from jaxbnb.finetune._step import (
    advance_rngs,
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)
from jaxbnb.models.tokens import as_int32
from jaxbnb.nnx import Remat


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The losses of a run of `fit`, its speed and its memory.

    Attributes:
        losses: loss of each step before its update, in nats per token.
        seconds: time of all steps, without compilation.
        tokens_per_second: tokens over seconds, including padding.
        trainable_bytes: size of the trained variables.
        optimizer_bytes: size of the optimizer's state.
        peak_bytes: peak memory of the compiled step on each device, as the function
            `peak_bytes` counts it, for the batch that needs the most.
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
    remat: bool | Remat = True,
    progress: Callable[[int, float, float], None] | None = None,
) -> FitResult:
    """Trains ``model`` in place, with one step for each batch.

    A batch has one of these forms. Its arrays may be NumPy or JAX arrays, lists of
    equal length, or anything that NumPy converts to an array, with any integer dtype.

    - token ids ``(rows, tokens)``: every token except the first of a row is a target;
    - a pair ``(tokens, mask)``: tokens are targets where the mask is True or 1; None
      makes all of them targets;
    - a dict as in transformers: ``input_ids``, optionally with ``attention_mask`` (0
      for padding before or after a row) and ``labels`` (-100 for tokens that are not
      targets).

    The loss of a step is the mean over the targets of its batch. Batches may differ in
    shape, such as a smaller last one. The step is compiled once for each shape.

    The step runs on the mesh of the model, if there is one, or else of the first batch,
    or else of the context (``jax.set_mesh``). Variables that are on the mesh stay
    divided as they are; each device gets a copy of the others. Rows of a batch are
    divided along all axes of the mesh that do not divide a variable. For another
    division, such as along the axis that divides the variables, place the batches
    yourself: ``jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))``. The
    trained variables return to their previous devices. Explicit axes are automatic
    during the run.

    Args:
        model: a language model.
        tx: the optimizer.
        batches: batches, in any of the forms above.
        wrt: NNX filter that selects the variables to train.
        remat: recompute each layer in the backward pass (gradient checkpointing);
            a `jaxbnb.nnx.Remat` says which inputs to keep, and where.
        progress: called after each step with its number, its loss and tokens/s.

    Returns:
        Losses, speed and memory, as a `FitResult`.

    Raises:
        TypeError: a batch is none of the above, ``batches`` is a single one, ``model``
            is not a language model, or ``tx`` is not an Optax transformation.
        ValueError: there are no batches, or ``wrt`` selects nothing; or a batch has a
            token outside the vocabulary, no target, or shapes that do not fit.
        FloatingPointError: a loss is not finite.

    After an error or an interruption, the model keeps what it has learned so far.

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
    before, vocab_size = trainable, get_vocabulary_size(model)
    step = train_step(graphdef, tx, remat=remat)
    compiled: dict[Any, jax.stages.Compiled] = {}
    losses: list[float] = []
    seconds, tokens, opt_state, place = 0.0, 0, None, None
    try:
        for number, raw_batch in enumerate(batches, 1):
            name = f"batch {number}"
            batch = as_batch(raw_batch, name)
            if isinstance(batch.tokens, np.ndarray):
                check_values(batch, vocab_size, name)
            if place is None:
                place = find_place((trainable, frozen), batch.tokens)
                trainable, frozen = place.put_variables((trainable, frozen))
                with place.context():
                    # Steps donate this copy. The model keeps its variables until the
                    # run ends.
                    trainable = jax.tree.map(jnp.copy, trainable)
                    opt_state = place.put_variables(tx.init(trainable))
            # Cast after the check, so that errors name the token before the cast.
            cast = batch._replace(tokens=as_int32(batch.tokens))
            placed: Any = place.put_batch(cast, name)
            # Without a mesh, a sharding would commit the trained variables to a device.
            sharding = placed.tokens.sharding if place.mesh else None
            kind = placed.tokens.shape, sharding
            if kind not in compiled:
                with place.context(), _add_note(f"{name} has the shape {kind[0]}"):
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
            nnx.update(model, place.put_back(trainable, before))
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
def _add_note(note: str):
    try:
        yield
    except ValueError as error:
        error.add_note(note)
        raise
