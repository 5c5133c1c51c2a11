"""Chooses the codes of one matrix by any method, and reports on it."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jaxbnb.calibration._kept import recall
from jaxbnb.calibration._prepare import shrink_tiles
from jaxbnb.calibration._solver import (
    check_config,
    minimize_error,
    output_error,
    search_scales,
)
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.process_memory import peak_device_bytes
from jaxbnb.core.rules import Rule

Method = Literal["kronecker", "guided", "gptq", "mse"]
# Those that need a backward pass.
FROM_GRADIENTS: Final = ("kronecker", "guided")
Progress = Callable[[int, int, str], object]


class LayerReport(NamedTuple):
    """What calibration did with one matrix.

    Attributes:
        path: dotted path of the layer in the model.
        number: number of the layer in its stack; None outside of one.
        method: method that chose the codes. "mse" where the inputs of a layer could not
            be captured.
        absmax_error: squared error with the codes of `jaxbnb.quantize`, relative to the
            square. The error is in the layer's results as the method weighs them, or
            in the kernel if its inputs were not captured.
        error: the same with the codes that were chosen.
        seconds: time that it took to choose them.
        memory: most bytes that the first device had held by then, or the process on a
            CPU; None if unknown.
    """

    path: str
    number: int | None
    method: Method
    absmax_error: float
    error: float
    seconds: float
    memory: int | None


def check_choices(
    method: str, config: QuantConfig | str, rules: Sequence[Rule]
) -> None:
    """Raises ValueError for an unknown method, or a format without one."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    for chosen in (config, *(other for _, other in rules if other is not None)):
        check_config(chosen)


def put_like(x: Any, old: Any) -> jax.Array:
    """Puts an array where the old one is, or its shape says.

    An array that was not put on a device by the caller may go to any.
    """
    is_placed = old.sharding is not None and getattr(old, "committed", True)
    return jax.device_put(x, old.sharding) if is_placed else jnp.asarray(x)


def solve(
    kernel: Float[Array, "fan_in fan_out"],
    moment: Float32[Array, "fan_in fan_in"] | Float32[Array, " fan_in"],
    config: QuantConfig,
    where: tuple[str, int | None, Method],
    folder: Path | None,
    tiles: Float32[np.ndarray, "tiles t t"] | None = None,
) -> tuple[QuantizedArray, LayerReport]:
    """Quantises a kernel with the least error of its layer's results.

    Args:
        kernel: kernel.
        moment: second moment of its inputs, or its diagonal for "mse".
        config: format.
        where: path, number and method, for the report.
        folder: folder of finished parts, or None; see `recall`.
        tiles: second moment of the gradients by its results, for "kronecker".

    Returns:
        The kernel, in host memory, and the report.

    Raises:
        FloatingPointError: a moment is not finite.
    """
    path, number, method = where
    kernel, host = _gather(kernel), np.asarray(moment)

    def choose():
        for part in (host, tiles):
            if part is not None:
                check_moment(part, path, number, kernel.dtype)
        if method == "mse":
            return search_scales(kernel, config, host)
        return minimize_error(kernel, host, config, tiles)

    shrunk = None if tiles is None else shrink_tiles(tiles, kernel.shape[1])
    moments = host, shrunk
    return _choose(kernel, moments, config.quantize_kernel, choose, where, folder)


def check_moment(
    moment: np.ndarray, path: str, number: int | None, dtype: DTypeLike
) -> None:
    """Raises FloatingPointError if a moment is not finite.

    Args:
        moment: second moment of a layer's inputs, or its diagonal.
        path: path of the layer.
        number: number of the layer in its stack.
        dtype: dtype that the model computes in.
    """
    if not np.isfinite(moment).all():
        where = path if number is None else f"{path}, layer {number}"
        raise FloatingPointError(
            f"{where}: its inputs or gradients are not finite; does the model overflow "
            f"in {np.dtype(dtype)}?"
        )


def check_weights(weights: Iterable[tuple[str, Array]]) -> None:
    """Raises FloatingPointError if a weight is not finite.

    Args:
        weights: the path of each layer, and its matrix or a stack of them.
    """
    for path, weight in weights:
        is_finite = np.asarray(_is_finite(weight)).reshape(-1)
        if not is_finite.all():
            number = f", layer {is_finite.argmin()}" if weight.ndim > 2 else ""
            raise FloatingPointError(f"{path}{number}: its weights are not finite")


@jax.jit
def _is_finite(weight: Array) -> Array:
    return jnp.isfinite(weight).all(axis=(-2, -1))


def search(
    weight: Float[Array, "*batch fan_in fan_out"],
    config: QuantConfig,
    path: str,
    folder: Path | None,
    *,
    is_embedding: bool = False,
) -> Iterator[tuple[QuantizedArray, LayerReport]]:
    """Quantises matrices one by one with the least squared error of themselves.

    Args:
        weight: kernels, or an embedding, with blocks along its rows.
        config: format.
        path: path of the layer.
        folder: folder of finished parts, or None; see `recall`.
        is_embedding: whether it is an embedding.

    Yields:
        Each matrix, in host memory, and its report.
    """
    plain = config.quantize_embedding if is_embedding else config.quantize_kernel

    def choose(matrix):
        q = search_scales(matrix.mT if is_embedding else matrix, config)
        return q.mT if is_embedding else q

    one = jnp.ones(())
    for i in range(math.prod(weight.shape[:-2])):
        index = np.unravel_index(i, weight.shape[:-2])
        matrix = _gather(weight[tuple(map(int, index))])
        where = path, i if index else None, "mse"
        chosen = functools.partial(choose, matrix)
        yield _choose(matrix, (one, None), plain, chosen, where, folder)


def join(parts: Sequence[QuantizedArray], lead: tuple[int, ...]) -> QuantizedArray:
    """Returns a stack of quantised matrices, with these leading axes."""
    return jax.tree.map(lambda *x: np.stack(x).reshape(*lead, *x[0].shape), *parts)


def _gather(x: Array) -> Array:
    """Returns an array on one device: on all of a mesh, each would solve all of it."""
    x = jnp.asarray(x)
    return x if len(x.sharding.device_set) == 1 else jnp.asarray(np.asarray(x))


def _choose(
    weight: Array,
    moments: tuple[Array | np.ndarray, np.ndarray | None],
    quantize: Callable[[Any], QuantizedArray],
    choose: Callable[[], QuantizedArray],
    where: Any,
    folder: Path | None,
) -> tuple[QuantizedArray, LayerReport]:
    """Returns kept codes, or else those of ``choose``, compared with ``quantize``."""

    def compute():
        start = time.perf_counter()
        q = choose()
        errors = [
            float(output_error(weight, x, *moments)) for x in (quantize(weight), q)
        ]
        seconds, memory = time.perf_counter() - start, peak_device_bytes()
        figures = np.array([*errors, seconds, memory or 0])
        return [figures, *map(np.asarray, jax.tree.leaves(q))]

    path, number, method = where
    name = path if number is None else f"{path}.{number}"
    figures, *leaves = recall(folder, name, compute)
    absmax_error, error, seconds, memory = figures.tolist()
    structure = jax.tree.structure(jax.eval_shape(quantize, weight))
    return (
        jax.tree.unflatten(structure, leaves),
        LayerReport(
            path, number, method, absmax_error, error, seconds, int(memory) or None
        ),
    )
