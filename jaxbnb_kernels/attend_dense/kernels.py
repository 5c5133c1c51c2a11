"""How the kernels are called: chosen for the device, and divided among devices."""

import functools

from jaxtyping import Array, Bool, Float

from jaxbnb_kernels import _partition, _selection
from jaxbnb_kernels._batching import over_leading_axes
from jaxbnb_kernels.attend_dense import cpu, xla


def attend(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    scale: float,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> Float[Array, "batch queries heads head_dim"]:
    """See `attend_dense`; raises an error if no kernel supports the call."""
    (out,) = _selection.choose(
        _selection.serving(kinds, cpu=lambda: cpu.supported(cpu.ATTEND, q.dtype)),
        _attend_portable,
        *(q, k, v, mask),
        is_required=is_required,
        divided=_attend_divided,
        scale=scale,
    )
    return out


def gradient(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    d_out: Float[Array, "batch queries heads head_dim"],
    scale: float,
    *,
    kinds: tuple[str, ...],
    is_required: bool,
) -> tuple[Array, Array, Array]:
    """Computes the cotangents of ``q``, ``k`` and ``v``; errors as in `attend`."""
    d_q, d_k, d_v = _selection.choose(
        _selection.serving(kinds, cpu=lambda: cpu.supported(cpu.GRADIENT, q.dtype)),
        _gradient_portable,
        *(q, k, v, mask, d_out),
        is_required=is_required,
        divided=_gradient_divided,
        scale=scale,
    )
    return d_q, d_k, d_v


def _attend_portable(q, k, v, mask, *, scale):
    by_xla = functools.partial(xla.attend, scale=scale)
    return (over_leading_axes(by_xla, q.ndim - 4, q, k, v, mask),)


def _gradient_portable(q, k, v, mask, d_out, *, scale):
    by_xla = functools.partial(xla.gradient, scale=scale)
    return over_leading_axes(by_xla, q.ndim - 4, q, k, v, mask, d_out)


def _attend_divided(kernel, q, k, v, mask, *, scale):
    heads, of_mask = _name_axes(q, mask)
    axes = _partition.Axes((heads, heads, heads, of_mask), (heads,))
    attend = functools.partial(kernel, scale=scale)
    return _partition.divide(attend, axes, q, k, v, mask)


def _gradient_divided(kernel, q, k, v, mask, d_out, *, scale):
    heads, of_mask = _name_axes(q, mask)
    axes = _partition.Axes((heads, heads, heads, of_mask, heads), (heads,) * 3)
    gradient = functools.partial(kernel, scale=scale)
    return _partition.divide(gradient, axes, q, k, v, mask, d_out)


def _name_axes(q, mask) -> tuple[_partition.Names, _partition.Names]:
    """Returns the names of the axes of arrays of heads, and of the mask."""
    leading = _partition.leading(q.ndim - 4)
    batch = "batch" if mask.shape[-3] == q.shape[-4] else None
    return (
        (*leading, "batch", None, "heads", None),
        (*leading, batch, None, None),
    )
