"""Every test runs on eight CPU devices and with strict dtype promotion."""

import os

# `JAX_PLATFORMS=cuda make test` runs the suite on a GPU instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A new shape compiles anew, which is no reason to fail; the same run finds the same.
hypothesis.settings.register_profile("jaxbnb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxbnb")
