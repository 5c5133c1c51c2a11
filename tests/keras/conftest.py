"""Keras on the JAX backend, with the dtype promotion that it counts on."""

import os

# Read when Keras is first imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import pytest


@pytest.fixture(autouse=True)
def promotion():
    """Keras adds booleans to integers, and an optimizer's step to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield
