"""Attention by the native CPU kernels, `_cpu/attend_dense.cc`, called by XLA."""

import math
from typing import Final

import jax
import numpy as np
from jaxtyping import Array, BFloat16, Bool

TARGET: Final = "jaxbnb_cpu_attend_dense"
GRADIENT_TARGET: Final = "jaxbnb_cpu_attend_dense_gradient"


def attend(
    q: BFloat16[Array, "*leading batch queries heads head_dim"],
    k: BFloat16[Array, "*leading batch keys kv_heads head_dim"],
    v: BFloat16[Array, "*leading batch keys kv_heads head_dim"],
    mask: Bool[Array, "*leading #batch queries keys"],
    *,
    scale: float,
) -> tuple[BFloat16[Array, "*leading batch queries heads head_dim"]]:
    """Computes attention. The caller has checked that the kernel supports it."""
    (out,) = _call(TARGET, [q], scale, q, k, v, mask)
    return (out,)


def gradient(
    q: BFloat16[Array, "*leading batch queries heads head_dim"],
    k: BFloat16[Array, "*leading batch keys kv_heads head_dim"],
    v: BFloat16[Array, "*leading batch keys kv_heads head_dim"],
    mask: Bool[Array, "*leading #batch queries keys"],
    d_out: BFloat16[Array, "*leading batch queries heads head_dim"],
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Computes the cotangents of ``q``, ``k`` and ``v``."""
    d_q, d_k, d_v = _call(GRADIENT_TARGET, [q, k, v], scale, q, k, v, mask, d_out)
    return d_q, d_k, d_v


def _call(
    target: str, like: list[Array], scale: float, *arrays: Array
) -> list[jax.Array]:
    """Calls a handler, with one axis of texts, for results ``like`` these arrays.

    A mask may serve several texts in a row.
    """
    results = [jax.ShapeDtypeStruct(_flatten(x).shape, x.dtype) for x in like]
    call = jax.ffi.ffi_call(target, results)
    outputs = call(*map(_flatten, arrays), scale=np.float32(scale))
    return [y.reshape(x.shape) for x, y in zip(like, outputs, strict=True)]


def _flatten(x: Array) -> Array:
    """Flattens all axes before those of queries or keys."""
    last = x.ndim - (2 if x.dtype == bool else 3)
    return x.reshape(math.prod(x.shape[:last]), *x.shape[last:])
