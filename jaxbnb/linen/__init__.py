"""Quantised layers for Flax Linen, and an embedding for low-bit optimizers."""

from jaxbnb.linen._dense import QuantDense
from jaxbnb.linen._embed import QuantEmbed
from jaxbnb.linen._stable_embed import StableEmbed, StateBits, with_state_bits

__all__ = ["QuantDense", "QuantEmbed", "StableEmbed", "StateBits", "with_state_bits"]
