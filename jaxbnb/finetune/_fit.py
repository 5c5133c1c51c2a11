"""fit: the training loop."""

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
from jaxtyping import Int

from jaxbnb.core import tree_nbytes
from jaxbnb.finetune._step import (
    advance_rngs,
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did and took.

    Attributes:
        losses: of each step, before its update, in nats a token.
        seconds: of the steps, without compilation.
        tokens_per_second: trained on, without compilation.
        trainable_bytes: of the trained variables.
        optimizer_bytes: of the optimizer's state.
        peak_bytes: of the compiled step, as `peak_bytes` counts.
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
    batches: Iterable[Int[np.ndarray, "batch seq"]],
    *,
    wrt: Any = nnx.LoRAParam,
    remat: bool = True,
    progress: Callable[[int, float, float], None] | None = None,
) -> FitResult:
    """Trains ``model`` in place: one step a batch.

    Args:
        model: a language model.
        tx: the optimizer.
        batches: token ids, all of one shape.
        wrt: filter of what is trained.
        remat: recompute each layer in the backward pass: gradient checkpointing.
        progress: called after each step with its number, its loss and tokens/s.

    Returns:
        A `FitResult`.

    Raises:
        ValueError: there are no batches, or nothing to train.
        FloatingPointError: a loss is not finite. The model has what it had learned by
            then, as after any interruption.

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
    graphdef, trainable, frozen = split_trainable(model, wrt)
    # Donated below: the model keeps arrays of its own until it gets the trained ones.
    trainable = jax.tree.map(jnp.copy, trainable)
    opt_state = tx.init(trainable)
    sizes = tree_nbytes(trainable), tree_nbytes(opt_state)
    losses: list[float] = []
    seconds, tokens, compiled = 0.0, 0, None
    try:
        for number, batch in enumerate(batches, 1):
            if compiled is None:
                step = train_step(graphdef, tx, remat=remat)
                compiled = compile_train_step(
                    step, trainable, opt_state, frozen, batch.shape
                )
            start = time.perf_counter()
            trainable, opt_state, loss = compiled(
                trainable, opt_state, frozen, jnp.asarray(batch, jnp.int32)
            )
            frozen = advance_rngs(frozen)
            losses.append(float(loss))
            seconds += time.perf_counter() - start
            tokens += batch.size
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss of step {number} is {losses[-1]}; lower the learning "
                    "rate, or clip with optax.clip_by_global_norm"
                )
            if progress is not None:
                progress(number, losses[-1], tokens / seconds)
    finally:
        nnx.update(model, trainable)
    if compiled is None:
        raise ValueError("there are no batches to train on")
    return FitResult(losses, seconds, tokens / seconds, *sizes, peak_bytes(compiled))
