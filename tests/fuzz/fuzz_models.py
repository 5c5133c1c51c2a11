"""Readers of what a model is: config.json, and GGUF files."""

import functools
import json
import tempfile
from pathlib import Path

import mutators
import numpy as np
import tokenizers
from fuzz_tokenizers import use
from fuzz_weights import BUILD, TOY, names_the_file, read_all
from fuzzing import ROOT, Reader

from jaxbnb import convert, models
from jaxbnb.models import _load_plan, _rope

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
    convert_elsewhere(folder)


def convert_elsewhere(folder):
    """Writes what the folder holds; next to it, since no source is written into."""
    with tempfile.TemporaryDirectory() as scratch:
        convert.convert_checkpoint(folder, Path(scratch) / "out")


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


@functools.cache
def _families():
    """Returns a toy's config and the shapes of its tensors, for each family."""
    goldens = np.load(ROOT / "tests" / "goldens" / "families.npz")
    names = [name for name in goldens if name.endswith("_json")]
    return [json.loads(goldens[name].tobytes()) for name in names]


# What older and newer configs have besides.
OTHERS = {
    "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32},
    "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "head_dim": 16,
    "query_pre_attn_scalar": 64,
    "note": "\u2581",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
KINDS = ("dynamic", "linear", "llama3", "longrope", "yarn")


def make_family(rng, damaged):
    from safetensors.numpy import save

    about = rng.choice(_families())
    fields, shapes = about["config"], about["shapes"]
    if damaged:
        names = rng.sample([*OTHERS], rng.choice([0, 1, 2]))
        fields = fields | {name: OTHERS[name] for name in names}
        if "rope_parameters" in fields and rng.random() < 0.3:
            rope = fields["rope_parameters"] | {"rope_type": rng.choice(KINDS)}
            fields = fields | {"rope_parameters": rope}
    if fields["model_type"] == "gemma3_text" and rng.random() < 0.5:
        fields = {"model_type": "gemma3", "text_config": fields}
        shapes = {f"language_model.{name}": shape for name, shape in shapes.items()}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    return {
        "config.json": json.dumps(fields).encode(),
        "model.safetensors": save(tensors),
    }


def read_family(folder):
    """Its frequencies too, which no weights are needed for."""
    config = _load_plan.prepare(folder, None, None).config
    dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    for theta, scaling in (
        (config.rope_theta, config.rope_scaling),
        (config.local_rope_theta or 1.0, None),
    ):
        for length in (1, 100):
            got = _rope.rope_frequencies(dim, theta, scaling, length)
            assert got.shape == (dim // 2,)
    # What is told of the config is kept, whatever else is in it.
    convert_elsewhere(folder)


def make_gguf_family(rng, damaged):
    """Makes another architecture's metadata; its tensors are never read."""
    metadata = BUILD["llama_metadata"]()
    other = rng.choice(ARCHITECTURES)
    metadata = {
        key.replace("llama.", f"{other}.", 1): value for key, value in metadata.items()
    }
    metadata["general.architecture"] = (8, other)
    extra = {
        "rope.scaling.type": (8, rng.choice(["yarn", "linear", "longrope", "none"])),
        "rope.scaling.factor": (6, 4.0),
        "rope.scaling.original_context_length": (4, 16),
        "rope.scaling.attn_factor": (6, 1.0),
        "attention.sliding_window": (4, 8),
        "attention.layer_norm_epsilon": (6, 1e-5),
        "expert_count": (4, 4),
        "expert_used_count": (4, 2),
    }
    if damaged:
        for key in rng.sample([*extra], rng.randrange(len(extra))):
            metadata[f"{other}.{key}"] = extra[key]
        metadata = _damaged(metadata, rng) if rng.random() < 0.7 else metadata
    else:
        metadata = BUILD["llama_metadata"]()
    return {"x.gguf": BUILD["gguf_bytes"](metadata, BUILD["llama_tensors"]())}


ARCHITECTURES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3"),
    *("phi3", "gpt2", "gptneox", "bloom", "starcoder"),
)


def read_gguf_family(folder):
    models.check_pretrained(folder / "x.gguf")


@names_the_file
def read_gguf(folder):
    _, arrays = read_all(folder / "x.gguf")
    # That is: the names and dtypes of the file before it was changed.
    assert set(arrays) == EXPECTED
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    models.check_pretrained(folder / "x.gguf")


def make_gguf_split(rng, damaged):
    """A model in three files: their fields say others, or one is missing or another."""
    tensors = list(BUILD["llama_tensors"]().items())
    rng.shuffle(tensors)
    files = {}
    for number in range(3):
        fields = BUILD["llama_metadata"]() if number == 0 else {}
        split = {
            "split.no": (4, number),
            "split.count": (4, 3),
            "split.tensors.count": (5, len(tensors)),
        }
        if damaged and rng.random() < 0.2:
            split = _damaged(split, rng)
        data = BUILD["gguf_bytes"](fields | split, dict(tensors[number::3]))
        files[f"m-{number + 1:05}-of-00003.gguf"] = data
    if damaged and rng.random() < 0.2:
        one, other = rng.sample(sorted(files), 2)
        files[one] = files[other]
    if damaged and rng.random() < 0.1:
        del files[rng.choice(sorted(files))]
    return files


@names_the_file
def read_gguf_split(folder):
    paths = sorted(folder.iterdir())
    _, arrays = read_all(paths[0])
    assert set(arrays) == EXPECTED
    # Each of the files stands for all.
    assert convert.open_checkpoint(paths[-1]).tensors.keys() == EXPECTED


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
    Reader("config.json of families", make_family, read_family, ("config.json",)),
    Reader("GGUF", make_gguf, read_gguf),
    Reader("GGUF in several files", make_gguf_split, read_gguf_split),
    Reader("GGUF of families", make_gguf_family, read_gguf_family),
    Reader("tokenizer in GGUF", make_gguf_tokenizer, read_gguf_tokenizer),
]
