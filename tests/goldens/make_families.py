"""families.npz: what transformers computes with a toy model of every family.

To make it again, install the extra `peers` and run

    python tests/goldens/make_families.py

Weights are not stored: `seeded_tensor` makes each from its name and shape, here and in
the tests. README.md says what is stored.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

TOKENS = np.random.default_rng(0).integers(0, 41, (2, 10))
# The second row is padded on the left.
MASK = np.arange(10) >= np.array([[0], [3]])

SIZES = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MULTI_HEAD = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 4}
WINDOW = {"sliding_window": 4}
TOKEN_IDS = {k: None for k in SIZES if k.endswith("token_id")}
GPT2_LIKE = {
    **TOKEN_IDS,
    "vocab_size": 41,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
FALCON = {**MULTI_HEAD, "ffn_hidden_size": 48}
del FALCON["intermediate_size"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 3.0],
    "partial_rotary_factor": 0.75,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}

# Name of transformers' config class, and its arguments.
FAMILIES = {
    "llama": ("Llama", {**SIZES, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**SIZES, **WINDOW}),
    "qwen2": (
        "Qwen2",
        {**SIZES, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "smollm3": ("SmolLM3", {**SIZES, "no_rope_layer_interval": 2}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": (
        "Gemma3Text",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (
        "Phi3",
        {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8},
    ),
    "gpt2": ("GPT2", MULTI_HEAD),
    "gpt_neox": (
        "GPTNeoX",
        {
            **MULTI_HEAD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "opt": (
        "OPT",
        {k: v for k, v in MULTI_HEAD.items() if k != "intermediate_size"}
        | {"ffn_dim": 48},
    ),
    "mixtral": (
        "Mixtral",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            **TOKEN_IDS,
            "vocab_size": 41,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    # Slopes of heads that are no power of 2.
    "bloom": (
        "Bloom",
        {**TOKEN_IDS, "vocab_size": 41, "hidden_size": 24, "n_layer": 2, "n_head": 6},
    ),
    "falcon": (
        "Falcon",
        {**FALCON, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "falcon_40b": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    # 16 heads, so that rounding the slopes to bfloat16 changes them.
    "falcon_rw": (
        "Falcon",
        {
            **FALCON,
            "num_attention_heads": 16,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "gptj": ("GPTJ", {**GPT2_LIKE, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", GPT2_LIKE),
    "codegen": ("CodeGen", {**GPT2_LIKE, "rotary_dim": 4}),
    "xglm": (
        "XGLM",
        {
            **TOKEN_IDS,
            "vocab_size": 41,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}

SCALED_ROPE = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_untruncated": {**YARN, "truncate": False, "mscale": 1.5, "mscale_all_dim": 2},
}


def seeded_tensor(family: str, name: str, shape: tuple[int, ...], seed: int = 0):
    """Returns the weight of a name. A norm's is close to the identity."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = 0.2 * rng.standard_normal(shape)
    is_norm = ("norm" in name or "ln_" in name) and name.endswith(".weight")
    offset = 1.0 if is_norm and seed == 0 and "gemma" not in family else 0.0
    return (offset + noise).astype(np.float32)


def toy(family, folder, shapes=None, seed=0):
    """Returns transformers' model with a seed's weights, and the shapes in its file.

    Writes the model, changes the file and reads it again, so the names are the file's.
    """
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, options = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**options)
    model_class = transformers.AutoModelForCausalLM
    model_class.from_config(config).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    tensors = {n: seeded_tensor(family, n, shape, seed) for n, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return model_class.from_pretrained(folder).eval(), shapes


def loss(model):
    import torch

    tokens = torch.tensor(TOKENS)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def family_goldens(family):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model, shapes = toy(family, folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        direction, _ = toy(family, folder, seed=1)
    # Padding is at position 0. Nothing attends to its keys.
    positions = np.maximum(np.cumsum(MASK, axis=1) - 1, 0)
    with torch.no_grad():
        logits = model(
            torch.tensor(TOKENS),
            attention_mask=torch.tensor(MASK.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits
    value = loss(model)
    value.backward()
    parameters = zip(model.parameters(), direction.parameters(), strict=True)
    slope = sum((p.grad.double() * d.double()).sum() for p, d in parameters)
    about = {"config": config, "shapes": shapes}
    return {
        f"{family}_json": np.frombuffer(json.dumps(about).encode(), np.uint8),
        f"{family}_logits": logits.numpy(),
        f"{family}_loss": np.float64(value.item()),
        f"{family}_slope": np.float64(slope.item()),
    }


def rope_goldens():
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    goldens = {}
    cases = {name: (SIZES, rope, None) for name, rope in SCALED_ROPE.items()}
    phi3 = FAMILIES["phi3"][1]
    cases["longrope_short"] = phi3, LONGROPE, 8
    cases["longrope_long"] = phi3, LONGROPE, 9
    for name, (sizes, rope, length) in cases.items():
        kind = transformers.Phi3Config if rope is LONGROPE else transformers.LlamaConfig
        config = kind(**{**sizes, "rope_parameters": dict(rope)})
        make = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, factor = make(config, "cpu", seq_len=length)
        goldens[f"rope_{name}"] = np.append(frequencies.numpy(), np.float32(factor))
    return goldens


def main():
    goldens = rope_goldens()
    for family in FAMILIES:
        goldens |= family_goldens(family)
    np.savez_compressed(Path(__file__).parent / "families.npz", **goldens)


if __name__ == "__main__":
    main()
