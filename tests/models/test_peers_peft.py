"""PEFT itself on the families that name or fuse their layers in other ways."""

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb.lora import LoraConfig, add_adapter, load_adapter, save_adapter
from jaxbnb.lora._targets import find_adapted

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))
made.FAMILIES["phi3"] = ("Phi3", made.SIZES)
TOKENS = jnp.asarray(made.TOKENS, jnp.int32)


def theirs(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(made.TOKENS)).logits.float().numpy()


def logits(model):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state)(TOKENS))(state))


def fill(model):
    """Values for B, which starts from zeros, and for magnitudes."""
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.LoRAParam)
    for _, parameter in nnx.to_flat_state(state):
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter.get_value() + jnp.asarray(noise, jnp.float32))
    nnx.update(model, state)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "lora_alpha": 6}),
        ("gpt_neox", {"target_modules": ["query_key_value"], "use_dora": True}),
        ("opt", {"target_modules": "all-linear", "rank_pattern": {"fc1": 2}}),
        ("bloom", {"target_modules": ["query_key_value"], "lora_alpha": 5}),
        ("falcon_40b", {"target_modules": "all-linear", "use_dora": True}),
        # A head with a bias.
        ("gptj", {"target_modules": ["lm_head", "q_proj", "fc_in"]}),
        # A head that is the embedding, beside modules that are not torch.nn.Linear.
        (
            "gpt2",
            {"target_modules": ["lm_head", "c_attn"], "exclude_modules": r".*\.0\..*"},
        ),
        (
            "phi3",
            {
                "target_modules": r".*\.1\..*(qkv|gate_up|o)_proj",
                "rank_pattern": {"qkv_proj": 5},
                "alpha_pattern": {"gate_up_proj": 3},
                "use_rslora": True,
            },
        ),
    ],
)
def test_we_open_what_peft_saves(toys, tmp_path, family, options):
    folder = toys(family)
    model = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=3, **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxbnb.load_pretrained(folder)
    base = logits(ours) if family == "gpt2" else None
    load_adapter(ours, tmp_path / "theirs")
    got, want = logits(ours), torch_logits(model)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert base is None or np.abs(got - base).max() > 0.05
    # What was shared is written once again: the tensors are PEFT's own.
    save_adapter(ours, tmp_path / "ours")
    again, first = (
        load_file(tmp_path / which / "adapter_model.safetensors")
        for which in ("ours", "theirs")
    )
    # But of a head PEFT saves the base's weight too.
    first = {name: x for name, x in first.items() if "base_layer" not in name}
    assert again.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"lora_alpha": 5}),
        ("gpt_bigcode", {"target_modules": ["q_proj", "v_proj"]}),
        ("codegen", {"use_dora": True}),
        # A part of a fused layer; ranks and scales that differ among its parts.
        (
            "phi3",
            {
                "target_modules": ["q_proj", "v_proj", "layers.0.mlp.up_proj"],
                "rank_pattern": {"q_proj": 1},
                "alpha_pattern": {"v_proj": 3},
                "use_rslora": True,
            },
        ),
        (
            "gpt_neox",
            {"target_modules": [f"{x}_proj" for x in "qkvo"], "use_dora": True},
        ),
    ],
)
def test_peft_opens_what_we_save(toys, tmp_path, family, options):
    folder = toys(family)
    ours = jaxbnb.load_pretrained(folder)
    add_adapter(ours, LoraConfig(r=2, **options), rngs=nnx.Rngs(0))
    fill(ours)
    save_adapter(ours, tmp_path)
    ours.eval()
    model = peft.PeftModel.from_pretrained(theirs(folder), tmp_path).eval()
    got, want = logits(ours), torch_logits(model)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(got - torch_logits(theirs(folder))).max() > 0.05
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["fan_in_fan_out"] is (family == "gpt2")
    # And here each layer has again what it had, at the rank that it had.
    again = jaxbnb.load_pretrained(folder)
    load_adapter(again, tmp_path)
    for x, y in zip(find_adapted(ours), find_adapted(again), strict=True):
        x, y = (each.layer.adapters["default"] for each in (x, y))
        assert x.ranks == y.ranks
        weight = np.ones((*x.lora_a.shape[:-1], x.lora_b.shape[-1]), np.float32)
        np.testing.assert_allclose(x.change(weight), y.change(weight), atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_a_fused_weight_is_refused(toys, tmp_path, init):
    folder = toys("gpt2")
    options = {"target_modules": ["c_attn"], "init_lora_weights": init}
    config = LoraConfig(r=2, **options | {"target_modules": ["q_proj"]})
    model = jaxbnb.load_pretrained(folder)
    add_adapter(model, config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"c_attn is .*k_proj.* in one, and init_lora"):
        save_adapter(model, tmp_path / "ours")
    model = peft.get_peft_model(theirs(folder), peft.LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(NotImplementedError, match=r"c_attn is .* Merge the adapter"):
        load_adapter(jaxbnb.load_pretrained(folder), tmp_path / "theirs")


def test_dora_in_part_of_a_fused_layer_is_refused(toys, tmp_path):
    model = jaxbnb.load_pretrained(toys("gpt2"))
    config = LoraConfig(target_modules=["q_proj"], use_dora=True)
    add_adapter(model, config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"c_attn is .* with use_dora it is adapted"):
        save_adapter(model, tmp_path)
