"""`jaxbnb env`: versions, devices, implementations, and a check of the numbers."""

import argparse
import importlib
import importlib.metadata
import pkgutil
import platform
from collections.abc import Iterator

import jax

import jaxbnb_kernels
from jaxbnb.models import attention
from jaxbnb_kernels import checks, native, verification

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


def run(args: argparse.Namespace) -> int:
    """Prints the report.

    Returns:
        The exit status: 1 where a check of the self-test failed.
    """
    del args
    _print_table("versions", _versions())
    _print_table("devices", _devices())
    _print_table("implementations, the first that can serve a call", _implementations())
    _print_table("GPU kernels", _kernels())
    _print_table("CPU kernels", _cpu_kernels())
    _print_table("attention to long texts", _attention())
    return _self_test()


def _print_table(title: str, rows: Iterator[tuple[str, str]]) -> None:
    print(title)
    named = list(rows)
    width = max([20, *(len(name) + 2 for name, _ in named)])
    for name, value in named:
        print(f"  {name:<{width}}{value}")
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
    for module in pkgutil.iter_modules(jaxbnb_kernels.__path__):
        if not module.ispkg or module.name.startswith("_"):
            continue
        api = importlib.import_module(f"jaxbnb_kernels.{module.name}.api")
        names = list(api.IMPLEMENTATIONS)
        if "mosaic_gpu" in names and verification.why_off(module.name, device):
            names.remove("mosaic_gpu")
        if "cpu" in names and (device.platform != "cpu" or native.why_not()):
            names.remove("cpu")
        yield module.name, ", ".join(names)


def _kernels() -> Iterator[tuple[str, str]]:
    """When kernels run by themselves, and why those that do not are off."""
    device = jax.devices()[0]
    yield "setting", jaxbnb_kernels.config.mosaic_gpu
    if reason := verification.why_no_kernels(device):
        yield "mosaic_gpu", reason.removeprefix("mosaic_gpu ")
        return
    yield "records", str(verification.records_file() or "no home directory")
    for op in checks.CHECKS:
        yield op, verification.why_off(op, device) or "on"


def _cpu_kernels() -> Iterator[tuple[str, str]]:
    """When native kernels run by themselves, and with which instructions or why not."""
    yield "setting", jaxbnb_kernels.config.cpu
    if reason := native.why_not():
        yield "cpu", reason.removeprefix("cpu ")
    else:
        yield "instructions", str(native.instruction_set())


def _attention() -> Iterator[tuple[str, str]]:
    """What computes it, and why not cuDNN."""
    reason = attention.why_not_cudnn("bfloat16", 128)
    yield "16 bits", f"blocks; {reason}" if reason else "cuDNN, where options allow"
    yield "float32", "blocks"


def _self_test() -> int:
    """Checks every op on the default device, and prints each error over its limit."""
    print(f"{'self-test':<65}{'error / limit':>13}")
    count = num_failed = 0
    for op, check in checks.CHECKS.items():
        for what, error in check(None, checks.BRIEF):
            # A NaN fails too.
            is_ok = error <= 1
            count, num_failed = count + 1, num_failed + (not is_ok)
            verdict = "ok" if is_ok else "FAILED"
            # One name is longer than its column. The errors stay in theirs.
            check_name = f"{op:<18} {what}"
            print(f"  {check_name:<68}{error:6.2f}  {verdict}", flush=True)
    if num_failed:
        print(f"{num_failed} of {count} checks FAILED")
        return 1
    print(f"all {count} checks ok")
    return 0
