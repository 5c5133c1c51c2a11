"""A step of AdamW on 16.8 million float32 parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbnb.benchmarks._figure import Figure, installed
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.core import tree_nbytes
from jaxbnb.optim import adamw8bit

SHAPE = (4096, 4096)


def bench_optim() -> Iterator[Figure]:
    """adamw8bit beside optax.adamw and bitsandbytes' AdamW8bit."""
    functions: dict[str, Callable[[], Any]] = {
        "jaxbnb": _stepper(adamw8bit(1e-3)),
        "optax": _stepper(optax.adamw(1e-3)),
    }
    if installed("torch", "bitsandbytes"):
        functions["bitsandbytes"] = _bitsandbytes()
    times = time_together(functions, rounds=15)
    detail = ", ".join(f"{name} {milliseconds(t)}" for name, t in times.items())
    name = "adamw8bit step"
    value = ratio(times["jaxbnb"], times["optax"])
    yield Figure(name, value, "x optax.adamw's time", 2.5, detail)
    if "bitsandbytes" in times:
        value = ratio(times["jaxbnb"], times["bitsandbytes"])
        yield Figure(name, value, "x bitsandbytes' time", 0.5, detail)
    params = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    state = jax.eval_shape(adamw8bit(1e-3).init, params)
    value = tree_nbytes(state) / params.size
    yield Figure("adamw8bit state", value, "bytes a parameter", 2.1)


def _stepper(tx: optax.GradientTransformation) -> Callable[[], jax.Array]:
    """A function that takes one step each time it is called.

    Parameters and state are donated, the gradient is kept.
    """
    params = jax.random.normal(jax.random.key(0), SHAPE)
    grads = 0.1 * jax.random.normal(jax.random.key(1), SHAPE)
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def call():
        nonlocal params, state
        params, state = jitted(params, state, grads)
        return params

    return call


def _bitsandbytes() -> Callable[[], None]:
    import torch
    from bitsandbytes.optim.adamw import AdamW8bit

    param = torch.nn.Parameter(torch.randn(SHAPE))
    param.grad = 0.1 * torch.randn(SHAPE)
    return AdamW8bit([param], lr=1e-3).step
