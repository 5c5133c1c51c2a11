"""The solver chooses the codes that the same algorithm chooses in float64 NumPy."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb import QuantConfig
from jaxbnb.calibration import minimize_error

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "calibration.npz"))


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_codes(quant_type):
    inputs = GOLDEN["inputs"].astype(np.float64)
    q = minimize_error(
        jnp.asarray(GOLDEN["kernel"], jnp.float32),
        inputs.T @ inputs / len(inputs),
        QuantConfig(quant_type, block_size=32),
    )
    codes = np.asarray(q.codes)
    if quant_type == "nf4":
        codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(4, 64)
    else:
        codes = codes.astype(np.int16) + 127
    np.testing.assert_array_equal(codes, GOLDEN[f"{quant_type}_codes"])
    # A scale is a quotient of sums over 64 x 32 products: some 10 roundings of float32.
    np.testing.assert_allclose(q.absmax, GOLDEN[f"{quant_type}_absmax"], rtol=1e-5)
