"""PEFT itself on what adapters train besides factors: logits in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb.lora import load_adapter, save_adapter
from jaxbnb.models import resize_token_embeddings

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 32, "bos_token_id": None, "eos_token_id": None}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
LLAMA = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
UNTIED = {"tie_word_embeddings": False, "attention_bias": True}
KINDS = {
    "tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "untied": ("Llama", LLAMA | UNTIED),
    "gpt2": ("GPT2", GPT2),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """``toys(kind)``: a folder, with the model of transformers in it, made once."""
    transformers = pytest.importorskip("transformers")
    folders = {}

    def make(kind):
        if kind not in folders:
            torch.manual_seed(0)
            name, sizes = KINDS[kind]
            config = getattr(transformers, f"{name}Config")(**sizes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            folders[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folders[kind])
        return folders[kind]

    return make


def theirs(folder, rows=None):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if rows is not None:
        model.resize_token_embeddings(rows)
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def logits(model, tokens):
    graphdef, state = nnx.split(model)
    compute = jax.jit(lambda s: nnx.merge(graphdef, s)(jnp.asarray(tokens)))
    return np.asarray(compute(state))


@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [
        ("tied", None, {"trainable_token_indices": [1, 5]}),
        ("tied", None, {"target_modules": ["q_proj", "embed_tokens"]}),
        (
            "tied",
            None,
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        ("tied", 35, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("tied", 35, {"trainable_token_indices": [33, 2]}),
        # PEFT takes "norm" for the end of "input_layernorm", too.
        ("untied", None, {"bias": "lora_only", "modules_to_save": ["norm", "mlp"]}),
        (
            "untied",
            None,
            {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
        ),
        ("untied", 35, {"target_modules": ["embed_tokens"], "use_dora": True}),
        # Modules that are several layers here, and are stored as (in, out).
        ("gpt2", None, {"target_modules": ["c_attn", "wte"], "bias": "all"}),
        (
            "gpt2",
            35,
            {"target_modules": ["c_proj"], "modules_to_save": ["c_attn", "ln_f"]},
        ),
    ],
)
def test_logits_in_both_directions(toys, tmp_path, kind, rows, options):
    folder = toys(kind)
    options = {"target_modules": ["q_proj"], **options}
    config = peft.LoraConfig(r=2, **options)
    model = peft.get_peft_model(theirs(folder, rows), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    every = True if rows else "auto"
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=every)
    tokens = [[1, 5, 2, (rows or 32) - 1, 7, 0]]
    want = torch_logits(model, tokens)
    ours = jaxbnb.load_pretrained(folder)
    if rows is not None:
        resize_token_embeddings(ours, rows)
    load_adapter(ours, tmp_path / "theirs")
    np.testing.assert_allclose(logits(ours, tokens), want, rtol=0, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs(folder, rows), tmp_path / "ours")
    got = torch_logits(again.eval(), tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # The values are written as they were read. If PEFT adapts a resized embedding, it
    # forgets the head.
    first, second = (
        load_file(tmp_path / which / "adapter_model.safetensors")
        for which in ("theirs", "ours")
    )
    for name in second.keys() & first.keys():
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)
