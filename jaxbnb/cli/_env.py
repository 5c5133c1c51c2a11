"""`jaxbnb env`: what runs here, where, and whether its numbers are right."""

import argparse
import functools
import importlib
import importlib.metadata
import pkgutil
import platform
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxbnb
import jaxbnb_kernels
from jaxbnb.core import formats
from jaxbnb_kernels import _hopper
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

_REQUIRED = ("jaxbnb", "jax", "jaxlib", "flax", "optax", "numpy", "jaxtyping")
_OPTIONAL = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "safetensors",
    "tokenizers",
    "jinja2",
    "matplotlib",
    "orbax-checkpoint",
    "torch",
    "bitsandbytes",
    "transformers",
    "peft",
)
_BLOCK_SIZE = 64
# Odd rows, a ragged last block, and 30 whole ones.
_SHAPE = (120, 1941)


def run(args: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        The exit status: 1 where a check of the self-test failed.
    """
    del args
    _print_table("versions", _versions())
    _print_table("devices", _devices())
    _print_table("implementations, the first that can serve a call", _implementations())
    return _self_test()


def _print_table(title: str, rows: Iterator[tuple[str, str]]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:<20}{value}")
    print()


def _versions() -> Iterator[tuple[str, str]]:
    yield (
        "python",
        f"{platform.python_version()}, {platform.system()} {platform.machine()}",
    )
    for package in (*_REQUIRED, *_OPTIONAL):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in _REQUIRED:
                yield package, "not installed as a package"


def _devices() -> Iterator[tuple[str, str]]:
    for device in jax.local_devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / 2**30:.1f} GiB for JAX" if memory else ""
        yield f"{device.platform}:{device.id}", f"{device.device_kind}{size}"


def _implementations() -> Iterator[tuple[str, str]]:
    device = jax.devices()[0]
    missing = _hopper.why_not_on(device) or _hopper.why_off()
    for module in pkgutil.iter_modules(jaxbnb_kernels.__path__):
        if not module.ispkg:
            continue
        api = importlib.import_module(f"jaxbnb_kernels.{module.name}.api")
        names, wrong = list(api.IMPLEMENTATIONS), None
        if "mosaic_gpu" in names and missing is None:
            # Tries the kernels now, if that has not been done.
            wrong = _hopper.why_not_tried(module.name, device)
        if "mosaic_gpu" in names and (missing or wrong):
            names.remove("mosaic_gpu")
        kernel = f"; no kernel: {wrong}" if wrong else ""
        yield module.name, ", ".join(names) + kernel
    if missing is not None:
        yield "mosaic_gpu", missing.removeprefix("mosaic_gpu ")


def _self_test() -> int:
    """Runs every check on the default device; prints each error beside its limit."""
    print(f"{'self-test':<40}{'error':>10}{'limit':>10}")
    count = failed = 0
    for what, check, error, limit in _all_checks():
        # A NaN fails too.
        is_ok = error <= limit
        count, failed = count + 1, failed + (not is_ok)
        verdict = "ok" if is_ok else "FAILED"
        name = f"  {what:<20}{check}"
        print(f"{name:<40}{error:>10.1e}{limit:>10.1e}  {verdict}", flush=True)
    print(f"{failed} of {count} checks FAILED" if failed else f"all {count} checks ok")
    return 1 if failed else 0


def _all_checks() -> Iterator[tuple[str, str, float, float]]:
    for quant_type in formats.CODEBOOKS:
        for check in _checks(quant_type):
            yield quant_type, *check
    yield "update_8bit", "adamw8bit", *_check_update()


def _checks(quant_type: str) -> Iterator[tuple[str, float, float]]:
    """What was checked, the largest error and what it may be."""
    x = jax.random.normal(jax.random.key(0), _SHAPE)
    if quant_type == formats.LLM_INT8:
        yield "matmul, axis=-2", *_check_int8(x)
        return
    x = jnp.abs(x) if quant_type == "dynamic8_unsigned" else x
    yield "quantize", *_check_quantize(quant_type, x)
    for axis in (-2, -1):
        forward, backward = _check_matmul(quant_type, x, axis)
        yield f"matmul, axis={axis}", *forward
        yield f"gradient, axis={axis}", *backward


def _check_quantize(quant_type: str, x: jax.Array) -> tuple[float, float]:
    """How much farther from x an element is than the reference brings it, over absmax.

    Not code for code: near a decision point both neighbours are as good. The encoders
    promise the nearest level for a value at most 2^-20 away, so twice that in distance.
    """
    absmax, reference = _reference(x, quant_type)
    decoded = jaxbnb.quantize(x, quant_type, block_size=_BLOCK_SIZE).dequantize()
    farther = jnp.abs(x - decoded) - jnp.abs(x - reference)
    scale = jnp.repeat(absmax, _BLOCK_SIZE, axis=-1)[:, : x.shape[-1]]
    return float(jnp.max(farther / scale)), 2 * 2.0**-20


@functools.partial(jax.jit, static_argnums=1)
def _reference(x: jax.Array, quant_type: str) -> tuple[jax.Array, jax.Array]:
    codebook = formats.codebook(quant_type)
    codes, absmax = quantize_blockwise(
        x, codebook, block_size=_BLOCK_SIZE, implementation="reference"
    )
    decoded = dequantize_blockwise(
        codes,
        absmax,
        codebook,
        block_size=_BLOCK_SIZE,
        size=x.shape[-1],
        implementation="reference",
    )
    return absmax, decoded


def _check_matmul(
    quant_type: str, w: jax.Array, axis: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The product and its gradient against the decoded matrix, in float64 on the host.

    In bfloat16, which accelerators multiply exactly and sum in float32; a product of
    float32 they may round to fewer bits.
    """
    q = jaxbnb.quantize(w, quant_type, block_size=_BLOCK_SIZE, axis=axis)
    matrix = np.asarray(q.dequantize(jnp.bfloat16)).astype(np.float64)
    x_key, dy_key = jax.random.split(jax.random.key(1))
    x = jax.random.normal(x_key, (7, w.shape[0]), jnp.bfloat16)
    dy = jax.random.normal(dy_key, (7, w.shape[1]), jnp.bfloat16)
    y, dx = _product(x, q, dy)
    return _compare(y, x, matrix), _compare(dx, dy, matrix.T)


@jax.jit
def _product(
    x: jax.Array, q: jaxbnb.QuantizedArray, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, vjp = jax.vjp(lambda x: jaxbnb.matmul(x, q), x)
    return y, vjp(dy)[0]


def _compare(y: jax.Array, x: jax.Array, matrix: np.ndarray) -> tuple[float, float]:
    """The largest abs(y - x @ matrix) over the largest result; its bound.

    K products summed in float32 are off by at most K 2^-24 sum(abs(x w)); the result is
    rounded to bfloat16's 8 bits.
    """
    x64 = np.asarray(x).astype(np.float64)
    expected = x64 @ matrix
    largest = np.max(np.abs(expected))
    error = np.max(np.abs(np.asarray(y).astype(np.float64) - expected))
    terms = np.max(np.abs(x64) @ np.abs(matrix))
    bound = matrix.shape[0] * 2.0**-24 * terms + 2.0**-8 * largest
    return float(error / largest), float(bound / largest)


def _check_int8(w: jax.Array) -> tuple[float, float]:
    """The product in int8 against its specification, with outliers in 12 columns.

    The sums of integers are the same; those over the outliers are in any order, on
    either side, and both results are rounded to bfloat16's 8 bits.
    """
    q = jaxbnb.quantize(w, formats.LLM_INT8, axis=-2)
    x = jax.random.normal(jax.random.key(1), (7, w.shape[0]), jnp.bfloat16)
    x = x.at[:, ::10].multiply(8)
    expected = jaxbnb.matmul(x, q, implementation="reference").astype(jnp.float32)
    error = jnp.max(jnp.abs(jaxbnb.matmul(x, q).astype(jnp.float32) - expected))
    largest = jnp.max(jnp.abs(expected))
    terms = jnp.max(jnp.abs(x.astype(jnp.float32)) @ jnp.abs(q.dequantize()))
    bound = 2 * w.shape[0] * 2.0**-24 * terms + 2.0**-8 * largest
    return float(error / largest), float(bound / largest)


def _check_update() -> tuple[float, float]:
    """Two steps of AdamW, moments in 8 bits and in 32, over the learning rate.

    The first step is the same. In the second, the old first moment is off by half a
    cell, 1/142 of its block's largest. That is at most 1/71 of itself, as gradients lie
    between 1 and 2. The root of the second moment is off by less: 2/71 in all.
    """
    params = jax.random.normal(jax.random.key(2), _SHAPE)
    gradients = 1 + jax.random.uniform(jax.random.key(3), (2, *_SHAPE))
    rate, results = 0.01, []
    for smallest in (0, params.size + 1):
        tx = jaxbnb.adamw8bit(rate, min_quantized_size=smallest)
        results.append(_two_steps(tx, params, gradients))
    error = jnp.max(jnp.abs(results[0] - results[1])) / rate
    return float(error), 2 / 71


def _two_steps(tx, params: jax.Array, gradients: jax.Array) -> jax.Array:
    step = jax.jit(jaxbnb.optim.fused_step(tx))
    state = tx.init(params)
    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params
