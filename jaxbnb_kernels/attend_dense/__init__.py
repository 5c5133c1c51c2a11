"""Attention of few queries and keys, faster than XLA's on a CPU."""

from jaxbnb_kernels.attend_dense.api import IMPLEMENTATIONS, attend_dense

__all__ = ["IMPLEMENTATIONS", "attend_dense"]
