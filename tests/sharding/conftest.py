"""A small Llama, quantised, with adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import Llama, LlamaConfig
from jaxbnb.nnx import quantize_model

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
NF4 = QuantConfig("nf4", block_size=32)


def make_llama(*, quant=NF4, rank=2, is_abstract=False, **changes):
    """Every device can have its own blocks."""
    config = LlamaConfig(**{**SIZES, **changes})

    def build():
        model = Llama(config, rngs=nnx.Rngs(0))
        if quant is not None:
            quantize_model(model, quant)
        if rank:
            add_adapter(model, LoraConfig(r=rank), rngs=nnx.Rngs(1))
        return model

    # From NumPy: what makes a model takes longest to compile.
    model = nnx.eval_shape(build)
    generator = np.random.default_rng(0)

    def fill(x):
        if x.dtype == jnp.uint8:
            return jnp.asarray(generator.integers(0, 256, x.shape, np.uint8))
        return jnp.asarray(generator.standard_normal(x.shape) / 8, x.dtype)

    if not is_abstract:
        nnx.update(model, jax.tree.map(fill, nnx.state(model)))
    return model


@pytest.fixture(scope="session")
def make():
    """The builders, which importlib's import mode cannot import."""

    class Make:
        llama = staticmethod(make_llama)

        @staticmethod
        def mesh(axis_type=AxisType.Auto, **sizes):
            """A mesh of the first devices, from its axes' names and sizes."""
            count = int(np.prod(list(sizes.values())))
            types = (axis_type,) * len(sizes)
            devices = jax.devices()[:count]
            return jax.make_mesh(
                tuple(sizes.values()), tuple(sizes), types, devices=devices
            )

        @staticmethod
        def tokens(*shape, seed=0):
            generator = np.random.default_rng(seed)
            return generator.integers(0, SIZES["vocab_size"], shape).astype(np.int32)

    return Make
