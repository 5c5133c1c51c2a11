"""fit: the training loop."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax
from flax import nnx

from jaxbnb.finetune._data import as_batch, as_pair_batch, check_batches
from jaxbnb.finetune._loop import Loop
from jaxbnb.finetune._loss import check_language_model
from jaxbnb.finetune._step import LossFn, make_loss
from jaxbnb.models import EncoderDecoderLM
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
    loss_fn: LossFn | None = None,
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
      targets) and ``segment_ids`` (number of the document of each token, in packed
      rows; documents do not see each other). For a `jaxbnb.models.EncoderDecoderLM`,
      ``input_ids`` are sources, and ``labels`` are the targets of the decoder, which
      may have another length;
    - a batch of `jaxbnb.finetune.Batches`, with one or several micro-batches that make
      one step.

    The loss of a step is the mean over the targets of its batch. Batches may differ in
    shape, such as a smaller last one. The step is compiled once for each shape.

    The step runs on the mesh of the model, if there is one, or else of the first batch,
    or else of the context (``jax.set_mesh``). Variables that are on the mesh stay
    divided as they are; `jaxbnb.sharding` divides the others. Rows of a batch are
    divided along the axes "data" and "fsdp"; or, if axes have other names than those of
    `jaxbnb.sharding`, along all that do not divide a variable. For another division,
    place the batches yourself:
    ``jax.device_put(batch, NamedSharding(mesh, PartitionSpec("x")))``. The trained
    variables return to their previous devices. Explicit axes are automatic during the
    run.

    Args:
        model: a language model.
        tx: the optimizer.
        batches: batches, in any of the forms above.
        wrt: NNX filter that selects the variables to train.
        remat: recompute each layer in the backward pass (gradient checkpointing);
            a `jaxbnb.nnx.Remat` says which inputs to keep, and where.
        loss_fn: ``loss_fn(model, batch) -> (sum, count)``: the sum of the losses of a
            batch, which has ``tokens`` and ``mask``, and their number. None for that of
            `next_token_loss`. With a ``loss_fn``, ``remat`` is its own argument.
        progress: called after each step with its number, its loss and tokens/s.

    Returns:
        Losses, speed and memory, as a `FitResult`.

    Raises:
        TypeError: a batch is none of the above, ``batches`` is a single one, ``model``
            is not a language model, or ``tx`` is not an Optax transformation.
        ValueError: there are no batches, or ``wrt`` selects nothing; or a batch has a
            token outside the vocabulary, no target, or shapes that do not fit.
        FloatingPointError: a loss or a gradient is not finite. The step is not taken.

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
    check_language_model(model, may_have_source=True)
    read = as_batch
    if isinstance(model, EncoderDecoderLM):
        config = model.config
        read = functools.partial(
            as_pair_batch,
            start=config.decoder_start_token_id,
            pad=config.pad_token_id,
        )
    check_batches(batches)
    loop = Loop(model, tx, make_loss(remat) if loss_fn is None else loss_fn, wrt=wrt)
    losses: list[float] = []
    seconds, tokens = 0.0, 0
    try:
        for number, raw_batch in enumerate(batches, 1):
            batch = read(raw_batch, f"batch {number}")
            result = loop.step(batch, f"batch {number}")
            losses.append(result.loss)
            seconds += result.seconds
            tokens += batch.tokens.size
            if not result.is_taken:
                raise FloatingPointError(
                    f"{result.describe_problem(number)}; lower the learning rate, or "
                    "clip with optax.clip_by_global_norm"
                )
            if progress is not None:
                progress(number, result.loss, tokens / seconds)
    finally:
        loop.write_back()
    if not losses:
        raise ValueError("there are no batches to train on")
    return FitResult(
        losses,
        seconds,
        tokens / seconds,
        loop.trainable_bytes,
        loop.optimizer_bytes,
        loop.peak_bytes,
    )
