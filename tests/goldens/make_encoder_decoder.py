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
    "mt5": ("MT5", {**SIZES, "num_decoder_layers": 3}, True),
}


def seeded_tensor(family: str, name: str, shape: tuple[int, ...], seed: int = 0):
    """Returns the weight of a name. A norm's is close to the identity."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = 0.2 * rng.standard_normal(shape)
    is_norm = "norm" in name and name.endswith(".weight")
    return ((1.0 if is_norm and seed == 0 else 0.0) + noise).astype(np.float32)


def toy(family, folder, seed=0):
    """Returns transformers' model with a seed's weights, and the shapes in its file."""
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, options, has_head = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**options)
    model_class = transformers.AutoModelForSeq2SeqLM
    model_class.from_config(config).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    if has_head:
        shapes["lm_head.weight"] = shapes["shared.weight"]
    tensors = {n: seeded_tensor(family, n, shape, seed) for n, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return model_class.from_pretrained(folder).eval(), shapes


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
    with torch.no_grad():
        logits = model(**source, decoder_input_ids=torch.tensor(TARGET)).logits
    loss = model(**source, labels=torch.tensor(LABELS)).loss
    loss.backward()
    parameters = zip(model.parameters(), direction.parameters(), strict=True)
    slope = sum((p.grad.double() * d.double()).sum() for p, d in parameters)
    # Without a cache, for transformers' has room for as many layers as the encoder has.
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": False}
    tokens = model.generate(**source, **options)[:, 1:]
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
