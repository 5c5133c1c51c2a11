"""Encoders beside transformers, bitsandbytes and PEFT."""

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb.models import load_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_encoders.py")))
FAMILIES = "bert_tokens", "roberta_tokens", "bert", "vit"
for _family in FAMILIES:
    _kind, _options, _head = made.FAMILIES[_family]
    # Rows of 64, which bitsandbytes quantises in whole blocks.
    _wide = {**_options, "hidden_size": 64, "intermediate_size": 128}
    made.FAMILIES[_family] = _kind, _wide, _head


def theirs(family, folder):
    kind, _, head = made.FAMILIES[family]
    return getattr(transformers, f"{kind}For{head}").from_pretrained(folder).eval()


def torch_logits(family, model):
    with torch.no_grad():
        return made.call(family, model).float().numpy()


@jax.jit(static_argnums=0)
def run(graphdef, state):
    model = nnx.merge(graphdef, state)
    if model.config.num_channels:
        return model(jnp.asarray(made.PIXELS))
    types = made.TYPES if model.config.num_token_types == 2 else None
    return model(
        jnp.asarray(made.TOKENS, jnp.int32),
        attention_mask=jnp.asarray(made.MASK),
        token_type_ids=None if types is None else jnp.asarray(types, jnp.int32),
    )


def assert_near(ours, want):
    got = np.asarray(run(*nnx.split(ours)))
    if want.ndim == 3:
        got, want = got[made.MASK], want[made.MASK]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_beside_bitsandbytes(toys, tmp_path, family):
    """transformers loads what we convert; the logits agree on the same codes."""
    out = tmp_path / "nf4"
    jaxbnb.convert.convert_checkpoint(toys(family), out, quant="nf4")
    model = theirs(family, out)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Linear4bit") >= 12
    # Its product on some CPUs rounds to bfloat16, so bitsandbytes decodes first.
    want = torch_logits(family, model.dequantize())
    ours = load_pretrained(out)
    assert ours.model.layers.layer.mlp.up_proj.kernel.quant_type == "nf4"
    assert_near(ours, want)
    plain = torch_logits(family, theirs(family, toys(family)))
    assert np.abs(want - plain).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("family", ["roberta_tokens", "bert", "vit"])
def test_peft_both_ways(toys, tmp_path, family):
    """An adapter of ours in PEFT, and PEFT's own here; with a head of classes, too."""
    peft = pytest.importorskip("peft")
    folder, rng = toys(family), np.random.default_rng(0)
    ours = load_pretrained(folder)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    saved = None if family == "roberta_tokens" else ["head"]
    config = jaxbnb.lora.LoraConfig(r=2, target_modules=targets, modules_to_save=saved)
    jaxbnb.lora.add_adapter(ours, config, rngs=nnx.Rngs(0))
    state = nnx.state(ours, nnx.LoRAParam)
    for _, parameter in nnx.to_flat_state(state):
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(jnp.asarray(noise, jnp.float32))
    nnx.update(ours, state)
    jaxbnb.lora.save_adapter(ours, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(theirs(family, folder), tmp_path / "ours")
    want = torch_logits(family, model.eval())
    assert_near(ours, want)
    assert np.abs(want - torch_logits(family, theirs(family, folder))).max() > 0.05

    targets, saved = ["query", "value", "intermediate.dense"], saved and ["classifier"]
    if family == "vit":
        targets = ["q_proj", "v_proj", "mlp.fc1"]
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=saved)
    model = peft.get_peft_model(theirs(family, folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = 0.1 * rng.standard_normal(parameter.shape)
                parameter.copy_(torch.tensor(noise))
    model.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(folder)
    jaxbnb.lora.load_adapter(ours, tmp_path / "theirs")
    assert_near(ours, torch_logits(family, model))


def test_adapters_of_vit_from_before_transformers_5_9(toys, tmp_path):
    """Its modules had the names of its files, and so had PEFT's."""
    model = load_pretrained(toys("vit"))
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    config = jaxbnb.lora.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False
    )
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    jaxbnb.lora.save_adapter(model, tmp_path)
    older = {
        "layers.": "encoder.layer.",
        "attention.o_proj": "attention.output.dense",
        "attention.q_proj": "attention.attention.query",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.vit.layers.0.mlp.fc1.lora_A.weight" in tensors
    for new, old in older.items():
        tensors = {name.replace(new, old): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields["target_modules"] = ["query", "output.dense", "intermediate.dense"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    loaded = load_pretrained(toys("vit"))
    jaxbnb.lora.load_adapter(loaded, tmp_path)
    np.testing.assert_array_equal(run(*nnx.split(loaded)), run(*nnx.split(model)))
