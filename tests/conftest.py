"""Every test runs on eight CPU devices and with strict dtype promotion."""

import gc
import os
import random
import subprocess
from importlib import metadata
from pathlib import Path

# `JAX_PLATFORMS=cuda make test` runs the suite on a GPU instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from jaxbnb_kernels import native

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest_plugins = ["tests.quick_compile"]

# No deadline, because a new shape compiles; not random, so that a run repeats.
hypothesis.settings.register_profile("jaxbnb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxbnb")


def pytest_addoption(parser):
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="of tests marked `matrix`, run every combination of parameters",
    )
    parser.addoption(
        "--draw-seed",
        default=None,
        metavar="SEED",
        help="which of the tests marked `matrix` run; the commit unless given",
    )
    parser.addoption(
        "--native-library",
        type=Path,
        help="native kernels to test instead of those installed; see tests/sanitize",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=0,
        help="how many conversions to kill at random moments; `make fuzz` does",
    )


def pytest_configure(config):
    if library := config.getoption("native_library"):
        native.LIBRARY = library
    # The workers of xdist get the options of the process that starts them.
    if config.option.draw_seed is None:
        config.option.draw_seed = _commit()


def pytest_report_header(config):
    drawn = f"a part of the combinations, --draw-seed {config.option.draw_seed}"
    if config.getoption("all_combinations"):
        drawn = "every combination"
    return f"matrix: {drawn}"


def _commit():
    """The commit that is tested, so that each draws anew; without git the version."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("jaxbnb")
    return done.stdout[:8]


def pytest_collection_modifyitems(config, items):
    """Keeps an eighth of each module's tests that are marked `matrix`, and some more.

    Every test stays with some value of its parameters, and every value in some test:
    what one combination finds its neighbours find, and each compiles for long. `make
    test-all` runs all combinations.
    """
    if config.getoption("all_combinations"):
        return
    seed = config.option.draw_seed
    matrix = [item for item in items if item.get_closest_marker("matrix")]
    drawn = {item for item in matrix if _is_drawn(item, seed)}
    covered, left_out = set(), set()
    # Those drawn first, so that only what they miss is added.
    for item in sorted(matrix, key=lambda item: item not in drawn):
        values = _values(item)
        if item in drawn or not values <= covered:
            covered |= values
        else:
            left_out.add(item)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    # What is imported stays. A full collection that skips it is ten times faster.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def fresh_caches():
    """JAX keeps what it has lowered, and lowering takes longer for all of it."""
    yield
    jax.clear_caches()


def _is_drawn(item, seed):
    # By its name and the seed alone, so that all workers draw the same.
    return random.Random(f"{seed}/{item.nodeid}").random() < 1 / 8


def _values(item):
    """A test, and each value that a parameter of this module's tests has in it."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    values = {(item.module, name, id(value)) for name, value in params.items()}
    return values | {item.function}
