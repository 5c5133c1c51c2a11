"""calibrate: quantises a model, with codes chosen by what its layers compute."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.calibration._batches import NEEDED, check_language_model
from jaxbnb.calibration._kept import open_folder
from jaxbnb.calibration._linear_layers import kernel_axes
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
from jaxbnb.calibration._moments import Task, prepare, stream_moments
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.rules import Rule
from jaxbnb.lora import adapter_names
from jaxbnb.nnx import QuantEmbed, quantize_model, surgery


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any] | None = None,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    method: Method = "guided",
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
    apply: Callable[[Any, Any], Float[Array, "*batch classes"]] | None = None,
    seed: int = 0,
    resume_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[LayerReport]:
    r"""Quantises a model in place, like `jaxbnb.nnx.quantize_model`, but better.

    The result has the same formats and sizes. Only its codes and absmax are chosen
    otherwise:

    - "mse" tries several scales for each block, and keeps the codes with the least
      squared error; see `jaxbnb.calibration.search_scales`. It needs no ``batches``.
      With them, each weight's error counts by the mean square of the input that it
      multiplies. An absmax of nf4 may become negative, which mirrors the levels.
    - "gptq" minimises the error of each layer's results on the inputs :math:`x_t` that
      it gets from ``batches``, :math:`\sum_t \lVert (Q - W)^\top x_t \rVert^2`.
    - "guided" also weighs each token by the norm of the gradient, by the layer's
      result, of the loss of labels that are sampled from the model. It needs a
      backward pass.
    - "kronecker" also lets the results of a layer make up for each other's errors, as
      far as the loss depends on them together: with those gradients :math:`g_t`, it
      minimises :math:`\mathrm{tr}\, G E^\top H E` for the error :math:`E = Q - W`, the
      second moment :math:`H` of "guided", and
      :math:`G = \sum_t g_t g_t^\top / \lVert g_t \rVert`. Half of the correlation in
      :math:`G` counts. The result is the closest to the model. Under LoRA it is no
      better than that of "guided". A layer of up to 32 results gets the same codes.

    Inputs and gradients are those of the model before it is quantised. A
    `jaxbnb.nnx.LayerStack` is calibrated layer by layer, and memory holds the moments
    and inputs of one layer. For "guided" and "kronecker", one batch at a time passes
    through the whole model and back, and each layer of a stack is computed again on the
    way back. The matrices :math:`G` of all layers are in memory, in squares of at most
    512 results.

    On several devices, divide the rows of each batch along an axis of the model's mesh:
    ``jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))``. Each device
    then adds up its own part of the second moments. One of them chooses the codes.

    Layers that are neither an ``nnx.Linear`` nor an ``nnx.LinearGeneral``, layers with
    several kernels, such as experts, and layers that a batch does not use, or uses
    twice, are quantised by "mse" without inputs.

    Args:
        model: any NNX model in floating point.
        batches: integer arrays ``(rows, tokens)`` or batches of `jaxbnb.data.Batches`
            for a language model, each small enough for one forward and backward pass;
            or what ``apply`` takes. 64 windows of 512 tokens are enough, and 16 for
            "mse", which also works without.
        config: format of the kernels, one of nf4, fp4, int4 and int8, and compute
            dtype: a `jaxbnb.QuantConfig`, or a format's name.
        method: "kronecker", "guided", "gptq" or "mse".
        rules: formats of some layers, as in `jaxbnb.nnx.quantize_model`.
        skip: layers to leave alone, as in `jaxbnb.nnx.quantize_model`.
        apply: ``apply(model, batch)`` returns logits, from which "guided" and
            "kronecker" sample labels. It is traced by ``jax.jit``. None for a language
            model, with ``model.model(tokens)`` and ``model.logits(hidden)``.
        seed: seed of those labels.
        resume_dir: folder in which each matrix is kept as soon as it is finished, and
            the gradients of each batch, or for "kronecker" of all of them. After an
            interrupt or a kill, the same call continues from them, with the same
            result. It is safe to share: the files lie in a subfolder that belongs to
            these weights, batches and options. They are not removed. ``apply`` is taken
            to be the same. Another format uses the same gradients.
        progress: called as ``progress(done, total, what)``.

    Returns:
        A report on each matrix, in the order that they were calibrated.

    Raises:
        TypeError: ``model`` is not an NNX model, or without ``apply`` it is not a
            language model that reads nothing but tokens; or a batch does not hold
            integers.
        ValueError: ``batches`` are missing or empty, a token is outside the vocabulary,
            ``method`` is unknown, the model has adapters and runs on batches, the codes
            of a format cannot be chosen, or one of the errors of
            `jaxbnb.nnx.quantize_model`.
        FloatingPointError: the weights of a layer, its inputs or its gradients are not
            finite.

    Example:
        >>> import jax, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu,
        ...     nnx.Linear(128, 10, rngs=nnx.Rngs(1)))
        >>> x = jax.random.normal(jax.random.key(0), (256, 64))
        >>> reports = jaxbnb.calibrate(
        ...     model, [x], "nf4", apply=lambda model, x: model(x))
        >>> [report.path for report in reports], type(model.layers[0]).__name__
        (['layers.0', 'layers.2'], 'QuantLinear')
        >>> all(report.error < report.absmax_error for report in reports)
        True

    References:
        Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
        Pre-trained Transformers, 2022.
        Kim et al., GuidedQuant: Large Language Model Quantization via Exploiting End
        Loss Guidance, 2025.
        Tseng et al., Model-Preserving Adaptive Rounding, 2025, for two factors.
    """
    _check_arguments(model, batches, config, method, rules, apply)
    quantized = nnx.merge(*nnx.split(model))
    paths = [*quantize_model(quantized, config, rules=rules, skip=skip)]
    layers = {
        path: module
        for path, _, _, module in surgery.iter_children(quantized)
        if path in {*paths}
    }
    for layer in layers.values():
        # Only their formats and places count, and the codes would take memory.
        _weight_of(layer).set_raw_value(
            jax.tree.map(_forget, _weight_of(layer).get_raw_value())
        )
    floats = {
        path: module
        for path, _, _, module in surgery.iter_children(model)
        if path in {*paths}
    }
    task = None if batches is None else prepare(model, batches, apply, paths)
    folders = _open_folders(resume_dir, model, task, layers, method, seed)
    # One at a time, as some layers have to copy their weights to matrices.
    read = {
        path: functools.partial(_read_matrices, floats[path], layers[path])
        for path in paths
    }
    check_weights((path, read_one()) for path, read_one in read.items())
    leads = {path: jax.eval_shape(read[path]).shape[:-2] for path in paths}
    total = sum(map(math.prod, leads.values()))
    reports: list[LayerReport] = []
    chosen: dict[str, list[QuantizedArray]] = {}

    def advance(report: LayerReport) -> None:
        reports.append(report)
        if progress is not None:
            progress(len(reports), total, report.path)

    if task is not None:
        for q, report in _solve(
            model, task, layers, floats, method, seed, folders, progress
        ):
            chosen.setdefault(report.path, []).append(q)
            advance(report)
    for path in paths:
        param = _weight_of(layers[path])
        if path not in chosen:
            chosen[path] = []
            for q, report in _search(
                path, layers[path], read[path](), folders.matrices
            ):
                chosen[path].append(q)
                advance(report)
        q = join(chosen.pop(path), leads[path])
        param.set_raw_value(jax.tree.map(put_like, q, param.get_raw_value()))
    surgery.replace_modules(model, lambda path, _: layers.get(path))
    return reports


class _Folders(NamedTuple):
    """Where finished parts are kept. Gradients do not depend on the formats."""

    matrices: Path | None
    gradients: Path | None


def _solve(
    model: nnx.Module,
    task: Task,
    layers: dict[str, Any],
    floats: dict[str, Any],
    method: Method,
    seed: int,
    folders: _Folders,
    progress: Progress | None,
) -> Iterator[tuple[QuantizedArray, LayerReport]]:
    """Yields the calibrated matrices of the layers that can be captured."""
    for layer, number, inputs, tiles in stream_moments(
        model, task, method, seed, folders.gradients, progress
    ):
        linear = floats[layer.path]
        kernel = linear.kernel.get_value()
        kernel = kernel if number is None else kernel[number]
        kernel = kernel_axes(linear).to_matrices(kernel)
        config = layers[layer.path].config
        where = layer.path, number, method
        yield solve(kernel, inputs, config, where, folders.matrices, tiles)


def _read_matrices(before: Any, layer: Any) -> Any:
    """Returns the weight of a layer as matrices, before it is quantised."""
    axes = _weight_of(layer).get_metadata().get("axes")
    weight: Any = _weight_of(before).get_value()
    return weight if axes is None else axes.to_matrices(weight)


def _search(
    path: str, layer: Any, matrices: Any, folder: Path | None
) -> Iterator[tuple[QuantizedArray, LayerReport]]:
    """Quantises the matrices of any layer by "mse", without its inputs."""
    plain: Any = _weight_of(layer).get_raw_value()
    config = QuantConfig(plain.quant_type, plain.block_size, plain.double_quant)
    is_embedding = isinstance(layer, QuantEmbed)
    return search(matrices, config, path, folder, is_embedding=is_embedding)


def _open_folders(
    resume_dir: str | os.PathLike[str] | None,
    model: nnx.Module,
    task: Task | None,
    layers: dict[str, Any],
    method: str,
    seed: int,
) -> _Folders:
    """Returns the folders of finished parts; see `open_folder`."""
    if resume_dir is None:
        return _Folders(None, None)
    state = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    batches = None if task is None else task.batches
    shared = open_folder(resume_dir, (state, batches, seed))
    formats = {}
    for path, layer in layers.items():
        q = _weight_of(layer).get_raw_value()
        formats[path] = q.quant_type, q.block_size, q.double_quant
    gradients = None
    if task is not None and method in FROM_GRADIENTS:
        gradients = open_folder(shared, [layer.path for layer in task.found])
    return _Folders(open_folder(shared, (formats, method)), gradients)


def _forget(x: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, with its sharding if it was placed there."""
    sharding = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _weight_of(layer: Any) -> Any:
    """Returns the variable with the weight of a layer, or the one that is a weight."""
    if isinstance(layer, nnx.Variable):
        return layer
    return layer.embedding if hasattr(layer, "embedding") else layer.kernel


def _check_arguments(
    model: Any,
    batches: Any,
    config: QuantConfig | str,
    method: str,
    rules: Sequence[Rule],
    apply: Any,
) -> None:
    surgery.check_model(model, "calibrate")
    check_choices(method, config, rules)
    if batches is None:
        if method == "mse":
            return
        raise ValueError(f'method="{method}" needs batches of data. {NEEDED}')
    if adapter_names(model):
        raise ValueError(
            f"{type(model).__name__} has adapters. Calibrate it before you add them, "
            "or merge them with jaxbnb.calibration.merge_calibrated"
        )
    if apply is None:
        check_language_model(
            model, "; give apply=lambda model, batch: ..., which returns logits"
        )
