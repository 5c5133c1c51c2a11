"""`jaxbnb bench`: every speed and memory figure of the docs comes out of here."""

from jaxbnb.benchmarks._figure import Figure, machine
from jaxbnb.benchmarks._layers import bench_layers
from jaxbnb.benchmarks._optim import bench_optim
from jaxbnb.benchmarks._perplexity import bench_perplexity
from jaxbnb.benchmarks._quantize import bench_quantize

BENCHMARKS = {
    "quantize": bench_quantize,
    "optim": bench_optim,
    "layers": bench_layers,
    "perplexity": bench_perplexity,
}

__all__ = [
    "BENCHMARKS",
    "Figure",
    "bench_layers",
    "bench_optim",
    "bench_perplexity",
    "bench_quantize",
    "machine",
]
