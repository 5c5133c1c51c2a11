"""Times of the kernels for GPUs, on matrices of Llama 3 and Qwen 2.5.

Each beside the implementation that XLA compiles, beside what its time is set against (a
copy of as many bytes, or a dense product) and, where it is installed with CUDA, beside
bitsandbytes. A kernel with wrong numbers is not timed.

`main` runs in a process of its own, because a kernel may end it or never return;
`jaxbnb.benchmarks._kernel_run` starts it.
"""

import dataclasses
import functools
import json
import math
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbnb.benchmarks import _cuda
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._timing import time_together
from jaxbnb.core import matmul, quantize
from jaxbnb.optim import scale_by_adam8bit
from jaxbnb_kernels import errors
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from jaxbnb_kernels.update_8bit import Moment, update_8bit

# (in, out) of the products of a layer.
MATRICES = {
    "Llama 3 8B, attention": (4096, 4096),
    "Llama 3 8B, up": (4096, 14336),
    "Llama 3 8B, down": (14336, 4096),
    "Llama 3 70B, attention": (8192, 8192),
    "Llama 3 70B, up": (8192, 28672),
    "Qwen 2.5 7B, up": (3584, 18944),
}
TOKENS = (1, 4, 16, 64, 256, 512, 1024, 4096)
# What decides most, and is timed first.
DECISIVE_MATRICES = ("Llama 3 70B, attention", "Llama 3 8B, down")
DECISIVE_TOKENS = (1, 16, 64, 512, 4096)
PARAMETERS = (16384, 16384)
# Columns of outliers, as the paper finds them in large models.
OUTLIERS = 7
THRESHOLD = 6.0
STEPS = 10
# Rows that are checked, because NumPy finds the nearest levels slowly.
CHECKED_ROWS = 256
# Unit of what could not be measured.
FAILURE = "failure"
# Arguments are taken in turn from sets of this many bytes: a cache holds 50 MB.
COLD_BYTES = 2**28

Function = Callable[..., Any]
# ``timer(functions, sets)``: seconds of each, by name; `device_seconds` is one.
Timer = Callable[[Mapping[str, Function], Sequence[tuple]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: smaller ones for a rehearsal without a GPU."""

    matrices: Mapping[str, tuple[int, int]]
    tokens: tuple[int, ...]
    decisive_matrices: tuple[str, ...]
    decisive_tokens: tuple[int, ...]
    parameters: tuple[int, int]
    cold_bytes: int


FULL: Final = Sizes(
    MATRICES, TOKENS, DECISIVE_MATRICES, DECISIVE_TOKENS, PARAMETERS, COLD_BYTES
)
TINY: Final = Sizes(
    {"tiny": (128, 64)},
    tokens=(1, 64),
    decisive_matrices=("tiny",),
    decisive_tokens=(64,),
    parameters=(64, 256),
    cold_bytes=2**15,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How something is measured.

    Attributes:
        sizes: sizes of what is measured.
        timer: function that times other functions.
        implementation: implementation that is compared with XLA's.
        copy: seconds for each byte that a copy reads or writes.
    """

    sizes: Sizes
    timer: Timer
    implementation: str
    copy: float


@dataclasses.dataclass(frozen=True)
class Task:
    """A part of the benchmark.

    Attributes:
        title: what is measured.
        op: name of the op that has the kernel.
        is_decisive: whether it is measured before everything else.
        measure: function that yields the figures.
    """

    title: str
    op: str
    is_decisive: bool
    measure: Callable[[Setting], Iterator[Figure]]


def tasks(sizes: Sizes) -> list[Task]:
    """Everything to measure, beginning with what decides most."""
    products, codecs, others = [], [], []
    for name, shape in sizes.matrices.items():
        is_first = name in sizes.decisive_matrices
        title, measure = f"NF4 codecs, {name}", functools.partial(_codecs, name, shape)
        codecs.append(Task(title, "quantize_blockwise", is_first, measure))
        for tokens in sizes.tokens:
            # The gradient of a training step, which has many tokens.
            for what in ("x W", "dy W.T") if tokens >= 64 else ("x W",):
                decides = is_first and tokens in sizes.decisive_tokens and what == "x W"
                title = _product_title(what, tokens, name)
                measure = functools.partial(_product, what, name, shape, tokens)
                task = Task(title, "matmul_blockwise", decides, measure)
                products.append(task)
            title = _int8_title(tokens, name)
            measure = functools.partial(_int8_product, name, shape, tokens)
            others.append(Task(title, "matmul_int8", False, measure))
    step = Task(_update_title(sizes), "update_8bit", True, _update)
    found = [*products, step, *codecs, *others]
    return sorted(found, key=lambda task: not task.is_decisive)


def main(implementation: str, numbers: str) -> None:
    """Measures a copy, then the tasks with these numbers, and prints each as JSON.

    An exception ends it, because the GPU may be unusable then.
    """
    sizes, timer = SETTINGS[implementation]
    todo, how = tasks(sizes), ""
    try:
        copy = _copy_seconds_per_byte(sizes, timer)
    except Exception as error:
        timer, how = host_seconds, f"by the host's clock, since {error}"
        copy = _copy_seconds_per_byte(sizes, timer)
    speed = Figure("device copy", 1e-9 / copy, "GB/s read and written", None, how)
    _print(None, [speed])
    setting = Setting(sizes, timer, implementation, copy)
    for number in map(int, numbers.split(",")):
        task = todo[number]
        try:
            figures = list(task.measure(setting))
        except Exception as error:
            first_line, *_ = [*str(error).splitlines(), ""]
            reason = f"{type(error).__name__}: {first_line}"
            _print(number, [failure(task.title, reason, traceback.format_exc())])
            return
        _print(number, figures)


def failure(title: str, reason: str, output: str) -> Figure:
    """What stands for a figure that could not be measured; output is for the file."""
    return Figure(title, 1, FAILURE, 0, reason, {"output": output[-4000:]})


def _print(number: int | None, figures: Iterable[Figure]) -> None:
    line = {"task": number, "figures": [dataclasses.asdict(f) for f in figures]}
    print(json.dumps(line), flush=True)


def device_seconds(
    functions: Mapping[str, Function], sets: Sequence[tuple], rounds: int = 9
) -> dict[str, float]:
    """The median time of a call on the device alone, by CUPTI.

    All sets of arguments are taken in one program, so that none is in a cache and no
    launch is waited for.
    """
    from jax.experimental.mosaic.gpu import profiler

    def measure(name: str, together: Function) -> float:
        _, times = profiler.measure(together, iterations=rounds)(list(sets))
        if times is None:
            raise RuntimeError(f"CUPTI saw no kernel of {name}")
        return statistics.median(times) * 1e-3

    return _seconds(functions, sets, measure)


def host_seconds(
    functions: Mapping[str, Function], sets: Sequence[tuple], rounds: int = 9
) -> dict[str, float]:
    """The median time of a call by the host's clock, with its share of a launch."""

    def measure(name: str, together: Function) -> float:
        function = {name: lambda: together(list(sets))}
        times = time_together(function, rounds=rounds, settle=0)
        return statistics.median(times[name])

    return _seconds(functions, sets, measure)


def _seconds(
    functions: Mapping[str, Function],
    sets: Sequence[tuple],
    measure: Callable[[str, Function], float],
) -> dict[str, float]:
    seconds = {}
    for name, function in functions.items():
        if name == "bitsandbytes":
            seconds[name] = _cuda.device_seconds(function)
        else:
            together = jax.jit(lambda sets, f=function: [f(*s) for s in sets])
            seconds[name] = measure(name, together) / len(sets)
    return seconds


# By implementation: on a GPU, and in a rehearsal.
SETTINGS: Final[Mapping[str, tuple[Sizes, Timer]]] = {
    "mosaic_gpu": (FULL, device_seconds),
    "reference": (TINY, host_seconds),
}


def _copy_seconds_per_byte(sizes: Sizes, timer: Timer) -> float:
    """Measures the time of each byte that is read or written."""
    x = jnp.zeros(sizes.cold_bytes, jnp.uint8)
    (seconds,) = timer({"copy": lambda x: x ^ 1}, [(x,)]).values()
    return seconds / (2 * x.nbytes)


def _sets(make: Callable[[int], tuple], sizes: Sizes) -> list[tuple]:
    """Arguments of different seeds, together more than a cache holds."""
    first = make(0)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(first))
    count = min(16, math.ceil(sizes.cold_bytes / nbytes))
    return [first, *map(make, range(1, count))]


def _both(function: Function, implementation: str) -> dict[str, Function]:
    """A function by what is measured and by XLA."""
    return {
        name: functools.partial(function, implementation=name)
        for name in (implementation, "xla")
    }


def _normal(seed: int, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _codecs(name: str, shape: tuple[int, int], setting: Setting) -> Iterator[Figure]:
    implementation = setting.implementation
    encode = functools.partial(quantize_blockwise, codebook=NF4, block_size=64)
    decode = functools.partial(
        dequantize_blockwise,
        codebook=NF4,
        block_size=64,
        size=shape[-1],
        dtype=jnp.bfloat16,
    )
    dense = _sets(lambda seed: (_normal(seed, shape),), setting.sizes)
    encoded = [jax.jit(encode)(*x) for x in dense]
    rivals = _cuda.blockwise(shape)
    # bfloat16, four bits and the share of an absmax.
    nbytes = math.prod(shape) * (2 + 0.5 + 4 / 64)
    for what, function, sets, error_of in (
        ("NF4 quantise", encode, dense, _encoding_error),
        ("NF4 dequantise", decode, encoded, _decoding_error),
    ):
        title = f"{what}, {name}"
        functions = _both(function, implementation)
        error = error_of(functions[implementation], sets[0])
        if not error <= 1:
            yield Figure(title, error, "x the allowed error, which is WRONG", 1)
            continue
        if what in rivals:
            functions["bitsandbytes"] = rivals[what]
        seconds = setting.timer(functions, sets)
        yield from _figures(
            title,
            seconds,
            implementation,
            setting.copy * nbytes,
            "x the time of a copy",
            1 / 0.8,
            f"{1e-9 * nbytes / seconds[implementation]:.0f} GB/s",
        )


def _encoding_error(function: Function, args: tuple) -> float:
    """Returns the error of a few rows, over the largest allowed."""
    x, codes, absmax = _some_rows(*args, *jax.jit(function)(*args))
    return errors.worst_code(x, codes, absmax, NF4, 64)


def _decoding_error(function: Function, args: tuple) -> float:
    decoded, codes, absmax = _some_rows(jax.jit(function)(*args), *args)
    return errors.worst_level(decoded, codes, absmax, NF4, 64)


def _some_rows(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(a[:CHECKED_ROWS]) for a in arrays]


def _int8_title(tokens: int, name: str) -> str:
    return f"LLM.int8 x W, {tokens} rows, {name}"


def _int8_product(
    name: str, shape: tuple[int, int], tokens: int, setting: Setting
) -> Iterator[Figure]:
    """LLM.int8, with a few columns of outliers."""

    def args(seed):
        x = jnp.clip(_normal(seed, (tokens, shape[0])), -5, 5)
        x = x.at[0, :OUTLIERS].set(2 * THRESHOLD)
        return x, quantize(_normal(seed + 1, shape), "llm_int8", axis=-2)

    def product(x, q, implementation):
        return matmul(x, q, outlier_threshold=THRESHOLD, implementation=implementation)

    title, implementation = _int8_title(tokens, name), setting.implementation
    functions = _both(product, implementation)
    sets = _sets(args, setting.sizes)
    error, limit = _int8_error(functions[implementation], functions["xla"], sets[0])
    if not error <= limit:
        yield Figure(title, error, "of the largest result is WRONG", limit)
        return
    dense = _normal(0, shape)
    functions["dense"] = lambda x, _: x @ dense
    functions |= _cuda.int8_product(shape, tokens, OUTLIERS, THRESHOLD)
    seconds = setting.timer(functions, sets)
    flops = 2 * tokens * math.prod(shape)
    yield from _figures(
        title,
        seconds,
        implementation,
        seconds["dense"],
        "x the dense product's time",
        None,
        f"{1e-12 * flops / seconds[implementation]:.1f} TOP/s",
    )


def _int8_error(product: Function, other: Function, args: tuple) -> tuple[float, float]:
    """Returns the largest difference of two products, over the largest result.

    Both have the same sums of integers. They add products of outliers in another order,
    and round once to bfloat16's 8 bits: to the next number at most.
    """
    got, expected = (
        np.asarray(jax.jit(f)(*args), np.float64) for f in (product, other)
    )
    largest = np.max(np.abs(expected))
    return float(np.max(np.abs(got - expected)) / largest), 2.0**-7


def _product_title(what: str, tokens: int, name: str) -> str:
    return f"NF4 {what}, {tokens} rows, {name}"


def _product(
    what: str, name: str, shape: tuple[int, int], tokens: int, setting: Setting
) -> Iterator[Figure]:
    is_forward = what == "x W"
    dense = _normal(0, shape) if is_forward else _normal(0, shape).T

    def product(x, q, implementation):
        return matmul(x, q if is_forward else q.mT, implementation=implementation)

    def args(seed):
        x = _normal(seed, (tokens, dense.shape[0]))
        return x, quantize(_normal(seed + 1, shape), "nf4", axis=-2)

    title, implementation = _product_title(what, tokens, name), setting.implementation
    functions = _both(product, implementation)
    sets = _sets(args, setting.sizes)
    error, limit = _product_error(functions[implementation], sets[0], is_forward)
    if not error <= limit:
        yield Figure(title, error, "of the largest result is WRONG", limit)
        return
    functions["dense"] = lambda x, _: x @ dense
    if is_forward:
        functions |= _cuda.product(shape, tokens)
    seconds = setting.timer(functions, sets)
    flops = 2 * tokens * math.prod(shape)
    yield from _figures(
        title,
        seconds,
        implementation,
        seconds["dense"],
        "x the dense product's time",
        _product_limit(what, tokens, shape),
        f"{1e-12 * flops / seconds[implementation]:.1f} TFLOP/s",
    )


def _product_limit(what: str, tokens: int, shape: tuple[int, int]) -> float | None:
    """What the time of a product should be of the dense one's."""
    if what == "dy W.T":
        return 1 / 0.9 if tokens >= 2048 else None
    if tokens <= 64 and min(shape) < 8192:
        return None
    speedups = {16: 2.6, 64: 2.0, 512: 1.0}
    return 1 / next((s for m, s in speedups.items() if tokens <= m), 0.95)


def _product_error(
    product: Function, args: tuple, is_forward: bool
) -> tuple[float, float]:
    """Returns the largest error of a few columns against float64, over the largest.

    Levels, absmax, their product and the result are each rounded to bfloat16's 8 bits,
    by 2^-8 of each at most with what that does to the next, and the sum to float32.
    """
    x, q = args
    columns = 64
    matrix = q.dequantize() if is_forward else q.dequantize().T
    matrix = np.asarray(matrix[:, :columns], np.float64)
    rows = np.asarray(x[:16], np.float64)
    expected = rows @ matrix
    terms = np.max(np.abs(rows) @ np.abs(matrix))
    got = np.asarray(jax.jit(product)(*args)[:16, :columns], np.float64)
    largest = np.max(np.abs(expected))
    rounded = (1 + 2.0**-8) ** 3 - 1
    bound = (rounded + len(matrix) * 2.0**-24) * terms + 2.0**-8 * largest
    return float(np.max(np.abs(got - expected)) / largest), float(bound / largest)


def _update_title(sizes: Sizes) -> str:
    millions = math.prod(sizes.parameters) / 2**20
    return f"AdamW in 8 bits, bfloat16, {millions:.0f} M parameters"


def _update(setting: Setting) -> Iterator[Figure]:
    """AdamW on bfloat16, several steps in one program, in place but for the first."""
    shape, implementation = setting.sizes.parameters, setting.implementation
    adam: Any = scale_by_adam8bit()
    rule = dataclasses.replace(adam.definition.rule, finish=_finish)
    scalars = adam.definition.scalars(jnp.int32(1))
    scalars = scalars | {"rate": jnp.float32(1e-3), "decay": jnp.float32(1e-4)}
    param, grad = _normal(0, shape), _normal(1, shape)
    zeros = jnp.zeros((shape[0], -(-shape[1] // 256)))
    moments = (
        Moment(jnp.full(shape, 127, jnp.uint8), zeros, signed=True),
        Moment(jnp.zeros(shape, jnp.uint8), zeros, signed=False),
    )

    def step(grad, param, moments, implementation):
        return update_8bit(
            rule, scalars, grad, moments, param, implementation=implementation
        )

    def steps(grad, param, moments, implementation):
        def turn(_, held):
            return step(grad, held[0], held[1], implementation)

        return jax.lax.fori_loop(0, STEPS, turn, (param, moments))

    tx = optax.adamw(1e-3)

    def in_32_bits(grad, param, moments):
        del moments
        param = param.astype(jnp.float32)

        def turn(_, held):
            updates, state = tx.update(grad.astype(jnp.float32), held[1], held[0])
            return optax.apply_updates(held[0], updates), state

        return jax.lax.fori_loop(0, STEPS, turn, (param, tx.init(param)))

    title = _update_title(setting.sizes)
    args = (grad, param, moments)
    ours, theirs = (
        jax.jit(once)(*args)[0].astype(jnp.float32)
        for once in _both(step, implementation).values()
    )
    far = jnp.max(jnp.abs(ours - theirs))
    # The first step is the learning rate; a parameter up to 8 has steps of 2^-5 there.
    if not far <= 2.0**-5:
        yield Figure(title, float(far), "off, which is WRONG", 2.0**-5)
        return
    functions = _both(steps, implementation) | {"optax": in_32_bits}
    functions |= _cuda.adamw(shape)
    seconds = setting.timer(functions, [args])
    # Theirs is one step.
    seconds = {k: s if k == "bitsandbytes" else s / STEPS for k, s in seconds.items()}
    # Read: gradient, parameter, two codes; written: all but the gradient.
    nbytes = math.prod(shape) * (2 + 2 + 2 + 2 + 2 + 4 * 4 / 256)
    per_billion = 1e9 / math.prod(shape) * 1e3 * seconds[implementation]
    yield from _figures(
        title,
        seconds,
        implementation,
        setting.copy * nbytes,
        "x the time of a copy",
        1 / 0.8,
        f"{per_billion:.2f} ms per 1B parameters",
    )


def _finish(s, update, param):
    return -s["rate"] * (update + s["decay"] * param)


def _figures(
    title: str,
    seconds: dict[str, float],
    implementation: str,
    base: float,
    unit: str,
    limit: float | None,
    rate: str,
) -> Iterator[Figure]:
    """One against the base, and one against bitsandbytes where that was timed."""
    times = ", ".join(f"{k} {1e6 * s:.1f} us" for k, s in seconds.items())
    fastest = min(seconds, key=lambda k: seconds[k])
    data = {"seconds": seconds, "fastest": fastest, "rate": rate}
    detail = f"{times}; {rate}; fastest: {fastest}"
    ours = seconds[implementation]
    yield Figure(title, ours / base, unit, limit, detail, data)
    if "bitsandbytes" in seconds:
        value = ours / seconds["bitsandbytes"]
        yield Figure(title, value, "x bitsandbytes' time", 1.0, data=data)
