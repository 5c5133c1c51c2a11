"""`jaxbnb bench`: the source of every speed and memory figure in the docs."""

from jaxbnb.benchmarks._adapters import bench_adapters
from jaxbnb.benchmarks._calibrate import bench_calibrate
from jaxbnb.benchmarks._calibrate_peers import bench_calibrate_peers
from jaxbnb.benchmarks._context import bench_context
from jaxbnb.benchmarks._convert import bench_convert
from jaxbnb.benchmarks._figure import Figure, machine
from jaxbnb.benchmarks._finetune import bench_finetune
from jaxbnb.benchmarks._generate import bench_generate
from jaxbnb.benchmarks._kernel_run import bench_kernels
from jaxbnb.benchmarks._layers import bench_layers
from jaxbnb.benchmarks._optim import bench_optim
from jaxbnb.benchmarks._parity import PARITY_OPTIMIZERS, bench_parity
from jaxbnb.benchmarks._perplexity import bench_perplexity
from jaxbnb.benchmarks._plan import bench_plan
from jaxbnb.benchmarks._quantize import bench_quantize
from jaxbnb.benchmarks._scaling import bench_scaling
from jaxbnb.benchmarks._sharding import bench_sharding

BENCHMARKS = {
    "quantize": bench_quantize,
    "optim": bench_optim,
    "layers": bench_layers,
    "scaling": bench_scaling,
    "kernels": bench_kernels,
    "generate": bench_generate,
    "perplexity": bench_perplexity,
    "calibrate": bench_calibrate,
    "calibrate-peers": bench_calibrate_peers,
    "convert": bench_convert,
    "parity": bench_parity,
    "adapters": bench_adapters,
    "context": bench_context,
    "plan": bench_plan,
    "sharding": bench_sharding,
    "finetune": bench_finetune,
}

__all__ = [
    "BENCHMARKS",
    "PARITY_OPTIMIZERS",
    "Figure",
    "bench_adapters",
    "bench_calibrate",
    "bench_calibrate_peers",
    "bench_context",
    "bench_convert",
    "bench_finetune",
    "bench_generate",
    "bench_kernels",
    "bench_layers",
    "bench_optim",
    "bench_parity",
    "bench_perplexity",
    "bench_plan",
    "bench_quantize",
    "bench_scaling",
    "bench_sharding",
    "machine",
]
