"""Looks up rows of a blockwise-quantised matrix and decodes them."""

from jaxbnb_kernels.embed_blockwise.api import IMPLEMENTATIONS, embed_blockwise

__all__ = ["IMPLEMENTATIONS", "embed_blockwise"]
