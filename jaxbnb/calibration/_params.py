"""calibrate_params: quantises the variables of a Linen model, like `calibrate`."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32

from jaxbnb.calibration._batches import NEEDED, sample_losses
from jaxbnb.calibration._capture import input_moment, tile_moment
from jaxbnb.calibration._kept import open_folder
from jaxbnb.calibration._matrix import (
    FROM_GRADIENTS,
    LayerReport,
    Method,
    Progress,
    check_choices,
    check_weights,
    join,
    put_like,
    search,
    solve,
)
from jaxbnb.calibration._prepare import tile_shape
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.rules import Rule
from jaxbnb.linen import quantize_params, use_quantized
from jaxbnb.linen.boxes import put_in, take_out
from jaxbnb.linen.calls import (
    Layer,
    Tree,
    check_linen,
    find_product,
    trace_layers,
)

# Stored next to each kernel while the model runs. As parameters, they are stacked and
# sliced like the kernel, and have a gradient, under every transform of Flax.
_MOMENT: Final = "calibration_moment"
_TILES: Final = "calibration_tiles"
# Bytes of moments that are computed at once; all layers of a scan always are.
_MOMENT_BYTES: Final = 2**30
# A path, the moments of the inputs there or their diagonals for "mse", and those of the
# gradients for "kronecker".
_Moments = tuple[
    str,
    Float32[np.ndarray, "..."],
    Float32[np.ndarray, "*lead tiles t t"] | None,
]


class _Kernel(NamedTuple):
    """A kernel to calibrate.

    Attributes:
        layer: the layer that it belongs to.
        matrices: the kernel, ``(*stack, *batch, in, out)``.
        plain: its codes by absmax, perhaps in boxes.
    """

    layer: Layer
    matrices: Float[Array, "*lead fan_in fan_out"]
    plain: Any

    def moment_shape(self, method: Method) -> tuple[int, ...]:
        """Returns the shape of the second moments of the inputs that a method needs."""
        *lead, fan_in, _ = self.matrices.shape
        return (*lead, fan_in) if method == "mse" else (*lead, fan_in, fan_in)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of the second moments of the gradients; see `tile_moment`."""
        *lead, _, fan_out = self.matrices.shape
        return *lead, *tile_shape(fan_out)

    @property
    def config(self) -> QuantConfig:
        """Format of the codes."""
        q: QuantizedArray = take_out(self.plain)
        return QuantConfig(q.quant_type, q.block_size, q.double_quant)


def calibrate_params(
    model: nn.Module,
    variables: Tree,
    batches: Iterable[Any],
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    method: Method = "guided",
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
    get_logits: Callable[[Any], Float[Array, "*batch classes"]] | None = None,
    seed: int = 0,
    resume_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Quantises a Linen model's variables like `calibrate`.

    The result is like that of `jaxbnb.linen.quantize_params`: the model stays as it is,
    and runs on the variables inside `jaxbnb.linen.use_quantized`. The layers are the
    same too, also under ``nn.scan``, ``nn.remat`` and ``nn.vmap``. A layer that the
    model calls several times is calibrated on the inputs of all calls.

    One call for each batch is ``model.apply(variables, *batch, **kwargs)``. The second
    moments of inputs come out of its backward pass. So a batch needs the memory of a
    training step. If the moments of all layers are larger than 1 GiB, the batches pass
    through the model several times.

    On several devices, divide the batches as for `calibrate`.

    Embeddings, and layers that the result does not depend on, are quantised by "mse"
    without inputs. By ``method="mse"``, all layers are, if the batches hold no numbers.

    Args:
        model: Linen module, unbound.
        variables: variables of the model, in floating point.
        batches: positional arguments of each call: arrays, or tuples of pytrees of
            arrays. For "mse", a single batch of ``jax.ShapeDtypeStruct`` in place of
            arrays is enough.
        config: format of the kernels, one of nf4, fp4, int4 and int8; see `calibrate`.
        method: "kronecker", "guided", "gptq" or "mse"; see `calibrate`.
        rules: formats of some layers, as in `jaxbnb.linen.quantize_params`.
        skip: layers to leave alone, as in `jaxbnb.linen.quantize_params`.
        get_logits: function from the result of a call to logits, which "guided" and
            "kronecker" sample labels from. None if the result is the logits.
        seed: seed of those labels.
        resume_dir: folder for finished matrices; see `calibrate`. Moments are computed
            again. ``model``, ``get_logits`` and ``kwargs`` are taken to be the same.
        progress: called as ``progress(done, total, what)``.
        **kwargs: keyword arguments of each call and of ``apply``: ``rngs``,
            ``mutable``. They are constants when the call is compiled. Calls are of the
            model's ``__call__``.

    Returns:
        ``(variables, reports)``, where the reports are on each matrix.

    Raises:
        TypeError: ``model`` is not a Linen module, or the result of a call is not an
            array of logits.
        ValueError: ``batches`` are empty, ``method`` is unknown, the codes of a format
            cannot be chosen, or one of the errors of `jaxbnb.linen.quantize_params`.
        FloatingPointError: the inputs of a layer, or its gradients, are not finite.

    Example:
        >>> import flax.linen as nn, jax, jaxbnb
        >>> from jaxbnb.calibration import calibrate_params
        >>> model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
        >>> x = jax.random.normal(jax.random.key(0), (256, 64))
        >>> variables = model.init(jax.random.key(1), x)
        >>> variables, reports = calibrate_params(model, variables, [x], "nf4")
        >>> [report.path for report in reports]
        ['layers_0', 'layers_2']
        >>> all(report.error < report.absmax_error for report in reports)
        True
        >>> with jaxbnb.linen.use_quantized():
        ...     model.apply(variables, x).shape
        (256, 10)
    """
    check_linen(model, variables, "calibrate_params")
    check_choices(method, config, rules)
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not calls:
        raise ValueError(f"calibration needs data, and batches are empty. {NEEDED}")
    is_blind = method == "mse" and all(map(_is_shape, jax.tree.leaves(calls)))
    quantized, paths = quantize_params(
        model, variables, *calls[0], config=config, rules=rules, skip=skip, **kwargs
    )
    new, old = (_flatten(tree) for tree in (quantized, variables))
    layers = trace_layers(model, variables, calls[0], kwargs)
    kernels = {}
    for path in paths:
        layer, weight = layers[path], take_out(old[layers[path].key])
        matrices = weight if layer.axes is None else layer.axes.to_matrices(weight)
        kernels[path] = _Kernel(layer, matrices, new[layer.key])
    determining = old, {path: x.config.to_dict() for path, x in kernels.items()}
    folder = None
    if resume_dir is not None:
        text = None if is_blind else calls
        folder = open_folder(resume_dir, (determining, text, method, seed))
    check_weights((path, kernel.matrices) for path, kernel in kernels.items())
    total = sum(map(_count, kernels.values()))
    reports: list[LayerReport] = []

    def finish(path: str, parts: Sequence[QuantizedArray]) -> None:
        kernel = kernels[path]
        q = join(parts, kernel.matrices.shape[:-2])
        placed = jax.tree.map(put_like, q, take_out(kernel.plain))
        new[kernel.layer.key] = put_in(kernel.plain, placed)

    def advance(report: LayerReport) -> None:
        reports.append(report)
        if progress is not None:
            progress(len(reports), total, report.path)

    captured = {} if is_blind else kernels
    captured = {p: x for p, x in captured.items() if x.layer.axes is not None}
    run = _Run(model, variables, calls, kwargs, method, get_logits, seed)
    for path, moments, tiles in _stream_moments(run, captured):
        if not moments.any():
            continue
        parts = []
        for q, report in _solve(path, captured[path], moments, tiles, method, folder):
            parts.append(q)
            advance(report)
        finish(path, parts)
    done = {report.path for report in reports}
    for path, kernel in kernels.items():
        if path in done:
            continue
        parts = []
        for q, report in search(
            kernel.matrices,
            kernel.config,
            path,
            folder,
            is_embedding=kernel.layer.axes is None,
        ):
            parts.append(q)
            advance(report)
        finish(path, parts)
    return {**quantized, "params": unflatten_dict(new)}, reports


class _Run(NamedTuple):
    """The calls to make; see `calibrate_params`."""

    model: nn.Module
    variables: Tree
    calls: Sequence[tuple[Any, ...]]
    kwargs: Mapping[str, Any]
    method: Method
    get_logits: Callable[[Any], Any] | None
    seed: int


def _stream_moments(run: _Run, kernels: Mapping[str, _Kernel]) -> Iterator[_Moments]:
    """Yields the second moments of each kernel, in groups of limited size."""
    group: dict[str, _Kernel] = {}
    size = 0
    for path, kernel in kernels.items():
        nbytes = 4 * math.prod(kernel.moment_shape(run.method))
        if run.method == "kronecker":
            nbytes += 4 * math.prod(kernel.tile_shape)
        if group and size + nbytes > _MOMENT_BYTES:
            yield from _capture(run, group)
            group, size = {}, 0
        group[path], size = kernel, size + nbytes
    if group:
        yield from _capture(run, group)


def _capture(run: _Run, kernels: Mapping[str, _Kernel]) -> Iterator[_Moments]:
    method = run.method
    shapes = {(path, _MOMENT): x.moment_shape(method) for path, x in kernels.items()}
    if method == "kronecker":
        shapes |= {(path, _TILES): x.tile_shape for path, x in kernels.items()}
    places = {tap: (*kernels[tap[0]].layer.key[:-1], tap[1]) for tap in shapes}

    def record(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        find, layer = find_product(context), context.module
        if find is None or not layer.has_variable("params", _MOMENT):
            return y
        product, x = find(layer, *args, **kwargs)
        rows = product.rows(jax.lax.stop_gradient(x)).astype(jnp.float32)
        rows = rows.reshape(*rows.shape[: len(product.batch)], -1, rows.shape[-1])
        moment = layer.get_variable("params", _MOMENT)
        # None for most methods.
        tiles = layer.get_variable("params", _TILES)
        y_rows: Any = _record(product.result_rows(y), rows, moment, tiles, method)
        # The inverse of `Product.result_rows`.
        return product(x, lambda _: y_rows)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(moments, variables, call, key):
        def total(taps):
            params = _flatten(variables)
            params |= {place: taps[tap] for tap, place in places.items()}
            filled = {**unfreeze(variables), "params": unflatten_dict(params)}
            with nn.intercept_methods(record), use_quantized():
                result = run.model.apply(filled, *call, **run.kwargs)
            if method not in FROM_GRADIENTS:
                sums = (jnp.sum(x.astype(jnp.float32)) for x in _floats(result))
                return sum(sums, jnp.zeros(()))
            logits = result if run.get_logits is None else run.get_logits(result)
            if not isinstance(logits, jax.Array):
                raise TypeError(
                    f"{method} needs logits, and the result of a call is a "
                    f"{type(logits).__name__}; give get_logits=lambda result: ..."
                )
            return jnp.sum(sample_losses(logits, key))

        added = jax.grad(total)(jax.tree.map(jnp.zeros_like, moments))
        return jax.tree.map(jnp.add, moments, added)

    moments = {tap: jnp.zeros(shape, jnp.float32) for tap, shape in shapes.items()}
    for number, call in enumerate(run.calls):
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        moments = add(moments, run.variables, call, key)
    for path in kernels:
        tiles = moments.pop((path, _TILES), None)
        yield (
            path,
            np.asarray(moments.pop((path, _MOMENT))),
            None if tiles is None else np.asarray(tiles),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _record(
    y: Float[Array, "*batch rows out"],
    rows: Float32[Array, "*batch rows n"],
    moment: Float32[Array, "*batch n n"] | Float32[Array, "*batch n"],
    tiles: Float32[Array, "*batch tiles t t"] | None,
    method: Method,
) -> Array:
    """Returns ``y``. The cotangents of ``moment`` and ``tiles`` are second moments."""
    return y


def _record_forward(y, rows, moment, tiles, method):
    return y, rows


def _record_backward(method, rows, g):
    weighted, tiles = rows, None
    if method in FROM_GRADIENTS:
        norm = jnp.linalg.norm(g.astype(jnp.float32), axis=-1)
        weighted = rows * norm[..., None]
        if method == "kronecker":
            find = tile_moment
            for _ in g.shape[:-2]:
                find = jax.vmap(find)
            tiles = find(g, norm)
    moment = input_moment(weighted, rows, is_diagonal=method == "mse")
    return g, None, moment, tiles


_record.defvjp(_record_forward, _record_backward)


def _solve(
    path: str,
    kernel: _Kernel,
    moments: Float32[np.ndarray, "..."],
    tiles: Float32[np.ndarray, "*lead tiles t t"] | None,
    method: Method,
    folder: Path | None,
) -> Iterator[tuple[QuantizedArray, LayerReport]]:
    """Yields the calibrated matrices of a kernel, one by one."""
    matrices = kernel.matrices.reshape(-1, *kernel.matrices.shape[-2:])
    is_single = kernel.matrices.ndim == 2
    if tiles is not None:
        tiles = tiles.reshape(-1, *tiles.shape[-3:])
    lead = kernel.matrices.ndim - 2
    for number, moment in enumerate(moments.reshape(-1, *moments.shape[lead:])):
        where = path, None if is_single else number, method
        part = None if tiles is None else tiles[number]
        yield solve(matrices[number], moment, kernel.config, where, folder, part)


def _count(kernel: _Kernel) -> int:
    return math.prod(kernel.matrices.shape[:-2])


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _floats(tree: Any) -> list[Array]:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def _flatten(variables: Tree) -> dict[tuple[str, ...], Any]:
    return flatten_dict(unfreeze(variables)["params"])
