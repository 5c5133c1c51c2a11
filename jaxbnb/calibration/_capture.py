"""Second moments of linear layers' inputs and gradients, captured as a model runs.

Nothing here changes the caller's model: each function works on a copy of its modules,
which shares the arrays.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.calibration._kept import recall
from jaxbnb.calibration._linear_layers import (
    child,
    copy_modules,
    find_stacks,
    kernel_axes,
    linear_paths,
    replace,
    rows_of,
)
from jaxbnb.calibration._prepare import tile_shape
from jaxbnb.core.compiling import jit_model
from jaxbnb.nnx import LayerStack

# A function of a model and a batch. What it returns does not matter here.
Run = Callable[[Any, Any], Any]
# A function of a model, a batch and a key: the sum of the losses of sampled labels.
Loss = Callable[[Any, Any, Array], Array]
# The weight of each token in the moment of a layer, batch by batch.
Weights = Sequence[Mapping[str, Array]]


class Found(NamedTuple):
    """A linear layer to capture.

    Attributes:
        path: dotted path in the model.
        stack: path of the `LayerStack` that holds it; None outside of one.
        inner: path in the layer of that stack.
    """

    path: str
    stack: str | None
    inner: str


class Gradients(NamedTuple):
    """Gradients of the loss by the results of layers, by the path of the layer.

    Attributes:
        norms: their norm for each token, batch by batch. Those of a stack of layers
            have a leading axis.
        tiles: their second moments, ``(*stack, tiles, t, t)``; see `tile_moment`. None
            if nobody asked.
    """

    norms: list[dict[str, np.ndarray]]
    tiles: dict[str, np.ndarray] | None


class Tap(nnx.Variable[Any]):
    """Zeros that are added to nothing; their cotangent is the norm of a gradient."""


class TileTap(nnx.Variable[Any]):
    """Zeros like a `Tap`'s; their cotangent is the second moment of gradients."""


class Moment(nnx.Intermediate[Array]):
    """Sum over tokens of ``x x^T``, or its diagonal."""


class _Passing(nnx.Intermediate[Any]):
    """The carry of a stack of layers."""


@jax.custom_vjp
def _tap(
    y: Float[Array, "*tokens out"],
    _: Float32[Array, "*tokens"],
    tiles: Float32[Array, "tiles t t"] | None,
) -> Array:
    return y


def _tap_forward(y, _, tiles):
    return y, None if tiles is None else ()


def _tap_backward(has_tiles, g):
    norm = jnp.linalg.norm(g.astype(jnp.float32), axis=-1)
    return g, norm, None if has_tiles is None else tile_moment(g, norm)


_tap.defvjp(_tap_forward, _tap_backward)


def tile_moment(
    g: Float[Array, "*tokens out"], norm: Float32[Array, "*tokens"]
) -> Float32[Array, "tiles t t"]:
    r"""Returns the second moment :math:`\sum_t g_t g_t^\top` of each tile of gradients.

    Each token's counts by the inverse of its norm. So tokens weigh as they do in the
    moment of the inputs: by the norm, not by its square. The last tile is filled up
    with zeros.
    """
    rows = g.astype(jnp.float32).reshape(-1, g.shape[-1])
    count, tile, _ = tile_shape(rows.shape[-1])
    rows = jnp.pad(rows, [(0, 0), (0, count * tile - rows.shape[-1])])
    rows = rows.reshape(-1, count, tile)
    scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0).reshape(-1, 1, 1)
    return jnp.einsum("nki,nkj->kij", scale * rows, rows, precision="highest")


def input_moment(
    weighted: Float32[Array, "*batch rows n"],
    rows: Float32[Array, "*batch rows n"],
    *,
    is_diagonal: bool,
) -> Float32[Array, "*batch n n"] | Float32[Array, "*batch n"]:
    """Returns the second moment of the rows of inputs, or only its diagonal.

    Args:
        weighted: the rows times their weights.
        rows: the rows.
        is_diagonal: whether to return the diagonal.
    """
    if is_diagonal:
        return jnp.sum(weighted * rows, axis=-2)
    return jnp.matmul(weighted.mT, rows, precision="highest")


class _Tapped(nnx.Module):
    """A linear layer, and the norm of the gradient of its result for each token."""

    def __init__(self, linear: Any, rest: tuple[int, ...], *, has_tiles: bool):
        self.linear = linear
        axes = kernel_axes(linear)
        stack = linear.kernel.shape[: -len(axes.shape)]
        tiles = *stack, *tile_shape(axes.matrix_shape[1])
        # Zeros for `make_gradient`, without their memory.
        self.tap = Tap(jax.ShapeDtypeStruct((*stack, *rest), jnp.float32))
        self.tiles = None
        if has_tiles:
            self.tiles = nnx.data(TileTap(jax.ShapeDtypeStruct(tiles, jnp.float32)))

    def __call__(self, x: Array, *args: Any, **options: Any) -> Array:
        tiles = None if self.tiles is None else self.tiles[...]
        y = self.linear(x, *args, **options)
        tap = self.tap[...]
        return _tap(y.reshape(*tap.shape, -1), tap, tiles).reshape(y.shape)


class _Recorded(nnx.Module):
    """A linear layer that adds its inputs to a moment."""

    def __init__(self, linear: nnx.Module, moment: Array, weight: Array | None):
        self.linear = linear
        self.moment = Moment(moment)
        self.weight = None if weight is None else nnx.Variable(weight)

    def __call__(self, x: Array, *args: Any, **options: Any) -> Array:
        rows = rows_of(self.linear, x).astype(jnp.float32)
        rows = rows.reshape(-1, rows.shape[-1])
        weighted = rows
        if self.weight is not None:
            weight = self.weight[...].astype(jnp.float32)
            weighted = rows * weight.reshape(-1, 1)
        moment = self.moment.get_value()
        added = input_moment(weighted, rows, is_diagonal=moment.ndim == 1)
        self.moment.set_value(moment + added)
        return self.linear(x, *args, **options)


class _Measured(nnx.Module):
    """A linear layer that notes the axes of its rows, as it is traced."""

    def __init__(self, linear: nnx.Module, note: Callable[[tuple[int, ...]], None]):
        self.linear = linear
        self.note = note

    def __call__(self, x: Array, *args: Any, **options: Any) -> Array:
        self.note(rows_of(self.linear, x).shape[:-1])
        return self.linear(x, *args, **options)


class _Recomputed(nnx.Module):
    """A stack of layers that computes each layer again in the backward pass."""

    def __init__(self, stack: LayerStack):
        self.stack = stack
        # The layers need not know. Those of jaxbnb.models would cut their tokens into
        # chunks, which have other shapes than the taps.
        self.remat = False

    def __call__(self, apply: Any, carry: Any, *, remat: Any = False) -> Any:
        return self.stack(apply, carry, remat=remat or True)


class _Entrance(nnx.Module):
    """Takes the place of a stack of layers, and keeps what would enter it."""

    def __init__(self):
        self.passing = nnx.data(None)
        self.remat = False

    def __call__(self, apply: Any, carry: Any, *, remat: Any = False) -> Any:
        self.passing = _Passing(carry)
        return carry


class _Stage(nnx.Module):
    """Takes the place of a stack of layers, and runs one layer on a given input."""

    def __init__(self, layer: nnx.Module, carry: Any, index: Array):
        self.layer = layer
        self.passing = _Passing(carry)
        self.index = nnx.Variable(index)
        self.remat = False

    def __call__(self, apply: Any, carry: Any, *, remat: Any = False) -> Any:
        carry = apply(self.layer, self.passing.get_value(), self.index[...])
        self.passing.set_value(carry)
        return carry


def find_layers(model: nnx.Module, run: Run, batch: Any) -> list[Found]:
    """Returns the linear layers that a model runs once for a batch.

    A layer with several kernels, such as one expert of many, is left out, and so is one
    that the model does not call, or calls several times.
    """
    shapes = measure_layers(model, run, batch)
    found, stacks = [], find_stacks(model)
    for path in linear_paths(model):
        if path in shapes:
            stack = next((s for s in stacks if path.startswith(f"{s}.")), None)
            inner = path if stack is None else path.removeprefix(f"{stack}.layer.")
            found.append(Found(path, stack, inner))
    return found


def measure_layers(
    model: nnx.Module, run: Run, batch: Any
) -> dict[str, tuple[int, ...]]:
    """Returns the axes of the rows of the layers that `find_layers` finds."""
    calls: dict[str, list[tuple[int, ...]]] = {}

    def measure(path: str, module: Any) -> Any:
        return _Measured(module, calls.setdefault(path, []).append)

    working = copy_modules(model)
    replace(working, linear_paths(model), measure)
    graphdef, state = nnx.split(working)
    jax.eval_shape(lambda s, batch: run(nnx.merge(graphdef, s), batch), state, batch)
    return {path: shapes[0] for path, shapes in calls.items() if len(shapes) == 1}


def capture_gradients(
    model: nnx.Module,
    layers: Sequence[Found],
    run: Run,
    loss: Loss,
    batches: Sequence[Any],
    seed: int,
    folder: Path | None,
    progress: Callable[[int], object],
    *,
    has_tiles: bool = False,
) -> Gradients:
    """Returns the gradients of a loss by each layer's result.

    Args:
        model: the model.
        layers: layers from `find_layers`.
        run: function that the layers were found with.
        loss: function of a model, a batch and a key.
        batches: batches, each for one call.
        seed: seed of the keys.
        folder: folder of finished parts, or None; see `recall`.
        progress: called after each batch with their number.
        has_tiles: whether to return second moments, too. They are kept in the folder
            when all batches are finished, and the norms after each.
    """
    compiled: dict[Any, Any] = {}
    paths = [layer.path for layer in layers]

    def find(number: int) -> dict[str, dict[str, np.ndarray]]:
        batch = batches[number]
        form = _form_of(batch)
        if form not in compiled:
            compiled[form] = _compile_gradients(
                model, paths, run, loss, batch, has_tiles
            )
        return compiled[form](batch, jax.random.key(seed), number)

    def find_norms(number: int) -> list[np.ndarray]:
        found = find(number)
        return [found["tap"][path] for path in paths]

    def find_all() -> list[np.ndarray]:
        norms, tiles = [], {}
        for number in range(len(batches)):
            found = find(number)
            norms += [found["tap"][path] for path in paths]
            for path in paths:
                tiles[path] = tiles.get(path, 0) + found["tiles"][path]
            if number + 1 < len(batches):
                progress(number + 1)
        return [*norms, *(tiles[path] for path in paths)]

    if has_tiles:
        arrays = recall(folder, "gradients.tiles", find_all)
        progress(len(batches))
        parts = [
            dict(zip(paths, arrays[i : i + len(paths)], strict=True))
            for i in range(0, len(arrays), len(paths))
        ]
        return Gradients(parts[:-1], parts[-1])
    norms = []
    for number in range(len(batches)):
        arrays = recall(
            folder,
            f"gradients.{number}",
            functools.partial(find_norms, number),
        )
        norms.append(dict(zip(paths, arrays, strict=True)))
        progress(number + 1)
    return Gradients(norms, None)


def _compile_gradients(model, paths, run, loss, batch, has_tiles):
    gradient, rest = make_gradient(model, paths, run, loss, batch, has_tiles=has_tiles)
    stacks = find_stacks(model)

    def find(batch, key, number):
        state = gradient(rest, batch, key, number)
        found: dict[str, dict[str, np.ndarray]] = {"tap": {}, "tiles": {}}
        for place, x in nnx.to_flat_state(state):
            *parts, kind = map(str, place)
            path = ".".join(parts)
            # In a stack, the paths have one more part.
            stack = next((s for s in stacks if path.startswith(f"{s}.")), "")
            path = path.replace(f"{stack}.stack.", f"{stack}.", 1)
            found[kind][path] = np.asarray(_value(x))
        return found

    return find


def make_gradient(
    model: nnx.Module,
    paths: Sequence[str],
    run: Run,
    loss: Loss,
    batch: Any,
    *,
    has_tiles: bool = False,
) -> tuple[Callable[..., nnx.State], nnx.State]:
    """Returns a compiled function, and its first argument.

    It takes all variables, a batch, a key and the number of the batch, and returns the
    cotangents of the taps.
    """
    shapes = measure_layers(model, run, batch)
    working = copy_modules(model)

    def tap(path: str, module: Any) -> Any:
        return _Tapped(module, shapes[path], has_tiles=has_tiles)

    replace(working, paths, tap)
    replace(working, find_stacks(model), lambda _, stack: _Recomputed(stack))
    graphdef, taps, rest = nnx.split(working, (Tap, TileTap), ...)

    @jit_model()
    def gradient(rest, batch, key, number):
        key = jax.random.fold_in(key, number)

        def total(taps):
            model = nnx.merge(graphdef, taps, rest)
            model.eval()
            return loss(model, batch, key)

        # As an argument, zeros would take memory.
        return jax.grad(total)(jax.tree.map(jnp.zeros_like, taps))

    return gradient, rest


def stream_moments(
    model: nnx.Module,
    layers: Sequence[Found],
    run: Run,
    batches: Sequence[Any],
    weights: Weights | None,
    *,
    is_diagonal: bool = False,
) -> Iterator[tuple[Found, int | None, Float32[Array, "..."]]]:
    """Yields each layer, its number in a stack, and the second moment of its inputs.

    A stack of layers runs layer by layer on all batches. So memory holds the moments
    and the inputs of a single one of them.

    Args:
        model: the model.
        layers: layers from `find_layers`.
        run: function that the layers were found with.
        batches: batches, each for one call.
        weights: weight of each token by path, for each batch; None for 1.
        is_diagonal: whether to yield only the diagonals.
    """
    outside = [layer for layer in layers if layer.stack is None]
    if outside:
        moments = _capture_outside(model, outside, run, batches, weights, is_diagonal)
        for layer in outside:
            yield layer, None, moments.pop(layer.path)
    for stack in find_stacks(model):
        inside = [layer for layer in layers if layer.stack == stack]
        if inside:
            yield from _stream_stack(
                model, stack, inside, run, batches, weights, is_diagonal
            )


def _capture_outside(model, layers, run, batches, weights, is_diagonal):
    paths = [layer.path for layer in layers]
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state, moments, batch, weight):
        working = nnx.merge(graphdef, state)
        working.eval()
        replace(
            working,
            paths,
            lambda path, x: _Recorded(x, moments[path], weight.get(path)),
        )
        run(working, batch)
        return {path: child(working, path).moment.get_value() for path in paths}

    moments = {path: _empty_moment(child(model, path), is_diagonal) for path in paths}
    for number, batch in enumerate(batches):
        weight = {} if weights is None else _pick(weights[number], paths)
        moments = step(state, moments, batch, weight)
    return moments


def _stream_stack(model, stack, layers, run, batches, weights, is_diagonal):
    held = child(model, stack)
    layer_graphdef, layer_state = nnx.split(held.layer)
    enter, step, state = make_stages(model, stack, layers, run)
    carries = [_to_host(enter(state, batch)) for batch in batches]
    for index in range(held.num_layers):
        one = jax.tree.map(lambda x, index=index: x[index], layer_state)
        single = nnx.merge(layer_graphdef, one)
        moments = {
            x.inner: _empty_moment(child(single, x.inner), is_diagonal) for x in layers
        }
        for number, batch in enumerate(batches):
            weight = {}
            if weights is not None:
                weight = {x.inner: weights[number][x.path][index] for x in layers}
            # On a mesh, the rows of a batch stay divided.
            carry = jax.device_put(*carries[number])
            carry, moments = step(
                state, one, np.int32(index), moments, carry, batch, weight
            )
            carries[number] = _to_host(carry)
        for layer in layers:
            yield layer, index, moments.pop(layer.inner)


def make_stages(
    model: nnx.Module, stack: str, layers: Sequence[Found], run: Run
) -> tuple[Callable[..., Any], Callable[..., Any], nnx.State]:
    """Returns two compiled functions, and the variables that they take first.

    The first one takes a batch too, and returns what enters the stack. The second one
    takes the variables of one layer, its index, moments, what enters the layer, a batch
    and the weights of its tokens. It returns what leaves the layer, and the moments.
    """
    paths = [layer.inner for layer in layers]
    layer_graphdef = nnx.graphdef(child(model, stack).layer)
    working = copy_modules(model)
    replace(working, [stack], lambda *_: _Entrance())
    graphdef, state = nnx.split(working)

    @jax.jit
    def enter(state, batch):
        working = nnx.merge(graphdef, state)
        working.eval()
        run(working, batch)
        return child(working, stack).passing.get_value()

    # XLA removes everything in this program but the layer, and what it depends on.
    @functools.partial(jax.jit, donate_argnums=3)
    def step(state, layer_state, index, moments, carry, batch, weight):
        working = nnx.merge(graphdef, state)
        layer = nnx.merge(layer_graphdef, layer_state)
        stage = _Stage(layer, carry, index)
        replace(working, [stack], lambda *_: stage)
        working.eval()
        replace(
            layer,
            paths,
            lambda path, x: _Recorded(x, moments[path], weight.get(path)),
        )
        run(working, batch)
        carry = stage.passing.get_value()
        return carry, {p: child(layer, p).moment.get_value() for p in paths}

    return enter, step, state


def _to_host(tree: Any) -> tuple[Any, Any]:
    """Returns the arrays of a tree in host memory, and where they were."""
    return jax.device_get(tree), jax.tree.map(lambda x: x.sharding, tree)


def _empty_moment(linear: Any, is_diagonal: bool) -> Float32[Array, "..."]:
    size, _ = kernel_axes(linear).matrix_shape
    return jnp.zeros((size,) if is_diagonal else (size, size), jnp.float32)


def _pick(weights: Mapping[str, Array], paths: Sequence[str]) -> dict[str, Array]:
    return {path: weights[path] for path in paths}


def _value(x: Any) -> Any:
    return x.get_value() if isinstance(x, nnx.Variable) else x


def _form_of(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda x: x, batch))
    return structure, tuple((x.shape, x.dtype) for x in leaves)
