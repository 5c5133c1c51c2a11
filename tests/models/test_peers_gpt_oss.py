"""gpt-oss against transformers, and its experts in MXFP4 as they are stored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import models
from jaxbnb.convert import open_checkpoint

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 0.5,
    "max_position_embeddings": 256,
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES)
    config.rope_parameters |= {"original_max_position_embeddings": 16}
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            # Sinks and biases as large as what they are added to.
            x.copy_(
                torch.randn_like(x) * (0.5 if "norm" in name or x.ndim < 2 else 0.2)
            )
    folder = tmp_path_factory.mktemp("gpt_oss")
    model.save_pretrained(folder)
    return model, folder


def test_it_computes_what_transformers_does(peer):
    theirs, folder = peer
    model = models.load_pretrained(folder)
    with torch.no_grad():
        want = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    got = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    tokens = model.generate(jnp.asarray(TOKENS), 6)
    with torch.no_grad():
        continued = theirs.generate(
            torch.from_numpy(TOKENS), max_new_tokens=6, do_sample=False
        )
    np.testing.assert_array_equal(tokens, continued.numpy()[:, TOKENS.shape[1] :])


def test_it_is_saved_as_it_was(peer, tmp_path):
    _, folder = peer
    model = models.load_pretrained(folder)
    saved = models.save_pretrained(model, tmp_path / "saved", source=folder)
    source = open_checkpoint(folder)
    assert set(saved.tensors) == set(source.tensors)
    for name in source.tensors:
        np.testing.assert_array_equal(saved.read(name), source.read(name))


def to_mxfp4(folder, new):
    """Stores the experts as the published checkpoints have them, and decoded."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    stored = {}
    for name, x in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            q = jaxbnb.quantize(jnp.asarray(x), "mxfp4", axis=-2)
            codes = np.asarray(q.codes)
            blocks = (codes << 4 | codes >> 4).reshape(*codes.shape[:2], -1, 16)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": np.asarray(q.absmax)}
            tensors[name] = np.asarray(q.dequantize())
        else:
            stored[name] = x
    config = json.loads((folder / "config.json").read_text())
    for where, arrays, more in (
        (new / "decoded", tensors, {}),
        (new / "q", stored, {"quantization_config": {"quant_method": "mxfp4"}}),
    ):
        where.mkdir()
        save_file(arrays, where / "model.safetensors", {"format": "pt"})
        (where / "config.json").write_text(json.dumps(config | more))
    return new / "q", new / "decoded"


def test_experts_in_mxfp4_stay_packed(peer, tmp_path):
    quantized, decoded = to_mxfp4(peer[1], tmp_path)
    model, plain = map(models.load_pretrained, (quantized, decoded))
    experts = model.model.layers.layer.mlp.experts.layer
    assert experts.gate_proj.kernel.quant_type == "mxfp4"
    assert experts.gate_proj.kernel.shape == (2, 4, 64, 32)
    run = nnx.jit(lambda model, tokens: model(tokens))
    got, want = (run(m, jnp.asarray(TOKENS)) for m in (model, plain))
    # The same weights, and sums in another order.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(r=2), rngs=nnx.Rngs(0))

    layers = [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in (0, 3)]
    # Each expert has a name of its own in adapters' files.
    assert [model.file_layer(layer).name for layer in layers] == layers

    def loss(model):
        return jnp.mean(model(jnp.asarray(TOKENS)).astype(jnp.float32) ** 2)

    grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    norms = [float(jnp.sum(x**2)) for x in jax.tree.leaves(grads)]
    assert np.isfinite(norms).all()
    assert max(norms) > 0
