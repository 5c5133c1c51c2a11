"""What `import jaxbnb` does, and mostly does not do; each in a fresh interpreter."""

import subprocess
import sys

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
    code = f"""
import sys
{DEPENDENCIES}
before = set(sys.modules)
import jaxbnb
print(*(set(sys.modules) - before) & set("{optional}".split()))
"""
    assert run(code) == []
