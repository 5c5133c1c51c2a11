"""A toy model with random weights, which stands in for SmolLM2."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

tokenizers = pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCAB, WIDTH, MLP = 259, 32, 64
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch):
    """The examples import what they share, and promote dtypes, as users' scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"):
        yield
    sys.modules.pop("_shared", None)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory):
    """A Llama over bytes, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("toy")
    generator = np.random.default_rng(0)
    shapes = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (WIDTH, WIDTH)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (WIDTH, WIDTH)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (MLP, WIDTH)),
        "mlp.down_proj": (WIDTH, MLP),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDTH,)),
    }
    shapes = {f"layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"embed_tokens": (VOCAB, WIDTH), "norm": (WIDTH,)}
    tensors = {
        f"model.{name}.weight": 0.2 * generator.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        **{"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH},
        **{"intermediate_size": MLP, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 1024, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = {letter: number for number, letter in enumerate(sorted(alphabet))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE})
    )
    return folder
