"""Code that the Mosaic GPU kernels share. It needs Pallas: only kernels import it."""
