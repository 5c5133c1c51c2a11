"""encoder_decoder.npz: what transformers computes with toy encoder-decoders.

To make it again, install the extra `peers` and run

    python tests/goldens/make_encoder_decoder.py

Weights are not stored: `seeded_tensor` makes each from its name and shape, here and in
the tests. README.md says what is stored.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

_RNG = np.random.default_rng(0)
SOURCE = _RNG.integers(2, 41, (2, 12))
# Padding on the left in one row, on the right in the other.
MASK = np.array([[False] * 3 + [True] * 9, [True] * 8 + [False] * 4])
# The first token is the one that every target begins with.
TARGET = np.where(np.arange(9) == 0, 0, _RNG.integers(2, 41, (2, 9)))
# Log-mel features of audio, and the first tokens of its text.
FEATURES = _RNG.standard_normal((2, 6, 20)).astype(np.float32)
FIRST = np.array([[2, 5], [2, 7]])
LABELS = np.where(np.array([[9], [6]]) > np.arange(9), np.roll(TARGET, -1, 1), -100)

SIZES = {
    "vocab_size": 41,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
# Name of transformers' config class, its arguments, and whether the head is separate.
FAMILIES = {
    "t5": ("T5", {**SIZES, "feed_forward_proj": "relu"}, False),
    "flan": (
        "T5",
        {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        True,
    ),
    "whisper": (
        "Whisper",
        {
            **{"vocab_size": 41, "d_model": 32, "num_mel_bins": 6},
            **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
            **{"decoder_ffn_dim": 48, "max_source_positions": 10},
            # torch has no gradient for the embedding of padding.
            **{"max_target_positions": 24, "decoder_start_token_id": 3},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
        },
        False,
    ),
    "mt5": ("MT5", {**SIZES, "num_decoder_layers": 3}, True),
}


def seeded_tensor(family: str, name: str, shape: tuple[int, ...], seed: int = 0):
    """Returns the weight of a name. A norm's is close to the identity."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = 0.2 * rng.standard_normal(shape)
    is_norm = "norm" in name.lower() and name.endswith(".weight")
    return ((1.0 if is_norm and seed == 0 else 0.0) + noise).astype(np.float32)


def toy(family, folder, seed=0):
    """Returns transformers' model with a seed's weights, and the shapes in its file."""
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, options, has_head = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**options)
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    model_class(config).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    if has_head:
        shapes["lm_head.weight"] = shapes["shared.weight"]
    tensors = {n: seeded_tensor(family, n, shape, seed) for n, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return model_class.from_pretrained(folder).eval(), shapes


def continue_greedily(model, source, tokens, count):
    """Returns new tokens. transformers' generate would add rules of Whisper's own."""
    import torch

    length, has_ended = tokens.shape[1], torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(count):
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=tokens).logits[:, -1]
        new = torch.where(has_ended, 0, logits.argmax(-1))
        has_ended |= new == 1
        tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens[:, length:]


def family_goldens(family):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model, shapes = toy(family, folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        direction, _ = toy(family, folder, seed=1)
    source = {
        "input_ids": torch.tensor(SOURCE),
        "attention_mask": torch.tensor(MASK.astype(np.int64)),
    }
    first = np.zeros((2, 1), np.int64)
    if family == "whisper":
        source, first = {"input_features": torch.tensor(FEATURES)}, FIRST
    with torch.no_grad():
        logits = model(**source, decoder_input_ids=torch.tensor(TARGET)).logits
    loss = model(**source, labels=torch.tensor(LABELS)).loss
    loss.backward()
    parameters = zip(model.parameters(), direction.parameters(), strict=True)
    slope = sum((p.grad.double() * d.double()).sum() for p, d in parameters)
    tokens = continue_greedily(model, source, torch.tensor(first), 8)
    about = {"config": config, "shapes": shapes}
    return {
        f"{family}_json": np.frombuffer(json.dumps(about).encode(), np.uint8),
        f"{family}_logits": logits.numpy(),
        f"{family}_loss": np.float64(loss.item()),
        f"{family}_slope": np.float64(slope.item()),
        f"{family}_tokens": tokens.numpy(),
    }


def main():
    goldens = {}
    for family in FAMILIES:
        goldens |= family_goldens(family)
    np.savez_compressed(Path(__file__).parent / "encoder_decoder.npz", **goldens)


if __name__ == "__main__":
    main()
