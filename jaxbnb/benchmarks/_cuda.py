"""bitsandbytes' own kernels, timed where PyTorch has a GPU.

Each function gives calls by name, or none where they cannot run. A call takes the next
of several sets of arguments, so that none is in a cache.
"""

import itertools
import math
from collections.abc import Callable

from jaxbnb.benchmarks._figure import is_installed

Call = Callable[[], object]
CALLS = 16
# As of the benchmark's other arguments: a cache holds 50 MB.
COLD_BYTES = 2**28


def is_available() -> bool:
    """Whether bitsandbytes is installed and PyTorch has a GPU."""
    if not is_installed("torch", "bitsandbytes"):
        return False
    import torch

    return torch.cuda.is_available()


def device_seconds(call: Call) -> float:
    """The mean time of a call's kernels, without what is between them."""
    import torch

    call()
    torch.cuda.synchronize()
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    microseconds = sum(e.self_device_time_total for e in profile.key_averages())
    return 1e-6 * microseconds / CALLS


def blockwise(shape: tuple[int, int]) -> dict[str, Call]:
    """To quantise a bfloat16 matrix to NF4, and to dequantise it."""
    if not is_available():
        return {}
    import bitsandbytes.functional as bnb
    import torch

    count = _count(2 * math.prod(shape))
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    dense = [torch.randn(shape, **options) for _ in range(count)]
    packed = [bnb.quantize_4bit(x, blocksize=64, quant_type="nf4") for x in dense]
    return {
        "NF4 quantise": _in_turn(
            [(x,) for x in dense],
            lambda x: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"),
        ),
        "NF4 dequantise": _in_turn(packed, bnb.dequantize_4bit),
    }


def product(shape: tuple[int, int], tokens: int) -> dict[str, Call]:
    """Multiplies bfloat16 rows by an NF4 matrix ``(in, out)``."""
    if not is_available():
        return {}
    import bitsandbytes.functional as bnb
    import torch
    from bitsandbytes.autograd._functions import matmul_4bit

    options = {"dtype": torch.bfloat16, "device": "cuda"}
    sets = []
    for _ in range(_count(math.prod(shape) // 2)):
        w = torch.randn(shape[::-1], **options)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
        sets.append((torch.randn((tokens, shape[0]), **options), packed.t(), state))
    return {"bitsandbytes": _in_turn(sets, torch.no_grad()(matmul_4bit))}


def int8_product(
    shape: tuple[int, int], tokens: int, outliers: int, threshold: float
) -> dict[str, Call]:
    """Multiplies rows of float16, its only dtype, by an int8 matrix ``(in, out)``."""
    if not is_available():
        return {}
    import torch
    from bitsandbytes.nn.modules import Linear8bitLt

    options = {"dtype": torch.float16, "device": "cuda"}
    sets = []
    for _ in range(_count(math.prod(shape))):
        layer = Linear8bitLt(
            *shape, bias=False, has_fp16_weights=False, threshold=threshold
        )
        x = torch.randn((tokens, shape[0]), **options)
        x[0, :outliers] = 2 * threshold
        sets.append((layer.half().cuda().eval(), x))
    return {"bitsandbytes": _in_turn(sets, torch.no_grad()(lambda layer, x: layer(x)))}


def adamw(shape: tuple[int, int]) -> dict[str, Call]:
    """A step of AdamW8bit on bfloat16 parameters."""
    if not is_available():
        return {}
    import torch
    from bitsandbytes.optim.adamw import AdamW8bit

    options = {"dtype": torch.bfloat16, "device": "cuda"}
    param = torch.nn.Parameter(torch.randn(shape, **options))
    param.grad = torch.randn(shape, **options)
    return {"bitsandbytes": AdamW8bit([param], lr=1e-3).step}


def _count(nbytes: int) -> int:
    return min(CALLS, math.ceil(COLD_BYTES / nbytes))


def _in_turn(sets: list[tuple], function: Callable) -> Call:
    """A call of the function with the next of the sets."""
    turns = itertools.cycle(sets)
    return lambda: function(*next(turns))
