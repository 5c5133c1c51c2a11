"""Loop: the state of a run, and its steps, compiled once for each shape of batch."""

import contextlib
import math
import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxbnb.core import tree_nbytes
from jaxbnb.core.compiling import jit_model
from jaxbnb.finetune._data import Batch, check_values
from jaxbnb.finetune._loss import check_language_model, get_vocabulary_size
from jaxbnb.finetune._mesh import Place, find_place
from jaxbnb.finetune._step import (
    LossFn,
    Metrics,
    advance_rngs,
    check_optimizer,
    compile_train_step,
    measured_step,
    peak_bytes,
    split_trainable,
)
from jaxbnb.models.tokens import as_int32, check_vocabulary
from jaxbnb.optim import stochastic_rounding

_16_BITS: Final = (jnp.bfloat16, jnp.float16)


class StepResult(NamedTuple):
    """What a step of a `Loop` reports.

    Attributes:
        loss: mean loss over the targets, before the update. If it or ``grad_norm`` is
            not finite, the step was not taken.
        grad_norm: norm of all gradients together, before clipping.
        seconds: time of the step, without compilation.
    """

    loss: float
    grad_norm: float
    seconds: float

    @property
    def is_taken(self) -> bool:
        """Whether the variables have changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def describe_problem(self, number: int) -> str:
        """Says what is not finite in a step that was not taken."""
        if not math.isfinite(self.loss):
            return f"the loss of step {number} is {self.loss}"
        return f"the gradients of step {number} have a norm of {self.grad_norm}"


class RunState(NamedTuple):
    """What changes from step to step, as a pytree of arrays.

    Attributes:
        trainable: the trained variables.
        opt_state: the optimizer's state.
        rng_counts: counts of the random streams.
    """

    trainable: nnx.State
    opt_state: Any
    rng_counts: nnx.State


class Loop:
    """A run of training: `step` takes a batch, `write_back` updates the model.

    Attributes:
        vocab_size: number of tokens that the model gives logits for.

    Args:
        model: a language model. It keeps its variables until `write_back`.
        tx: the optimizer.
        loss_fn: see `measured_step`.
        wrt: NNX filter that selects the variables to train.
        max_grad_norm: norm that the gradients are scaled down to; None to leave them.
        seed: seed of the rounding of 16-bit variables.
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        loss_fn: LossFn,
        *,
        wrt: Any = nnx.LoRAParam,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ):
        check_language_model(model, may_have_source=True)
        check_optimizer(tx)
        self._model = model
        self._loss_fn = loss_fn
        self._graphdef, self._trainable, self._frozen = split_trainable(model, wrt)
        self._before = self._trainable
        # Rounded to nearest, 16-bit variables would lose most updates.
        if any(x.dtype in _16_BITS for x in jax.tree.leaves(self._trainable)):
            tx = stochastic_rounding(tx, seed)
        self._tx = tx
        self._step = measured_step(
            self._graphdef, tx, loss_fn, max_grad_norm=max_grad_norm
        )
        self._evaluate = jit_model()(self._sum_losses)
        self._opt_state: Any = None
        self._place: Place | None = None
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self.vocab_size = get_vocabulary_size(model)

    def start(self, batch: Batch) -> None:
        """Finds the devices, copies the trained variables, makes the optimizer's state.

        `step` does so itself at the first batch.
        """
        place = find_place((self._trainable, self._frozen), batch.tokens)
        trainable, self._frozen = place.put_variables((self._trainable, self._frozen))
        with place.context():
            # Steps donate this copy. The model keeps its variables until the run ends.
            self._trainable = jax.tree.map(jnp.copy, trainable)
            self._opt_state = place.put_variables(self._tx.init(self._trainable))
        self._place = place

    def step(self, batch: Batch, name: str) -> StepResult:
        """Takes a step, unless the loss or a gradient is not finite.

        Args:
            batch: one batch, or several with a leading axis, as `train_step` has them.
            name: name of the batch in errors.

        Raises:
            ValueError: the batch has a token outside the vocabulary, no target, or
                shapes that do not fit.
        """
        if isinstance(batch.tokens, np.ndarray):
            check_values(batch, self.vocab_size, name)
        if self._place is None:
            self.start(batch)
        place: Any = self._place
        # Cast after the check, so that errors name the token before the cast.
        placed: Any = place.put_batch(
            batch._replace(
                tokens=as_int32(batch.tokens),
                source_ids=None
                if batch.source_ids is None
                else as_int32(batch.source_ids),
            ),
            name,
        )
        compiled = self._compile(placed, name)
        start = time.perf_counter()
        self._trainable, self._opt_state, metrics = compiled(
            self._trainable,
            self._opt_state,
            self._frozen,
            *_arguments(placed),
        )
        accumulated = 1 if placed.tokens.ndim == 2 else len(placed.tokens)
        with place.context():
            self._frozen = advance_rngs(self._frozen, accumulated)
        metrics: Metrics = jax.device_get(metrics)
        result = StepResult(
            float(metrics.loss), float(metrics.grad_norm), time.perf_counter() - start
        )
        if not result.is_taken:
            # Its arrays may have been on a device, and so unchecked.
            check_values(batch, self.vocab_size, name)
        return result

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Computes the mean loss over all targets of some batches, without dropout.

        The variables are those trained so far. Call `start` or `step` first.
        """
        place: Any = self._place
        total = count = 0.0
        for number, batch in enumerate(batches, 1):
            name = f"evaluation batch {number}"
            check_vocabulary(np.asarray(batch.tokens), self.vocab_size, name)
            placed = place.put_batch(batch, name)
            with place.context():
                sums = self._evaluate(self._trainable, self._frozen, placed)
            part, part_count = jax.device_get(sums)
            total, count = total + float(part), count + float(part_count)
        return total / count if count else math.nan

    def write_back(self) -> None:
        """Gives the model the variables that were trained so far.

        The next step donates them. After it, write them back again.
        """
        if self._place is not None:
            trained = self._place.put_back(self._trainable, self._before)
            nnx.update(self._model, trained)

    @property
    def state(self) -> RunState:
        """What a checkpoint needs to go on from here; the next step donates it."""
        counts, _ = nnx.split_state(self._frozen, nnx.RngCount, ...)
        return RunState(self._trainable, self._opt_state, counts)

    @state.setter
    def state(self, state: RunState) -> None:
        self._trainable, self._opt_state, counts = state
        _, rest = nnx.split_state(self._frozen, nnx.RngCount, ...)
        self._frozen = nnx.merge_state(counts, rest)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the compiled step, for the largest batch; 0 without any."""
        return max(map(peak_bytes, self._compiled.values()), default=0)

    @property
    def trainable_bytes(self) -> int:
        """Size of the trained variables."""
        return tree_nbytes(self._trainable)

    @property
    def optimizer_bytes(self) -> int:
        """Size of the optimizer's state."""
        return tree_nbytes(self._opt_state)

    def _sum_losses(self, trainable, frozen, batch):
        # Copied: layers that are scanned write to their random streams.
        model = nnx.merge(self._graphdef, trainable, jax.tree.map(lambda x: x, frozen))
        model.eval()
        return self._loss_fn(model, batch)

    def _compile(self, placed: Any, name: str) -> jax.stages.Compiled:
        place: Any = self._place
        # Without a mesh, a sharding would commit the trained variables to a device.
        sharding = placed.tokens.sharding if place.mesh else None
        is_segmented = placed.segment_ids is not None
        source = None if placed.source_ids is None else placed.source_ids.shape
        kind = placed.tokens.shape, is_segmented, source, sharding
        if kind not in self._compiled:
            with place.context(), _add_note(f"{name} has the shape {kind[0]}"):
                self._compiled[kind] = compile_train_step(
                    self._step,
                    self._trainable,
                    self._opt_state,
                    self._frozen,
                    kind[0],
                    masked=True,
                    segmented=is_segmented,
                    source_shape=source,
                    batch_sharding=sharding,
                )
        return self._compiled[kind]


def _arguments(batch: Batch) -> tuple[Any, ...]:
    """Returns the arrays of a batch, in the order of a step's arguments."""
    if batch.source_ids is not None:
        return (*batch,)
    return tuple(x for x in batch if x is not None)


@contextlib.contextmanager
def _add_note(note: str):
    try:
        yield
    except ValueError as error:
        error.add_note(note)
        raise
