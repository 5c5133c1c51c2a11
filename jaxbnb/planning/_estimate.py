"""The peak of a step without a compiler: what is held, and what works beside it."""

from typing import Final

from jaxbnb.models import DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning._step import Setting, Shapes

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


def estimate_peak(
    config: DecoderConfig | None, shapes: Shapes, setting: Setting, devices: int
) -> int:
    """Estimates the peak of a device's memory; see docs/plan.md for the formula.

    Raises:
        NotImplementedError: the model is not a `CausalLM`, so its layers are unknown.
    """
    if config is None:
        raise NotImplementedError(
            "the peak of a model that is not a jaxbnb.models.CausalLM is not "
            "estimated, only compiled: install JAX's CUDA plugin, and plan for one GPU"
        )
    sizes = shapes.bytes
    is_paged = setting.optimizer.startswith("paged_")
    state = 0 if is_paged else sizes["optimizer"]
    gradients = _GRADIENTS * sizes["adapters"]
    held = (sizes["weights"] + sizes["adapters"] + state + gradients) / devices
    return round(held + estimate_work(config, setting))


def estimate_work(config: DecoderConfig, setting: Setting) -> float:
    """Returns the bytes of activations and decoded matrices at the peak."""
    width = 4 if setting.dtype == "float32" else 2
    tokens = setting.batch * setting.seq
    hidden, features = config.hidden_size, config.intermediate_size
    kept = tokens * width * _count_kept(config, setting)
    part = min(tokens, _PART)
    layer = 4 * _HIDDEN * tokens * hidden + width * _FEATURES * part * features
    if setting.quant not in (None, "llm_int8"):
        layer += width * _DECODED * hidden * features
    if setting.rank is None:
        layer += 4 * hidden * config.vocab_size
    return kept + layer


def _count_kept(config: DecoderConfig, setting: Setting) -> float:
    """Returns how many numbers the backward pass keeps for each token."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if setting.remat is False:
        return layers * (_ALL[0] * hidden + _ALL[1] * config.intermediate_size)
    if not isinstance(setting.remat, Remat):
        return layers * hidden
    if setting.remat.offload:
        return 0
    return hidden * (layers / setting.remat.every + setting.remat.every)
