"""merge_calibrated: a small update survives a merge into 4 bits."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.calibration import _merge, compare, merge_calibrated
from jaxbnb.lora import LoraConfig, add_adapter, merge
from jaxbnb.models import CausalLM
from jaxbnb.nnx import QuantLinear
from tests.calibration.toy import make_model, tokens

NF4 = jaxbnb.QuantConfig("nf4", block_size=32)


def make_adapted(quant=NF4):
    """A model with an adapter of rank 1, and no initializers, which compile long."""
    rng = np.random.default_rng(0)
    model = make_model(rng)
    if quant is not None:
        jaxbnb.nnx.quantize_model(model, quant)
    add_adapter(model, LoraConfig(r=1, lora_alpha=1), rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, jaxbnb.lora.LoraAdapter):
            # Less than half of the least distance between levels, 0.08 of an absmax of
            # about 2 deviations: each element is rounded back to where it was.
            a, b = module.lora_a, module.lora_b
            signs = rng.choice([-1.0, 1.0], (a.size + b.size)).astype(np.float32)
            a[...] = signs[: a.size].reshape(a.shape)
            size = a.shape[-2] ** -0.5 / 14
            b[...] = size * signs[a.size :].reshape(b.shape)
    return model


def test_a_small_update_is_kept(monkeypatch):
    model, held_out = make_adapted(), tokens(4, seed=1)
    before = jax.tree.map(np.asarray, nnx.state(model))
    calls = []

    def tune(tuned, reference, texts, **options):
        """Compiling the real one would take as long as everything else."""
        calls.append((type(tuned), reference, len(texts), options))
        return [1.0]

    monkeypatch.setattr(_merge, "tune", tune)
    result = merge_calibrated(
        model, iter(tokens(4)), NF4, method="gptq", tune_steps=3, seed=5
    )
    assert calls == [(CausalLM, model, 4, {"steps": 3, "seed": 5, "progress": None})]
    assert result.divergences == [1.0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    up = result.model.model.layers.layer.mlp.up_proj
    assert type(up) is QuantLinear
    assert (up.config, len(result.layers)) == (NF4, 2 * 7)
    plain = nnx.merge(*nnx.split(model))
    lost = merge(plain).kept
    assert set(lost) == set(result.kept)
    assert max(lost.values()) < 0.2
    assert min(result.kept.values()) > 0.4
    # Both errors count: of what is lost, and of the codes that changed.
    kls = [compare(x, model, held_out).kl for x in (result.model, plain)]
    assert kls[0] < 0.5 * kls[1]


def test_what_cannot_be_merged():
    model = make_adapted(quant=None)
    with pytest.raises(ValueError, match=r"tune_steps must be 0, or .* got 4 and 0"):
        merge_calibrated(model, [], NF4, tune_steps=4)
    with pytest.raises(ValueError, match="codes can be chosen for nf4, "):
        merge_calibrated(model, tokens(1), "mxfp4")
    jaxbnb.lora.set_adapter(model, [])
    with pytest.raises(ValueError, match="no active adapters"):
        merge_calibrated(model, tokens(1), NF4)
    # A base that is not quantised, and no text.
    jaxbnb.lora.set_adapter(model, "default")
    result = merge_calibrated(model, config=NF4, method="mse")
    assert {report.method for report in result.layers} == {"mse"}
