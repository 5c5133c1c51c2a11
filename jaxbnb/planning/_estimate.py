"""The peak of a step without a compiler: what is held, and what works beside it."""

import math
from collections.abc import Mapping
from typing import Final

from jaxbnb.models import DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning._step import Setting
from jaxbnb.sharding.activations import BATCH_AXES

# Tokens in a part of the MLP, as in jaxbnb.models.
_PART: Final = 2048
# Fitted to compiled steps: see docs/plan.md, which has the cases and their errors.
# Decoded matrices, as large as the largest, that exist at once.
_DECODED: Final = 3.3
# float32 arrays of (tokens, hidden) in a layer's backward pass.
_HIDDEN: Final = 7.5
# Arrays of (tokens in a part, features of the MLP) there.
_FEATURES: Final = 9.1
# Arrays of (tokens, hidden) and (tokens, features) that a layer keeps if it is not
# computed again.
_ALL: Final = (20.5, 4.4)
# Gradients of the trained variables, and what the optimizer needs beside them.
_GRADIENTS: Final = 1.2
# float32 arrays, as large as the largest trained one, in an update of 8-bit moments:
# for several GPUs, XLA updates several parameters at once. On one GPU, that is so with
# stochastic rounding only.
_MOMENTS: Final = 4.9
_ROUNDED: Final = 2.9


def estimate_peak(
    config: DecoderConfig | None,
    sizes: Mapping[str, int],
    setting: Setting,
    axes: Mapping[str, int],
) -> int:
    """Estimates the peak of a device's memory; see docs/plan.md for the formula.

    Args:
        config: sizes of the model.
        sizes: bytes of each part of the step on a device.
        setting: the run.
        axes: axes of the mesh and their sizes.

    Raises:
        NotImplementedError: the model is not a `CausalLM`, so its layers are unknown.
    """
    if config is None:
        raise NotImplementedError(
            "the peak of a model that is not a jaxbnb.models.CausalLM is not "
            "estimated, only compiled: install JAX's CUDA plugin, and plan for one GPU"
        )
    is_paged = setting.optimizer.startswith("paged_")
    held = sizes["weights"] + sizes["adapters"]
    held += 0 if is_paged else sizes["optimizer"]
    work = estimate_work(config, setting, axes)
    peak = held + _GRADIENTS * sizes["adapters"] + work
    is_rounded = setting.rank is None and setting.dtype != "float32"
    several = math.prod(axes.values()) > 1
    if (several or is_rounded) and not is_paged and setting.optimizer != "adamw":
        # Activations are gone when the optimizer decodes its moments.
        moments = _MOMENTS if several else _ROUNDED
        peak = max(peak, held + sizes["adapters"] + moments * sizes["largest"])
    return round(peak)


def estimate_work(
    config: DecoderConfig, setting: Setting, axes: Mapping[str, int]
) -> float:
    """Returns the bytes of activations and decoded matrices at a device's peak."""
    width = 4 if setting.dtype == "float32" else 2
    tokens = setting.batch * setting.seq // count_row_parts(axes)
    # Heads, features and the vocabulary are divided among the devices of this axis.
    tensor = axes.get("tensor", 1)
    hidden, features = config.hidden_size, config.intermediate_size // tensor
    kept = tokens * width * _count_kept(config, setting, tensor)
    part = min(tokens, _PART)
    layer = 4 * _HIDDEN * tokens * hidden + width * _FEATURES * part * features
    if setting.quant not in (None, "llm_int8"):
        layer += width * _DECODED * hidden * features
    if setting.rank is None:
        layer += 4 * hidden * config.vocab_size / tensor
    return kept + layer


def count_row_parts(axes: Mapping[str, int]) -> int:
    """Returns how many parts a mesh divides the rows of a batch into."""
    return math.prod(axes.get(name, 1) for name in BATCH_AXES)


def _count_kept(config: DecoderConfig, setting: Setting, tensor: int) -> float:
    """Returns how many numbers the backward pass keeps for each token."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    remat = Remat.of(setting.remat)
    if remat is None:
        features = config.intermediate_size / tensor
        return layers * (_ALL[0] * hidden + _ALL[1] * features)
    inputs = 0 if remat.offload else layers / remat.every
    if remat.every > 1:
        inputs, layers = inputs + remat.every, remat.every
    products = layers * _count_products(config, tensor) if remat.products else 0
    return hidden * inputs + products


def _count_products(config: DecoderConfig, tensor: int) -> float:
    """Returns the numbers in the results of a layer's products, as they are kept.

    That of the last one is not, because the next layer's input is. Experts keep none.
    """
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    count = heads * config.head_dim / tensor + config.hidden_size
    if not config.num_experts:
        count += (1 + config.gated_mlp) * config.intermediate_size / tensor
    return count
