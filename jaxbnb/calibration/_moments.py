"""What a model runs on, and the second moments of its layers there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from jaxbnb.calibration import _capture
from jaxbnb.calibration._batches import (
    NEEDED,
    hidden_states,
    read_text,
    sample_losses,
    sampled_loss,
)
from jaxbnb.calibration._matrix import FROM_GRADIENTS, Method, Progress
from jaxbnb.nnx import surgery


class Moments(NamedTuple):
    """The second moments of one matrix.

    Attributes:
        layer: the layer that it belongs to.
        number: its number in a stack; None outside of one.
        inputs: those of the inputs, or their diagonal for "mse".
        tiles: those of the gradients by the results, for "kronecker"; see
            `jaxbnb.calibration._capture.tile_moment`.
    """

    layer: _capture.Found
    number: int | None
    inputs: Float32[Array, "n n"] | Float32[Array, " n"]
    tiles: Float32[np.ndarray, "tiles t t"] | None


class Task(NamedTuple):
    """What a model runs on.

    Attributes:
        run: function of the model and a batch.
        loss: function of the model, a batch and a key.
        batches: the batches.
        masks: which tokens of each batch count; None for all.
        found: layers to capture.
    """

    run: _capture.Run
    loss: _capture.Loss
    batches: list[Any]
    masks: list[Any] | None
    found: list[_capture.Found]


def prepare(
    model: nnx.Module,
    batches: Iterable[Any],
    apply: Callable[[Any, Any], Array] | None,
    paths: Sequence[str],
) -> Task:
    """Finds the layers to capture, among those with these paths.

    Args:
        model: the model.
        batches: what `calibrate` takes.
        apply: function of the model and a batch that returns logits; None for a
            language model.
        paths: dotted paths.
    """
    masks = None
    if apply is None:
        run, loss = hidden_states, sampled_loss
        items: list[Any] = [*read_text(batches, model)]
        masks = [text.is_real for text in items]
    else:
        run, items = apply, list(batches)

        def loss(model, batch, key):
            return jnp.sum(sample_losses(apply(model, batch), key))

    if not items:
        raise ValueError(f"calibration needs data, and batches are empty. {NEEDED}")
    found = _capture.find_layers(model, run, items[0])
    return Task(run, loss, items, masks, [x for x in found if x.path in {*paths}])


def find_kernels(model: nnx.Module, task: Task) -> dict[str, Array]:
    """Returns the kernels of the layers of a task, by path."""
    paths = {layer.path for layer in task.found}
    modules: dict[str, Any] = {
        path: module for path, _, _, module in surgery.iter_children(model)
    }
    return {path: modules[path].kernel.get_value() for path in modules if path in paths}


def stream_moments(
    model: nnx.Module,
    task: Task,
    method: Method,
    seed: int,
    folder: Path | None,
    progress: Progress | None,
) -> Iterator[Moments]:
    """Yields the moments of each matrix that a method needs.

    Args:
        model: the model.
        task: what it runs on.
        method: "guided" and "kronecker" weigh tokens by gradients, others do not; see
            `calibrate`.
        seed: seed of the labels that gradients are of.
        folder: folder for the gradients, or None; see `recall`.
        progress: called as ``progress(done, total, "gradients")``.
    """
    if not task.found:
        return
    weights: Any = None
    tiles: dict[str, np.ndarray] | None = None
    if method in FROM_GRADIENTS:

        def count(done: int) -> None:
            if progress is not None:
                progress(done, len(task.batches), "gradients")

        weights, tiles = _capture.capture_gradients(
            model,
            task.found,
            task.run,
            task.loss,
            task.batches,
            seed,
            folder,
            count,
            has_tiles=method == "kronecker",
        )
    elif task.masks is not None:
        # The same for each layer of a stack.
        weights = [
            {
                path: np.broadcast_to(mask, (*kernel.shape[:-2], *mask.shape))
                for path, kernel in find_kernels(model, task).items()
            }
            for mask in task.masks
        ]
    for layer, number, inputs in _capture.stream_moments(
        model,
        task.found,
        task.run,
        task.batches,
        weights,
        is_diagonal=method == "mse",
    ):
        found = None if tiles is None else tiles[layer.path]
        if found is not None and number is not None:
            found = found[number]
        yield Moments(layer, number, inputs, found)
