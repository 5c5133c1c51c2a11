"""Optimizers with low-bit state, as Optax transformations."""

from jaxbnb.optim._adagrad import (
    ScaleByRss8bitState,
    adagrad8bit,
    paged_adagrad8bit,
    scale_by_rss8bit,
)
from jaxbnb.optim._adam import (
    ScaleByAdam8bitState,
    adam4bit,
    adam8bit,
    adamw4bit,
    adamw8bit,
    adamw_fp8,
    paged_adam8bit,
    paged_adamw8bit,
    scale_by_adam8bit,
)
from jaxbnb.optim._ademamix import (
    ScaleByAdemamix8bitState,
    ademamix8bit,
    ademamix_b3_schedule,
    paged_ademamix8bit,
    scale_by_ademamix8bit,
)
from jaxbnb.optim._arguments import Storage
from jaxbnb.optim._check_state import StateMismatchError
from jaxbnb.optim._clipping import PercentileClippingState, percentile_clipping
from jaxbnb.optim._convert_state import decode_state, encode_state
from jaxbnb.optim._lamb import lamb8bit, paged_lamb8bit
from jaxbnb.optim._lion import (
    ScaleByLion8bitState,
    lion8bit,
    paged_lion8bit,
    scale_by_lion8bit,
)
from jaxbnb.optim._momentum import (
    Trace8bitState,
    lars8bit,
    paged_lars8bit,
    paged_sgd8bit,
    sgd8bit,
    trace8bit,
)
from jaxbnb.optim._muon import muon8bit, paged_muon8bit
from jaxbnb.optim._paged import paged, unpage
from jaxbnb.optim._per_parameter import per_parameter
from jaxbnb.optim._quantize_state import QuantizedState, quantize_state
from jaxbnb.optim._rmsprop import (
    ScaleByRms8bitState,
    ScaleByStddev8bitState,
    paged_rmsprop8bit,
    rmsprop8bit,
    scale_by_rms8bit,
    scale_by_stddev8bit,
)
from jaxbnb.optim._state_table import state_table
from jaxbnb.optim._stochastic import (
    StochasticRoundingState,
    apply_updates_stochastic,
    stochastic_rounding,
)
from jaxbnb.optim._transformation import fused_step

__all__ = [
    "PercentileClippingState",
    "QuantizedState",
    "ScaleByAdam8bitState",
    "ScaleByAdemamix8bitState",
    "ScaleByLion8bitState",
    "ScaleByRms8bitState",
    "ScaleByRss8bitState",
    "ScaleByStddev8bitState",
    "StateMismatchError",
    "StochasticRoundingState",
    "Storage",
    "Trace8bitState",
    "adagrad8bit",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "adamw_fp8",
    "ademamix8bit",
    "ademamix_b3_schedule",
    "apply_updates_stochastic",
    "decode_state",
    "encode_state",
    "fused_step",
    "lamb8bit",
    "lars8bit",
    "lion8bit",
    "muon8bit",
    "paged",
    "paged_adagrad8bit",
    "paged_adam8bit",
    "paged_adamw8bit",
    "paged_ademamix8bit",
    "paged_lamb8bit",
    "paged_lars8bit",
    "paged_lion8bit",
    "paged_muon8bit",
    "paged_rmsprop8bit",
    "paged_sgd8bit",
    "per_parameter",
    "percentile_clipping",
    "quantize_state",
    "rmsprop8bit",
    "scale_by_adam8bit",
    "scale_by_ademamix8bit",
    "scale_by_lion8bit",
    "scale_by_rms8bit",
    "scale_by_rss8bit",
    "scale_by_stddev8bit",
    "sgd8bit",
    "state_table",
    "stochastic_rounding",
    "trace8bit",
    "unpage",
]
