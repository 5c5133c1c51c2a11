"""Muon with its momentum, and the moments of its Adam, in 8 bits."""

from typing import Any, Unpack

import optax

from jaxbnb.optim._arguments import (
    Storage,
    check_arguments,
    chosen_storage,
    takes_storage,
)
from jaxbnb.optim._forms import paged_form
from jaxbnb.optim._quantize_state import quantize_state


@takes_storage
def muon8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    muon: Any = None,
    **storage: Unpack[Storage],
) -> optax.GradientTransformationExtraArgs:
    """Muon with 8-bit state: a byte a parameter for matrices, two for the rest.

    Matrices take orthogonalised momentum, everything else AdamW, as in
    `optax.contrib.muon`.

    Args:
        learning_rate: fixed value or schedule.
        muon: dict of the other arguments of `optax.contrib.muon`, e.g.
            ``{"beta": 0.9, "weight_decay": 0.1}``.
        **storage: see `Storage`.

    Returns:
        An ``optax.GradientTransformation`` with a `QuantizedState`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> tx = jaxbnb.muon8bit(0.02, muon={"weight_decay": 0.1})
        >>> state = tx.init({"kernel": jnp.ones((64, 64))})
        >>> state.codes.inner_states["muon"].inner_state[0].mu["kernel"].dtype.name
        'uint8'

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    options = muon or {}
    check_arguments(optax.contrib.muon, options, name="muon8bit's muon")
    tx = optax.contrib.muon(learning_rate, **options)
    return quantize_state(tx, **chosen_storage(storage))


paged_muon8bit = paged_form(muon8bit)
