"""fit_adapter: starts an adapter from what quantisation took from its layers."""

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Float64

from jaxbnb.calibration._batches import check_language_model
from jaxbnb.calibration._matrix import Progress, check_moment, put_like
from jaxbnb.calibration._moments import find_kernels, prepare, stream_moments
from jaxbnb.calibration._prepare import damping_of
from jaxbnb.core import QuantizedArray
from jaxbnb.lora import LoraLinear
from jaxbnb.nnx import surgery

# Norm of a column of A as add_adapter draws it. With a norm as small as that of what
# is missing, B would hardly move in training.
_COLUMN_NORM: Final = 3**-0.5


class FittedLayer(NamedTuple):
    """What an adapter makes up for in one layer.

    Attributes:
        path: dotted path of the layer in the model.
        number: number of the layer in its stack; None outside of one.
        error: squared error of the layer's results with the adapter, relative to the
            error without it, as the method weighs it.
    """

    path: str
    number: int | None
    error: float


def fit_adapter(
    model: nnx.Module,
    reference: nnx.Module,
    batches: Iterable[Any],
    *,
    name: str = "default",
    method: Literal["guided", "gptq"] = "guided",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[FittedLayer]:
    r"""Starts an adapter from what quantisation took from its layers, in place.

    An adapter begins as an update of zero, and training first makes up for errors of
    the quantised base. This starts it from the update of rank ``r`` that brings the
    results of each layer closest to those of the reference, on the text:

    .. math::
        \min_{A, B} \; \mathrm{tr}\,(W - Q - s A B)^\top H (W - Q - s A B)

    with the second moment :math:`H` of `calibrate`. It is the singular value
    decomposition of the error, weighed by a factor of :math:`H`. "loftq" of
    `jaxbnb.lora.LoraConfig` weighs all inputs alike, and needs no text.

    What the adapter held before is lost. Adapters of layers that are not an
    ``nnx.Linear`` of the reference, or that a batch does not use, stay as they are. The
    base stays as it is, so that a saved adapter fits every copy of it.

    Args:
        model: a language model with quantised layers and an adapter.
        reference: the model before it was quantised.
        batches: text as for `calibrate`; it may be the same text.
        name: name of the adapter.
        method: "guided" or "gptq"; see `calibrate`.
        seed: seed of the labels of "guided".
        progress: called as ``progress(done, total, what)``.

    Returns:
        The share of the error that is left in each layer.

    Raises:
        TypeError: one of the two is not a language model, or a batch does not hold
            integers.
        ValueError: there are no batches, ``method`` is unknown, or no linear layer has
            an adapter of this name.
        FloatingPointError: the inputs of a layer, or its gradients, are not finite.

    Example:
        >>> import jax, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.calibration import compare, fit_adapter
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> reference = CausalLM(config, rngs=nnx.Rngs(0))
        >>> model = nnx.merge(*nnx.split(reference))
        >>> _ = jaxbnb.nnx.quantize_model(model, "nf4")
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(r=8), rngs=nnx.Rngs(1))
        >>> text = jax.random.randint(jax.random.key(0), (4, 2, 32), 0, 64)
        >>> before = compare(model, reference, text).kl
        >>> layers = fit_adapter(model, reference, text)
        >>> max(layer.error for layer in layers) < 0.9
        True
        >>> compare(model, reference, text).kl < 0.9 * before
        True

    References:
        Zhang et al., QERA: an Analytical Framework for Quantization Error
        Reconstruction, 2024, theorem 1.
    """
    for each in (model, reference):
        check_language_model(each)
    if method not in ("guided", "gptq"):
        raise ValueError(f"method must be 'guided' or 'gptq', got {method!r}")
    layers: dict[str, Any] = {
        path: module
        for path, _, _, module in surgery.iter_children(model)
        if isinstance(module, LoraLinear) and name in module.adapters
    }
    if not layers:
        raise ValueError(f"no linear layer has an adapter {name!r}; add one first")
    task = prepare(reference, batches, None, [*layers])
    kernels = find_kernels(reference, task)
    total = sum(x.shape[0] if x.ndim > 2 else 1 for x in kernels.values())
    factors = {path: _copy_factors(layers[path].adapters[name]) for path in kernels}
    fitted: list[FittedLayer] = []
    for layer, number, moment, _ in stream_moments(
        reference, task, method, seed, None, progress
    ):
        path, at = layer.path, () if number is None else number
        adapter = layers[path].adapters[name]
        base = layers[path].base.kernel.get_raw_value()
        missing = _decode(kernels[path], number) - _decode(base, number)
        scale = float(adapter.scale[...][at])
        rank = adapter.ranks[number or 0]
        host = np.asarray(moment, np.float64)
        check_moment(host, path, number, kernels[path].dtype)
        a, b, error = _fit(missing, host, rank, scale)
        whole_a, whole_b = factors[path]
        whole_a[at][:, : a.shape[1]] = a
        whole_b[at][: len(b)] = b
        fitted.append(FittedLayer(path, number, error))
        if progress is not None:
            progress(len(fitted), total, path)
    for path, (a, b) in factors.items():
        adapter = layers[path].adapters[name]
        layers[path].set_factors(
            name,
            put_like(a, adapter.lora_a.get_value()),
            put_like(b, adapter.lora_b.get_value()),
        )
    return fitted


def _fit(
    missing: Float64[np.ndarray, "fan_in fan_out"],
    moment: Float64[np.ndarray, "fan_in fan_in"],
    rank: int,
    scale: float,
) -> tuple[
    Float64[np.ndarray, "fan_in rank"], Float64[np.ndarray, "rank fan_out"], float
]:
    """Returns the best factors of a rank, and the share of the error that they leave.

    With H = L L^T, the error of an update U is the square of L^T (M - U), which the
    largest singular values of L^T M minimise. With their left vectors X, the columns of
    A = L^-T X are orthonormal in H, and then the best B is A^T H M.
    """
    moment = moment + damping_of(moment) * np.eye(len(moment))
    lower = np.linalg.cholesky(moment)
    seen = lower.T @ missing
    before = np.sum(seen**2)
    # Nothing is missing, or nothing can make up for it.
    rank = min(rank, *missing.shape) if before and scale else 0
    if not rank:
        return np.zeros((len(missing), 0)), np.zeros((0, missing.shape[1])), 1.0
    left = _left_vectors(seen, rank)
    b = left.T @ seen
    a = scipy.linalg.solve_triangular(lower, left, lower=True, trans=1)
    norms = np.linalg.norm(a, axis=0) / _COLUMN_NORM
    error = 1 - np.sum(b**2) / before
    return a / norms, b * norms[:, None] / scale, float(error)


def _left_vectors(
    x: Float64[np.ndarray, "m n"], count: int
) -> Float64[np.ndarray, "m count"]:
    """Returns an orthonormal basis of the largest left singular vectors.

    They are eigenvectors of the smaller one of two squares, which take a fraction of
    the time of the whole decomposition. Squares lose digits of small values only.
    """
    if x.shape[0] <= x.shape[1]:
        return _top_vectors(x @ x.T, count)
    return np.linalg.qr(x @ _top_vectors(x.T @ x, count))[0]


def _top_vectors(
    square: Float64[np.ndarray, "n n"], count: int
) -> Float64[np.ndarray, "n count"]:
    last = len(square) - 1
    return scipy.linalg.eigh(square, subset_by_index=(last + 1 - count, last))[1]


def _decode(kernel: Any, number: int | None) -> Float64[np.ndarray, "fan_in fan_out"]:
    """Returns one matrix of a kernel, or of a stack of them."""
    one = kernel if number is None else jax.tree.map(lambda x: x[number], kernel)
    if isinstance(one, QuantizedArray):
        one = one.dequantize(jnp.float32)
    return np.asarray(one, np.float64)


def _copy_factors(adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns copies of an adapter's factors in host memory."""
    return np.array(adapter.lora_a.get_value()), np.array(adapter.lora_b.get_value())
