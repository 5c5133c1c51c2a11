"""How the kernel is called: chosen for the device, and divided among devices."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels.matmul_dense import cpu, xla


def matmul(
    x: Float[Array, "*batch k"],
    weight: Float[Array, "rows size"],
    transpose: bool,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "*batch n"]:
    """See `matmul_dense`; raises an error if no kernel supports the call."""
    kernels = _selection.serving(kinds, cpu=lambda: cpu.multiplier(weight.dtype))
    (product,) = _selection.choose(
        kernels,
        _matmul_portable,
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
        weight,
        is_required=is_required,
        should_broadcast=False,
        divided=_matmul_divided,
        transpose=transpose,
    )
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _matmul_portable(x, weight, *, transpose):
    by_xla = functools.partial(xla.matmul, transpose=transpose)
    return (over_leading_axes(by_xla, weight.ndim - 2, x, weight),)


def _matmul_divided(kernel, x, weight, *, transpose):
    multiply = functools.partial(kernel, transpose=transpose)
    x_name, y_name = ("size", "rows") if transpose else ("rows", "size")
    axes = _partition.of_matrices(
        (x.shape, weight.shape), (("m", x_name), ("rows", "size"), ("m", y_name))
    )

    def unrounded(x, weight):
        # The result has the dtype of x, here that of the sums.
        return multiply(x.astype(jnp.float32), weight)

    return _partition.divide(multiply, axes, x, weight, unrounded=unrounded)
