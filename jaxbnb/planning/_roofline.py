"""The least time that a step can take, by arithmetic and by memory."""

import dataclasses
import math

from jax.sharding import AbstractMesh

from jaxbnb.core import tree_nbytes
from jaxbnb.models import DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning._estimate import count_row_parts
from jaxbnb.planning._step import Setting, Shapes
from jaxbnb.planning.gpus import Gpu


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least that a step takes on one device.

    Attributes:
        flops: floating-point operations of the products; None if they are not known.
        bytes: bytes that cross the memory at least: weights in each pass, trained
            variables, state, and kept inputs.
        seconds: the larger of both times; None if the GPU's speed is not known.
        bound: "arithmetic" or "memory", whichever is larger.
    """

    flops: int | None
    bytes: int
    seconds: float | None
    bound: str | None


def make_roofline(
    config: DecoderConfig | None,
    shapes: Shapes,
    setting: Setting,
    gpu: Gpu,
    mesh: AbstractMesh,
) -> Roofline:
    """Counts the operations and bytes of a device's part of a step.

    What devices send to each other is left out.

    The forward pass reads each weight once, the backward pass again for the gradient of
    its input and once more if it computes products again. Training all parameters adds
    a product for each weight's own gradient.
    """
    how = Remat.of(setting.remat)
    runs = 2 if how is None else 3
    passes = 2 if how is None or how.products else 3
    sizes = shapes.bytes_on(mesh)
    # Devices along "fsdp" divide weights, but each one uses all of them.
    used = tree_nbytes(shapes.frozen) + tree_nbytes(shapes.trainable)
    parts = math.prod(mesh.shape.get(name, 1) for name in ("tensor", "expert"))
    moved = passes * used // parts
    moved += 2 * sizes["optimizer"] + 2 * sizes["adapters"]
    flops = None
    if config is not None:
        rows = setting.batch // count_row_parts(mesh.shape)
        tokens = rows * setting.seq
        moved += 4 * config.num_hidden_layers * tokens * config.hidden_size
        products = passes + (setting.rank is None)
        flops = 2 * tokens * count_weights(config) * products // parts
        # Scores and their products with the values, for half of all pairs.
        pairs = rows * setting.seq**2 // 2
        heads = config.num_attention_heads * config.head_dim
        heads //= mesh.shape.get("tensor", 1)
        flops += 4 * pairs * heads * config.num_hidden_layers * (runs + 1)
    if gpu.flops is None or gpu.bandwidth is None or flops is None:
        return Roofline(flops, moved, None, None)
    times = {"arithmetic": flops / gpu.flops, "memory": moved / gpu.bandwidth}
    bound = max(times, key=lambda name: times[name])
    return Roofline(flops, moved, times[bound], bound)


def count_weights(config: DecoderConfig) -> int:
    """Counts the weights that each token is multiplied with, in layers and head."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim
    matrices = 3 if config.gated_mlp else 2
    mlp = matrices * config.hidden_size * config.intermediate_size
    mlp *= config.num_experts_per_tok or 1
    layers = config.num_hidden_layers * (attention + mlp)
    return layers + config.hidden_size * config.vocab_size
