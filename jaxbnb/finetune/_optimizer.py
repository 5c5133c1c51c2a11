"""The optimizer and the learning rate of a `TrainConfig`."""

import inspect
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from jaxbnb.finetune._config import TrainConfig
from jaxbnb.finetune._optimizer_names import find_optimizer

# Names of variables that do not decay: of norms, and of biases.
_NO_DECAY: Final = ("bias", "scale")


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step: warm-up, then the schedule.

    Args:
        config: the run's config.
        steps: number of steps in the run.

    Example:
        >>> from jaxbnb.finetune import TrainConfig
        >>> config = TrainConfig(model="m", data="d", out="o", lr=1e-3, warmup=0.1)
        >>> rate = make_schedule(config, 20)
        >>> [round(float(rate(step)), 6) for step in (0, 1, 2, 11, 20)]
        [0.0005, 0.001, 0.001, 0.0005, 0.0]
    """
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    peak = config.lr
    assert peak is not None, "a TrainConfig chooses one"
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if warmup:
        # A first step with a rate of zero would learn nothing.
        rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        after = optax.join_schedules([rise, after], [warmup])
    # Optax multiplies ints with floats, which strict promotion refuses.
    return lambda count: after(jnp.asarray(count, jnp.float32))


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer that a config names."""
    make = find_optimizer(config.optimizer)
    accepted = inspect.signature(make).parameters
    if "weight_decay" in accepted:
        decay: dict[str, Any] = {"weight_decay": config.weight_decay}
        if config.weight_decay:
            is_lars = "weight_decay_mask" in accepted
            decay["weight_decay_mask" if is_lars else "mask"] = decays
        return make(schedule, **decay)
    if not config.weight_decay:
        return make(schedule)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decays), make(schedule)
    )


def decays(params: Any) -> Any:
    """Says for each parameter whether it decays: not in norms, and not biases.

    Shapes do not tell, because the layers' variables are stacked.

    Example:
        >>> decays({"norm": {"scale": 1.0}, "up_proj": {"kernel": 1.0, "bias": 1.0}})
        {'norm': {'scale': False}, 'up_proj': {'bias': False, 'kernel': True}}
    """

    def leaf(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        return not any(name in _NO_DECAY for name in names)

    return jax.tree_util.tree_map_with_path(leaf, params)
