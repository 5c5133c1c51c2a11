"""Quantised weights that Equinox's filters take for integers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxbnb.core import QuantizedArray
from jaxbnb.core.parts import PARTS, apply_or_eval_shape


def freeze(q: QuantizedArray) -> QuantizedArray:
    """Views the float32 parts of a quantised array as their bits, in uint32.

    Equinox trains, decays and casts every floating array of a model
    (``eqx.is_inexact_array``), and changed absmax would be other weights.
    """
    return _view(q, jnp.float32, jnp.uint32)


def thaw(stored: QuantizedArray) -> QuantizedArray:
    """Inverts `freeze`."""
    return _view(stored, jnp.uint32, jnp.float32)


def _view(q: QuantizedArray, old: Any, new: Any) -> QuantizedArray:
    parts = {name: getattr(q, name) for name in PARTS}
    changed = {
        name: apply_or_eval_shape(
            lambda part: jax.lax.bitcast_convert_type(part, new), part
        )
        for name, part in parts.items()
        if part is not None and part.dtype == old
    }
    return dataclasses.replace(q, **changed)
