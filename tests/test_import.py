"""What `import jaxbnb` does, and mostly does not do; each in a fresh interpreter."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import jaxbnb

DEPENDENCIES = "import jax, flax, flax.linen, flax.nnx, jaxtyping, optax"


def run(code):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_no_backend_is_initialised():
    code = """
from jax._src import xla_bridge
import jaxbnb
jaxbnb.finetune, jaxbnb.quantize
assert not xla_bridge.backends_are_initialized()
# That says something: it is true from the first array on.
import jax.numpy
jax.numpy.ones(2)
assert xla_bridge.backends_are_initialized()
"""
    run(code)


def test_it_loads_little_but_jax_flax_and_optax():
    code = f"""
import sys
{DEPENDENCIES}
before = set(sys.modules)
import jaxbnb
jaxbnb.finetune, jaxbnb.adam8bit
print(*set(sys.modules) - before)
"""
    loaded = run(code)
    others = [name for name in loaded if not name.startswith("jaxbnb")]
    assert "jaxbnb.core" in loaded
    # The standard library's odds and ends: 0 today.
    assert len(others) <= 10, others


def test_no_optional_package_is_imported():
    # Beside what flax and optax import themselves, where it is installed: rich, today.
    optional = "torch safetensors orbax matplotlib tokenizers rich transformers peft"
    optional += " equinox keras"
    code = f"""
import sys
{DEPENDENCIES}
before = set(sys.modules)
import jaxbnb
jaxbnb.finetune, jaxbnb.adam8bit
print(*(set(sys.modules) - before) & set("{optional}".split()))
"""
    assert run(code) == []


def test_by_itself_it_loads_nothing():
    code = """
import sys
for name in ("jax", "flax", "optax", "numpy"):
    sys.modules[name] = None
import jaxbnb
print(*sorted(name for name in sys.modules if name.startswith("jaxbnb")))
assert set(jaxbnb.__all__) < set(dir(jaxbnb)), dir(jaxbnb)
print(jaxbnb.__version__)
"""
    assert run(code) == ["jaxbnb", importlib.metadata.version("jaxbnb")]


def test_a_name_is_what_type_checkers_take_it_for():
    """The imports that only they run, and what a first use finds."""
    statements = ast.walk(ast.parse(inspect.getsource(jaxbnb)))
    declared = {
        name.name: importlib.import_module(statement.module)
        for statement in statements
        if isinstance(statement, ast.ImportFrom) and statement.module[:6] == "jaxbnb"
        for name in statement.names
    }
    assert sorted(declared) == jaxbnb.__all__
    for name, module in declared.items():
        if module is jaxbnb:
            assert getattr(jaxbnb, name) is importlib.import_module(f"jaxbnb.{name}")
        else:
            assert getattr(jaxbnb, name) is getattr(module, name)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="'jaxbnb' has no attribute 'adam9bit'"):
        _ = jaxbnb.adam9bit
    with pytest.raises(ImportError, match="adam9bit"):
        exec("from jaxbnb import adam9bit")
