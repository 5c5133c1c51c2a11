"""Whether the library of native CPU kernels is made, found, and of this version."""

import importlib.util
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import cpu_library
import jax
import jax.numpy as jnp
import pytest

from jaxbnb_kernels import _selection, native
from jaxbnb_kernels._cpu import build
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.quantize_blockwise import quantize_blockwise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(caplog):
    """What is logged, once for each process, as if this one began now."""
    _selection._say_once.cache_clear()
    yield caplog
    _selection._say_once.cache_clear()


def quantize():
    # A new function, as traces are cached.
    run = jax.jit(lambda x: quantize_blockwise(x, NF4, block_size=64))
    return run.lower(jnp.ones((64, 64))).as_text()


def test_one_of_other_sources_is_not_used(monkeypatch, tmp_path, log):
    """Its kernels could take their arguments for others."""
    cpu_library.library()
    content = native.LIBRARY.read_bytes()
    other = tmp_path / "other.so"
    other.write_bytes(content.replace(build.digest().encode(), 32 * b"0"))
    assert not build.is_current(other)
    assert "jaxbnb_cpu_quantize" in quantize()
    monkeypatch.setattr(native, "LIBRARY", other)
    assert native.why_not() == (
        "cpu needs the library of this version; "
        "python -m jaxbnb_kernels._cpu.build makes it"
    )
    for _ in range(2):
        assert "jaxbnb_cpu_quantize" not in quantize()
    assert log.messages == [
        f"jaxbnb runs XLA's code instead of its own CPU kernels: {native.why_not()}"
    ]


def test_the_digest_is_of_the_sources(monkeypatch, tmp_path):
    first = build.digest()
    assert len(first) == 32
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "a.cc").write_text("int a;")
    build.digest.cache_clear()
    second = build.digest()
    (tmp_path / "a.cc").write_text("int b;")
    build.digest.cache_clear()
    assert len({first, second, build.digest()}) == 3
    monkeypatch.undo()
    build.digest.cache_clear()


@pytest.mark.parametrize("content", [None, build.digest().encode()])
def test_without_a_library_one_line_says_so(monkeypatch, tmp_path, log, content):
    path = tmp_path / "absent.so"
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(build, "is_for_this_machine", lambda: True)
    monkeypatch.setattr(native, "LIBRARY", path)
    assert "jaxbnb_cpu_quantize" not in quantize() + quantize()
    (line,) = log.messages
    assert ("_cpu.build makes it now" in line) == (content is None)
    assert ("cannot load its library" in line) == (content is not None)


def test_other_machines_are_told_nothing(monkeypatch, tmp_path, log):
    """There is nothing that they could do."""
    monkeypatch.setattr(build, "is_for_this_machine", lambda: False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    assert native.why_not() == "cpu has kernels for Linux on x86_64 and aarch64"
    assert "jaxbnb_cpu_quantize" not in quantize()
    assert log.messages == []


@pytest.mark.parametrize("isa", ["first", "sse"])
def test_an_instruction_set_by_its_name(isa):
    """In a process of its own, as a library is loaded once."""
    cpu_library.library()
    first, *_ = build.INSTRUCTION_SETS[platform.machine()]
    isa = first if isa == "first" else isa
    code = (
        "from jaxbnb_kernels import native\n"
        "print(native.instruction_set(), native.why_not())\n"
        f"print(native.use('{first}'), native.use(''), native.instruction_set())"
    )
    environment = {**os.environ, "JAXBNB_CPU_ISA": isa}
    lines = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, text=True, cwd=ROOT
    ).splitlines()
    if isa == first:
        assert lines == [f"{first} None", f"True True {first}"]
    else:
        found = f"None JAXBNB_CPU_ISA is sse, and this processor has {first}"
        assert lines[0].startswith(found)


def test_it_is_made_once_and_only_where_it_can_be(monkeypatch, tmp_path, capsys):
    made = []
    library = tmp_path / "_native.so"

    def make(out, include):
        assert (include / "xla/ffi/api/ffi.h").exists()
        out.write_bytes(build.digest().encode())
        made.append(out)

    monkeypatch.setattr(build, "LIBRARY", library)
    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "is_current", lambda: library in made)
    monkeypatch.setattr(build, "is_for_this_machine", lambda: True)
    for name, value, reason in (
        ("JAXBNB_NATIVE", "0", "JAXBNB_NATIVE is 0"),
        ("CXX", "no-such-compiler -O3", "there is no C++ compiler, no-such-compiler"),
    ):
        monkeypatch.setenv(name, value)
        assert build.main([]) == 1
        assert capsys.readouterr().err == (
            f"jaxbnb has no native CPU kernels: {reason}\n"
        )
        monkeypatch.delenv(name)
    monkeypatch.setenv("CXX", f"{sys.executable} -O3")
    assert build.main([]) == 0
    assert build.main([]) == 0
    assert capsys.readouterr().out == f"built {library}\n{library} is current\n"
    assert made == [library]
    assert build.main(["--force"]) == 0
    assert made == [library, library]


def test_a_compiler_that_fails(tmp_path):
    """It ends with what the compiler says, and no file."""
    with pytest.raises(RuntimeError, match=r"false -std=c\+\+20"):
        build.build(tmp_path / "a.so", tmp_path, compiler="false", machine="x86_64")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(RuntimeError, match="no native kernels for riscv64"):
        build.build(tmp_path / "a.so", tmp_path, machine="riscv64")


@pytest.fixture
def hook(monkeypatch):
    """The build hook, and the warnings that it has shown."""
    interface = types.ModuleType("interface")
    interface.BuildHookInterface = object
    name = "hatchling.builders.hooks.plugin.interface"
    parents = ["hatchling", "hatchling.builders", "hatchling.builders.hooks"]
    for parent in (*parents, "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, interface)
    spec = importlib.util.spec_from_file_location("hook", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_load_build", lambda: build)
    warned = []
    result = module.NativeKernels()
    result.app = types.SimpleNamespace(display_warning=warned.append)
    return result, warned


def test_a_wheel_without_a_compiler_is_for_any_platform(hook, monkeypatch):
    hook, warned = hook
    monkeypatch.setattr(build, "is_for_this_machine", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    data = {"artifacts": []}
    hook.initialize("standard", data)
    assert data == {"artifacts": []}
    assert hook.dependencies() == []
    assert warned == [
        "jaxbnb is built without native CPU kernels: there is no C++ compiler, "
        "no-such-compiler"
    ]


@pytest.mark.parametrize("error", [None, RuntimeError("c++ -c a.cc\nsyntax error")])
def test_a_wheel_with_a_compiler_is_for_this_platform(hook, monkeypatch, error):
    hook, warned = hook
    made = []

    def make(out, include):
        made.append(out)
        if error:
            raise error

    monkeypatch.setattr(build, "is_for_this_machine", lambda: True)
    monkeypatch.setattr(build, "is_current", lambda: False)
    monkeypatch.setattr(build, "build", make)
    monkeypatch.setenv("CXX", sys.executable)
    data = {"artifacts": []}
    hook.initialize("standard", data)
    assert made == [build.LIBRARY]
    if error:
        assert data == {"artifacts": []}
        (line,) = warned
        assert line.endswith("kernels: c++ -c a.cc\nsyntax error")
    else:
        assert data["tag"].startswith("py3-none-")
        assert data["artifacts"] == ["jaxbnb_kernels/_cpu/_native.so"]
        assert not data["pure_python"]
        assert not warned
