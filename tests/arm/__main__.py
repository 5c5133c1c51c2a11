"""Whether the native CPU kernels are right on 64-bit Arm, without one: `make arm`.

    python tests/arm [PYTEST_ARGUMENT ...]

Compiles the kernels for Arm, and runs the tests of `tests/kernels/cpu_tests.py` in
QEMU: with Debian's Python for Arm, and with jaxlib and NumPy as they are published for
it. So XLA for Arm calls the kernels. What is downloaded, 0.3 GB, stays in `out/arm`
(0.8 GB).

One emulated processor has dot products, and runs every test in both instruction sets.
The other one has none: it runs what is compiled for both, the products of integers, and
the first instruction that it lacks ends the run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.ffi

from jaxbnb_kernels._cpu import build

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from cpu_tests import INT8_TESTS, OPTIONS, TESTS

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "out/arm"
SYSTEM, PACKAGES = KEPT / "system", KEPT / "packages"
COMPILER = "aarch64-linux-gnu-g++"
# QEMU's names of processors, the instruction set that the kernels have to choose there,
# and the tests to run.
PROCESSORS = [
    ("cortex-a76", "neon_dotprod", TESTS),
    ("cortex-a57", "neon", INT8_TESTS),
]

# A shell script in place of Python, because tests start Python again by its own name.
EMULATED = """\
#!/bin/sh
exec {qemu} -cpu {processor} -0 "$0" -L {system} -E PYTHONHOME={system}/usr \\
  {system}/usr/bin/python3 "$@"
"""

CHOSEN = """
import pathlib, sys
from jaxbnb_kernels import native
native.LIBRARY = pathlib.Path(sys.argv[1])
print(native.why_not() or native.instruction_set())
"""


def find_tool(debian: str, *names: str) -> str:
    """The first program of these that is there, or ends the run."""
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    sys.exit(f"{' or '.join(names)} is missing: apt install {debian}")


def fetch_python() -> None:
    """Unpacks Python for Arm, and the libraries it needs, from this Debian's mirror."""
    if (SYSTEM / "usr/bin/python3").exists():
        return
    print("Fetching Debian's Python for Arm (25 MB)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        apt = Path(scratch)
        for folder in ("lists/partial", "archives/partial"):
            (apt / folder).mkdir(parents=True)
        (apt / "status").touch()
        # Folders of its own: this system's list of packages stays as it is.
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures::": "arm64",
            "Dir::State": apt,
            "Dir::State::status": apt / "status",
            "Dir::Cache": apt,
            "APT::Install-Recommends": "false",
        }
        options = [f"-o{name}={value}" for name, value in settings.items()]
        command = [find_tool("apt", "apt-get"), "-qq", *options]
        run([*command, "update"])
        run([*command, "install", "--download-only", "python3", "libstdc++6"])
        part = KEPT / "system.part"
        shutil.rmtree(part, ignore_errors=True)
        for package in (apt / "archives").glob("*.deb"):
            run([find_tool("dpkg", "dpkg-deb"), "--extract", package, part])
        part.rename(SYSTEM)


def fetch_packages(python: Path) -> None:
    """Installs for Arm what the tests import, in the versions of this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], "hypothesis", "pytest"]
    versions = sorted({f"{d.name}=={d.version}" for d in metadata.distributions()})
    constraints, stamp = KEPT / "constraints.txt", PACKAGES / "wanted.json"
    if stamp.exists() and json.loads(stamp.read_text()) == [wanted, versions]:
        return
    print("Fetching jaxlib and other packages for Arm (250 MB)", flush=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    constraints.write_text("\n".join(versions))
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-qq"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--no-compile"]
    run([*command, "--target", PACKAGES, "--constraint", constraints, *wanted])
    stamp.write_text(json.dumps([wanted, versions]))


def emulated_python(qemu: str, processor: str) -> Path:
    """Writes the program that runs Python for Arm on a processor."""
    path = KEPT / f"python-{processor}"
    path.write_text(EMULATED.format(qemu=qemu, processor=processor, system=SYSTEM))
    path.chmod(0o755)
    return path


def run(command: list[str | Path], **options: Any) -> str:
    """What a command writes; one that fails ends the run."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    find_tool("g++-aarch64-linux-gnu", COMPILER)
    qemu = find_tool("qemu-user", "qemu-aarch64", "qemu-aarch64-static")
    KEPT.mkdir(parents=True, exist_ok=True)
    fetch_python()
    fetch_packages(emulated_python(qemu, PROCESSORS[0][0]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = f"{PACKAGES}:{ROOT}"
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "_native.so"
        include = Path(jax.ffi.include_dir())
        build.build(library, include, compiler=COMPILER, machine="aarch64")
        for processor, isa, tests in PROCESSORS:
            python = emulated_python(qemu, processor)
            chosen = run([python, "-c", CHOSEN, library], env=environment).strip()
            print(f"{processor}: {chosen}", flush=True)
            if chosen != isa:
                sys.exit(f"on a {processor}, the kernels have to choose {isa}")
            command = [python, "-m", "pytest", f"--native-library={library}"]
            command += [*OPTIONS, *sys.argv[1:]]
            done = subprocess.run([*command, *tests], env=environment, cwd=ROOT)
            # 5: the arguments leave no test to run.
            if done.returncode not in (0, 5):
                failed.append(processor)
    if failed:
        print(f"Failed on {' and '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
