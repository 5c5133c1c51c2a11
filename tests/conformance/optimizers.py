"""The table of every jaxbnb optimizer and its 32-bit twin in Optax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbnb
from jaxbnb import optim


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of the table.

    Attributes:
        factory: takes a learning rate, the options and those of `optim.Storage`.
        optax_factory: Optax's; takes a learning rate and the options.
        num_bytes: bytes of state per parameter, without absmax.
        options: not the defaults, so that an option without effect shows.
        state_bits: 8, 4 or "fp8".
        rate: learning rate that leads down a parabola and Rosenbrock's valley.
        elementwise: whether an element of the update depends on its own gradient only.
        strict: whether the arithmetic is jaxbnb's own; Optax's sometimes needs implicit
            promotions of dtypes.
    """

    factory: Callable[..., optax.GradientTransformation]
    optax_factory: Callable[..., optax.GradientTransformation]
    num_bytes: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    state_bits: int | str = 8
    rate: float = 0.1
    elementwise: bool = True
    strict: bool = True

    def make(self, rate=1e-2, **options):
        return self.factory(rate, **(self.options | options))

    def twin(self, rate=1e-2, **options):
        return self.optax_factory(rate, **(self.options | options))

    def without_decay(self, rate=1e-2, **options):
        if "weight_decay" in self.options:
            options["weight_decay"] = 0.0
        return self.make(rate, **options)


def quantized(twin, num_bytes, **row):
    """Returns the row of an Optax optimizer in `quantize_state`."""

    def factory(
        learning_rate, *, state_bits=None, block_size=None, min_quantized_size=None
    ):
        storage = {
            "state_bits": state_bits,
            "block_size": block_size,
            "min_quantized_size": min_quantized_size,
        }
        storage = {name: x for name, x in storage.items() if x is not None}
        return jaxbnb.quantize_state(twin(learning_rate), **storage)

    return Optimizer(factory, twin, num_bytes, strict=False, **row)


def _sgd_with_dampening(learning_rate, momentum, dampening):
    """Dampens every gradient except the first."""
    schedule = lambda count: jnp.where(count < 1, 1.0, 1 - dampening)  # noqa: E731
    return optax.chain(
        optax.scale_by_schedule(schedule), optax.sgd(learning_rate, momentum)
    )


def _schedule_free(learning_rate, *, state_bits=None, min_quantized_size=None):
    adam = jaxbnb.adam8bit(
        learning_rate,
        b1=0.0,
        state_bits=state_bits,
        min_quantized_size=min_quantized_size,
    )
    return optax.contrib.schedule_free(adam, learning_rate)


def _optax_schedule_free(learning_rate):
    adam = optax.adam(learning_rate, b1=0.0)
    return optax.contrib.schedule_free(adam, learning_rate)


_DECAY = {"weight_decay": 0.1}

OPTIMIZERS = {
    "adam8bit": Optimizer(jaxbnb.adam8bit, optax.adam, 2, {"eps": 1e-3}),
    "adam8bit nesterov": Optimizer(
        jaxbnb.adam8bit, optax.adam, 2, {"nesterov": True, "eps_root": 1e-3}
    ),
    "adamw8bit": Optimizer(
        jaxbnb.adamw8bit, optax.adamw, 2, {"b1": 0.8, "b2": 0.99, **_DECAY}
    ),
    "lion8bit": Optimizer(
        jaxbnb.lion8bit, optax.lion, 1, {"b1": 0.8, **_DECAY}, rate=5e-3
    ),
    "sgd8bit": Optimizer(jaxbnb.sgd8bit, optax.sgd, 1, {"momentum": 0.9}, rate=2e-3),
    "sgd8bit nesterov": Optimizer(
        jaxbnb.sgd8bit, optax.sgd, 1, {"momentum": 0.9, "nesterov": True}, rate=1e-3
    ),
    "sgd8bit dampening": Optimizer(
        jaxbnb.sgd8bit,
        _sgd_with_dampening,
        1,
        {"momentum": 0.9, "dampening": 0.25},
        rate=2e-3,
    ),
    "rmsprop8bit": Optimizer(
        jaxbnb.rmsprop8bit, optax.rmsprop, 1, {"eps": 1e-3}, rate=5e-3
    ),
    "rmsprop8bit centered": Optimizer(
        jaxbnb.rmsprop8bit, optax.rmsprop, 2, {"centered": True}, rate=3e-3
    ),
    "rmsprop8bit momentum": Optimizer(
        jaxbnb.rmsprop8bit,
        optax.rmsprop,
        2,
        {"momentum": 0.9, "nesterov": True},
        rate=3e-3,
    ),
    # `centered` is off, because the first variance would be pure rounding.
    "rmsprop8bit bias correction": Optimizer(
        jaxbnb.rmsprop8bit,
        optax.rmsprop,
        1,
        {
            "bias_correction": True,
            "eps_in_sqrt": False,
            "eps": 1e-2,
            "initial_scale": 0.5,
        },
        rate=5e-3,
    ),
    "adagrad8bit": Optimizer(
        jaxbnb.adagrad8bit, optax.adagrad, 1, {"eps": 1e-2}, rate=0.3
    ),
    "lamb8bit": Optimizer(
        jaxbnb.lamb8bit, optax.lamb, 2, _DECAY, rate=0.02, elementwise=False
    ),
    "lars8bit": Optimizer(
        jaxbnb.lars8bit,
        optax.lars,
        1,
        {"trust_coefficient": 0.1, **_DECAY},
        rate=0.03,
        elementwise=False,
    ),
    "ademamix8bit": Optimizer(
        optim.ademamix8bit,
        optax.contrib.ademamix,
        3,
        {
            "b3": optim.ademamix_b3_schedule(0.9, 0.99, 100),
            "alpha": optax.linear_schedule(0.0, 2.0, 100),
            **_DECAY,
        },
        rate=0.03,
    ),
    "muon8bit": Optimizer(
        optim.muon8bit,
        optax.contrib.muon,
        1,
        rate=0.01,
        elementwise=False,
        strict=False,
    ),
    "adam4bit": Optimizer(
        optim.adam4bit, optax.adam, 1, {"eps": 1e-3}, state_bits=4, strict=False
    ),
    "adamw4bit": Optimizer(
        optim.adamw4bit, optax.adamw, 1, _DECAY, state_bits=4, strict=False
    ),
    "adamw_fp8": Optimizer(
        optim.adamw_fp8, optax.adamw, 2, _DECAY, state_bits="fp8", strict=False
    ),
    "adafactor in 8 bits": quantized(optax.adafactor, 1, rate=0.03, elementwise=False),
    "adamax in 8 bits": quantized(optax.adamax, 2),
    "amsgrad in 8 bits": quantized(optax.amsgrad, 3),
    "yogi in 8 bits": quantized(optax.yogi, 2),
    "adan in 8 bits": quantized(optax.adan, 4, rate=0.01),
    "schedule_free adam8bit": Optimizer(
        _schedule_free, _optax_schedule_free, 6, rate=0.05
    ),
}


# --- Most tests step this: one leaf is quantised, with 22 blocks and a short one.


def normal(shape, seed=0, dtype=jnp.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def tree(seed):
    return {"w": normal((64, 80), seed), "b": normal((7,), seed + 1000)}


PARAMS, GRADIENTS = tree(0), [tree(t) for t in (1, 2, 3)]


def steps(tx, gradients=GRADIENTS, params=PARAMS):
    """Yields updates, parameters and state after each step, without compiling.

    Each operation then rounds by itself, so equal computations have equal bits. All
    optimizers share the compiled operations.
    """
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield updates, params, state


def last(tx, gradients=GRADIENTS, params=PARAMS):
    """Returns updates, parameters and state after the last step."""
    *_, result = steps(tx, gradients, params)
    return result


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_near(got, want, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, want
    )


def largest(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree) if x.size)
