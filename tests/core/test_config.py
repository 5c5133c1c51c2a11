import dataclasses

import jax.numpy as jnp
import pytest

from jaxbnb import QuantConfig


def test_defaults():
    config = QuantConfig()
    assert dataclasses.astuple(config) == ("nf4", 64, False, None, None)
    llm_int8 = QuantConfig("llm_int8")
    assert dataclasses.astuple(llm_int8) == ("llm_int8", None, False, None, 6.0)


def test_it_is_a_value():
    assert QuantConfig("fp4", compute_dtype=jnp.bfloat16) == QuantConfig(
        "fp4", compute_dtype=jnp.bfloat16
    )
    assert len({QuantConfig(), QuantConfig("nf4"), QuantConfig("int8")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().block_size = 128


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16", "bfloat16", float])
def test_compute_dtypes(dtype):
    assert QuantConfig(compute_dtype=dtype).compute_dtype == dtype


def test_validation():
    with pytest.raises(ValueError, match="quant_type 'int3' is not known"):
        QuantConfig("int3")
    with pytest.raises(ValueError, match="positive even int, commonly 64; got 63"):
        QuantConfig(block_size=63)
    with pytest.raises(TypeError, match="compute_dtype must be floating, got int8"):
        QuantConfig(compute_dtype=jnp.int8)
    with pytest.raises(TypeError):
        QuantConfig(compute_dtype="bf17")
    with pytest.raises(ValueError, match="llm_int8 has one absmax for a whole row"):
        QuantConfig("llm_int8", double_quant=True)
    with pytest.raises(ValueError, match="takes no block_size"):
        QuantConfig("llm_int8", 64)
    with pytest.raises(ValueError, match="outlier_threshold is of llm_int8 alone"):
        QuantConfig("int8", outlier_threshold=6.0)


@pytest.mark.parametrize("shape", [(128, 6), (3, 128, 6)])
def test_a_kernel_is_blocked_along_the_axis_that_products_sum_over(shape):
    config = QuantConfig("fp4", block_size=32, double_quant=True)
    q = config.quantize_kernel(jnp.ones(shape, jnp.bfloat16))
    assert (q.quant_type, q.block_size, q.double_quant) == ("fp4", 32, True)
    assert (q.axis, q.axis_size, q.shape) == (-2, 128, shape)
    assert q.dtype == jnp.bfloat16
    assert q.absmax.shape == (*shape[:-2], 6, 4)
