"""The rows of a blockwise-quantised matrix that are looked up, decoded."""

from jaxbnb_kernels.embed_blockwise.api import IMPLEMENTATIONS, embed_blockwise

__all__ = ["IMPLEMENTATIONS", "embed_blockwise"]
