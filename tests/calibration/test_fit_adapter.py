"""fit_adapter: an adapter starts from what quantisation took from its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import jaxbnb
from jaxbnb.calibration import _fit_adapter, compare, fit_adapter
from jaxbnb.lora import LoraAdapter, LoraConfig, add_adapter, load_adapter, save_adapter
from tests.calibration.toy import make_model, tokens

NF4 = jaxbnb.QuantConfig("nf4", block_size=32, double_quant=True)


def make_models(lora=LoraConfig(r=8), quant=NF4):  # noqa: B008 (frozen)
    """A model with an adapter over quantised layers, and the one before that."""
    reference = make_model()
    model = nnx.merge(*nnx.split(reference))
    if quant is not None:
        jaxbnb.nnx.quantize_model(model, quant)
    add_adapter(model, lora, rngs=nnx.Rngs(0))
    return model, reference


def factors(model):
    return {
        path: (np.asarray(x.lora_a[...]), np.asarray(x.lora_b[...]))
        for path, x in nnx.iter_modules(model)
        if isinstance(x, LoraAdapter)
    }


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
@pytest.mark.parametrize("rank", [3, 30])
def test_the_factors_are_the_best(shape, rank):
    rng = np.random.default_rng(0)
    missing = rng.standard_normal(shape)
    x = rng.standard_normal((400, shape[0])) @ rng.standard_normal((shape[0],) * 2)
    moment = x.T @ x
    a, b, error = _fit_adapter._fit(missing, moment, rank, scale=2.0)
    # By the symmetric root, where the house takes a triangular one.
    damped = moment + 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    root = scipy.linalg.sqrtm(damped).real
    values = np.linalg.svd(root @ missing, compute_uv=False) ** 2
    assert error == pytest.approx(values[rank:].sum() / values.sum(), rel=1e-9)
    left = np.linalg.norm(root @ (missing - 2.0 * a @ b)) ** 2
    assert left == pytest.approx(values[rank:].sum(), rel=1e-9)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), 3**-0.5)


@pytest.mark.parametrize("method", ["guided", "gptq"])
def test_a_language_model(method):
    model, reference = make_models()
    held_out, seen = tokens(4, seed=1), []
    before = compare(model, reference, held_out).kl
    old = factors(model)
    layers = fit_adapter(
        model,
        reference,
        tokens(4),
        method=method,
        progress=lambda *x: seen.append(x),
    )
    # Seven layers in each of two, and the head has no adapter.
    assert len(layers) == 14
    assert seen[-1] == (14, 14, layers[-1].path)
    assert all(0 < layer.error < 0.9 for layer in layers)
    assert compare(model, reference, held_out).kl < 0.8 * before
    for path, (a, b) in factors(model).items():
        assert (a.shape, b.shape) == tuple(x.shape for x in old[path])
        assert np.abs(b).max(axis=(1, 2)).min() > 0
        # Training changes the update as fast as from add_adapter's start.
        size = np.linalg.norm(a, axis=1).mean() / np.linalg.norm(old[path][0], axis=1)
        assert 0.8 < size.mean() < 1.25


def test_inputs_decide():
    """The text weighs the error: without it, more is left on text like that."""
    model, reference = make_models()
    weighed = fit_adapter(model, reference, tokens(4), method="gptq")
    other, _ = make_models()
    text = [np.zeros_like(x) for x in tokens(4)]
    alike = fit_adapter(other, reference, text, method="gptq")
    # One token: the inputs of the first layer have rank 1 but for damping.
    first = [
        next(x.error for x in layers if x.path.endswith("q_proj"))
        for layers in (weighed, alike)
    ]
    assert first[1] < 0.5 * first[0]


def test_ranks_and_scales_of_layers():
    lora = LoraConfig(
        r=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 3},
        alpha_pattern={"q_proj": 4},
        layers_to_transform=[1],
    )
    model, reference = make_models(lora)
    old = factors(model)
    layers = fit_adapter(model, reference, tokens(2), method="gptq")
    assert len(layers) == 4
    for layer in layers:
        assert (layer.error == 1) == (layer.number == 0)
    for path, (a, b) in factors(model).items():
        old_a, old_b = old[path]
        np.testing.assert_array_equal(a[0], old_a[0])
        np.testing.assert_array_equal(b[0], old_b[0])
        used = 3 if "up_proj" in path else 8
        assert not b[1, used:].any()
        assert b[1, :used].any(axis=-1).all()


def test_dora_keeps_the_sum():
    model, reference = make_models(LoraConfig(r=8, use_dora=True))
    plain, _ = make_models()
    text = tokens(2)
    for each in (model, plain):
        fit_adapter(each, reference, text, method="gptq")
        each.eval()
    logits = [np.asarray(each(text[0])) for each in (model, plain)]
    # DoRA divides by norms that are the magnitudes: a rounding of float32 each.
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4 * np.abs(logits[1]).max())


def test_nothing_is_missing():
    """Over layers that were not quantised, the adapter stays one that can learn."""
    model, reference = make_models(quant=None)
    old = factors(model)
    layers = fit_adapter(model, reference, tokens(1), method="gptq")
    assert {layer.error for layer in layers} == {1.0}
    jax.tree.map(np.testing.assert_array_equal, factors(model), old)


def test_saved_for_the_same_base(tmp_path):
    model, reference = make_models()
    fit_adapter(model, reference, tokens(2), method="gptq")
    save_adapter(model, tmp_path / "adapter")
    fresh = nnx.merge(*nnx.split(reference))
    jaxbnb.nnx.quantize_model(fresh, NF4)
    load_adapter(fresh, tmp_path / "adapter")
    text = tokens(1)[0]
    for each in (model, fresh):
        each.eval()
    np.testing.assert_array_equal(model(text), fresh(text))


def test_bad_input():
    model, reference = make_models()
    with pytest.raises(ValueError, match="has an adapter 'other'"):
        fit_adapter(model, reference, tokens(1), name="other")
    with pytest.raises(ValueError, match="batches are empty"):
        fit_adapter(model, reference, [])
    with pytest.raises(TypeError, match="not a language model"):
        fit_adapter(model, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tokens(1))
    with pytest.raises(ValueError, match="method"):
        fit_adapter(model, reference, tokens(1), method="mse")
    old = factors(model)
    embedding = reference.model.embed_tokens.embedding
    embedding[...] = embedding[...].at[0].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit_adapter(model, reference, tokens(1), method="gptq")
    jax.tree.map(np.testing.assert_array_equal, factors(model), old)
