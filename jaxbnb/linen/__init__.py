"""Quantised layers for Flax Linen."""

from jaxbnb.linen._dense import QuantDense

__all__ = ["QuantDense"]
