"""Readers of what a model is: config.json, and GGUF files."""

import functools
import json

import mutators
import numpy as np
import tokenizers
from fuzz_tokenizers import use
from fuzz_weights import BUILD, TOY, names_the_file, read_all
from fuzzing import Reader

from jaxbnb import convert, models

CONFIG = {"model_type": "llama", "eos_token_id": [1, 2], **TOY["TOY"]} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": True,
}


@functools.cache
def _model():
    model = TOY["make_model"](num_hidden_layers=1, tie_word_embeddings=True)
    return TOY["huggingface_tensors"](model)


def make_config(rng, damaged):
    from safetensors.numpy import save

    fields = CONFIG | {"num_hidden_layers": 1}
    return {
        "config.json": json.dumps(fields).encode(),
        "model.safetensors": save(_model()),
    }


def read_config(folder):
    models.check_pretrained(folder)
    convert.convert_checkpoint(folder, folder / "out")


def make_gguf(rng, damaged):
    """Half of them with a field of the metadata that is something else."""
    metadata = BUILD["llama_metadata"]()
    if damaged and rng.random() < 0.5:
        metadata = _damaged(metadata, rng)
    return {"x.gguf": BUILD["gguf_bytes"](metadata, BUILD["llama_tensors"]())}


def _damaged(metadata, rng):
    """Other values of the same type: whatever the format can say."""
    changed = {}
    for key, (kind, value) in metadata.items():
        value = mutators.damage_value(value, rng) if rng.random() < 0.2 else value
        try:
            BUILD["_value"](kind, value)
        except Exception:  # What is not of its type; struct and str say so variously.
            continue
        changed[key] = kind, value
    return changed


EXPECTED = {"model.embed_tokens.weight", "model.norm.weight"} | {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in ["input_layernorm", "post_attention_layernorm"]
    + [f"self_attn.{which}_proj" for which in "qkvo"]
    + [f"mlp.{which}_proj" for which in ("gate", "up", "down")]
}


@names_the_file
def read_gguf(folder):
    _, arrays = read_all(folder / "x.gguf")
    # That is: the names and dtypes of the file before it was changed.
    assert set(arrays) == EXPECTED
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    models.check_pretrained(folder / "x.gguf")


def make_gguf_tokenizer(rng, damaged):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_level = {
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "smollm"),
        "tokenizer.ggml.add_eos_token": (7, True),
        "tokenizer.ggml.eos_token_id": (4, 257),
        "tokenizer.ggml.merges": (9, (8, ["t h"])),
        "tokenizer.ggml.token_type": (9, (5, [1] * 257 + [3])),
        "tokenizer.ggml.tokens": (9, (8, [*alphabet, "th", "<|end|>"])),
    }
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += ["▁", "t", "h", "e", "th", "▁th", "1"]
    sentence_pieces = {
        "tokenizer.ggml.model": (8, "llama"),
        "tokenizer.ggml.tokens": (9, (8, pieces)),
        "tokenizer.ggml.scores": (9, (6, [-float(i) for i in range(len(pieces))])),
        "tokenizer.ggml.token_type": (9, (5, [2, 3, 3] + [6] * 256 + [1] * 7)),
        "tokenizer.ggml.bos_token_id": (4, 1),
        "tokenizer.ggml.eos_token_id": (4, 2),
        "tokenizer.ggml.add_space_prefix": (7, True),
    }
    fields = rng.choice([bytes_level, sentence_pieces])
    if damaged and rng.random() < 0.7:
        fields = _damaged(fields, rng)
    return {"tokenizer.gguf": BUILD["gguf_bytes"](fields, {})}


@names_the_file
def read_gguf_tokenizer(folder):
    use(convert.load_tokenizer(folder / "tokenizer.gguf"))


READERS = [
    Reader("config.json", make_config, read_config, ("config.json",)),
    Reader("GGUF", make_gguf, read_gguf),
    Reader("tokenizer in GGUF", make_gguf_tokenizer, read_gguf_tokenizer),
]
