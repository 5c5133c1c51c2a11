"""The benchmark of other packages' methods: both sides have the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb
from jaxbnb.benchmarks import _calibrate_peers as bench
from tests.finetune import toy

GROUP = 16
# Bits of the codes, and of the scale and the zero point of a group.
SIZES = {"hqq": 4 + (16 + 16) / GROUP, "llmcompressor": 4 + (16 + 4) / GROUP}


def identify(peer):
    return f"{peer.method}-{peer.group_size}"


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("peer", bench.PEERS, ids=identify)
def test_the_weights_are_the_packages(peer, tmp_path):
    pytest.importorskip(peer.package)
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    toy.write_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 2, 16))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    before = bench.compute_perplexity(theirs, tokens[0])
    peer.quantize(theirs, [*tokens], GROUP)
    own = bench.compute_perplexity(theirs, tokens[0])
    bits = peer.write(theirs, tmp_path / "quantized")
    assert bits == SIZES[peer.package]
    model = jaxbnb.load_pretrained(tmp_path / "quantized", dtype=jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        ours = jaxbnb.finetune.perplexity(model, tokens[0])
    # Sums of float32 of some 100 terms, in another order: roundings of 2^-24 each.
    np.testing.assert_allclose(ours, own, rtol=100 * 2**-24)
    assert abs(own / before - 1) > 1e-4
    exact = jaxbnb.load_pretrained(tmp_path, dtype=jnp.float32)
    np.testing.assert_array_equal(
        model.model.embed_tokens.embedding[...],
        exact.model.embed_tokens.embedding[...],
    )
    up = model.model.layers.layer.mlp.up_proj.kernel[...]
    weight = up.dequantize() if isinstance(up, jaxbnb.QuantizedArray) else up
    groups = np.asarray(weight).transpose(0, 2, 1).reshape(-1, GROUP)
    # Sixteen levels at equal distances, of which a group may use fewer.
    places = (groups - groups.min(1, keepdims=True)) / np.ptp(groups, 1)[:, None]
    steps = np.arange(1, 16)[:, None, None] * places
    distances = np.abs(steps - np.round(steps)).max(2).min(0)
    np.testing.assert_array_less(distances, 1e-4)


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr(bench, "is_installed", lambda *names: False)
    with pytest.raises(ModuleNotFoundError, match=r"one of \['hqq', 'llmcompressor'\]"):
        next(bench.bench_calibrate_peers())


def test_names():
    names = [str(peer) for peer in bench.PEERS]
    assert len(set(names)) == len(names)
    assert "GPTQ, int4 in groups of 64, 16 windows, by llmcompressor" in names
    assert "HQQ, int4 in groups of 64, by hqq" in names
