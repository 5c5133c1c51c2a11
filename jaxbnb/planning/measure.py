"""The peak of a step that runs on a GPU of this machine."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbnb.finetune import train_step
from jaxbnb.planning._step import Setting, make_shapes, read_source


def measure_peak(model: Any, setting: Setting) -> int:
    """Runs two steps on weights of zeros, and returns the largest memory in use.

    Args:
        model: see `jaxbnb.plan`.
        setting: the run.

    Raises:
        NotImplementedError: this machine has no GPU, or does not count its memory.
    """
    device = jax.local_devices()[0]
    if device.platform != "gpu" or not device.memory_stats():
        raise NotImplementedError(
            "--measure runs steps on a GPU, and JAX finds none on this machine"
        )
    shapes = make_shapes(read_source(model, setting), setting)
    trainable, frozen = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (shapes.trainable, shapes.frozen)
    )
    opt_state = shapes.tx.init(trainable)
    step = jax.jit(
        train_step(shapes.graphdef, shapes.tx, remat=setting.remat),
        donate_argnums=(0, 1),
    )
    tokens = jnp.zeros((setting.batch, setting.seq), jnp.int32)
    for _ in range(2):
        trainable, opt_state, loss = step(trainable, opt_state, frozen, tokens)
        jax.block_until_ready(loss)
    return device.memory_stats()["peak_bytes_in_use"]
