"""Whether a training run fits on a GPU, before there is one."""

from jaxbnb.planning._plan import plan
from jaxbnb.planning._plot import plot_plan
from jaxbnb.planning._result import Change, Plan
from jaxbnb.planning._roofline import Roofline
from jaxbnb.planning._step import Setting
from jaxbnb.planning.collectives import collective_bytes
from jaxbnb.planning.gpus import GPUS, Gpu, find_gpu, parse_memory

__all__ = [
    "GPUS",
    "Change",
    "Gpu",
    "Plan",
    "Roofline",
    "Setting",
    "collective_bytes",
    "find_gpu",
    "parse_memory",
    "plan",
    "plot_plan",
]
