"""Small language models: a Llama, and one that compiles at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import Llama, LlamaConfig
from jaxbnb.nnx import quantize_model

VOCAB = 61


class _Body(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.proj = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, tokens, *, remat=False):
        return jnp.tanh(self.proj(self.embed(tokens)))


class _Bigrams(nnx.Module):
    """The parts of a model that `next_token_loss` uses."""

    def __init__(self, rngs):
        self.model = _Body(rngs)
        self.lm_head = nnx.Linear(16, VOCAB, rngs=rngs)

    def logits(self, hidden):
        return self.lm_head(hidden)


def fill(make, scale=0.25):
    """A module without its initializers, which take longest to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    generator = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(scale * generator.standard_normal(x.shape), x.dtype),
        state,
    )
    return nnx.merge(graphdef, state)


def make_llama(*, quantized=False, adapters=None, compute_dtype=None, **changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = LlamaConfig(**{**sizes, **changes})
    model = fill(lambda: Llama(config, dtype=compute_dtype, rngs=nnx.Rngs(0)))
    if quantized:
        quantize_model(model, QuantConfig("int8", block_size=16))
    return with_adapters(model, adapters)


def make_bigrams(*, adapters=("proj",)):
    return with_adapters(fill(lambda: _Bigrams(nnx.Rngs(0))), adapters)


def with_adapters(model, targets):
    if targets:
        config = LoraConfig(r=4, target_modules=targets)
        add_adapter(model, config, rngs=nnx.Rngs(1))
    return model


@pytest.fixture(scope="session")
def make():
    """The builders above, which importlib's import mode cannot import."""

    class Make:
        llama = staticmethod(make_llama)
        bigrams = staticmethod(make_bigrams)

        @staticmethod
        def tokens(*shape, seed=0):
            rng = np.random.default_rng(seed)
            return rng.integers(0, VOCAB, shape).astype(np.int32)

    return Make
