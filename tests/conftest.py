"""Every test runs on eight CPU devices and with strict dtype promotion."""

import os
import zlib

# `JAX_PLATFORMS=cuda make test` runs the suite on a GPU instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A new shape compiles anew, which is no reason to fail; the same run finds the same.
hypothesis.settings.register_profile("jaxbnb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxbnb")


def pytest_addoption(parser):
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="of tests marked `matrix`, run every combination of parameters",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=0,
        help="how many conversions to kill at random moments; `make fuzz` does",
    )


def pytest_collection_modifyitems(config, items):
    """Of the tests of a module that are marked `matrix`, a third.

    Among them is each test with some value of its parameters, and each value in some
    test: what one combination finds its neighbours find, and each compiles for long.
    """
    if config.getoption("all_combinations"):
        return
    matrix = [item for item in items if item.get_closest_marker("matrix")]
    met, left_out = set(), set()
    for first in (True, False):
        for item in (x for x in matrix if _is_drawn(x) == first):
            values = _values(item)
            if first or not values <= met:
                met |= values
            else:
                left_out.add(item)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _is_drawn(item):
    # By its name alone, so that all workers and runs draw the same.
    return zlib.crc32(item.nodeid.encode()) % 3 == 0


def _values(item):
    """A test, and each value that a parameter of this module's tests has in it."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    values = {(item.module, name, id(value)) for name, value in params.items()}
    return values | {item.function}
