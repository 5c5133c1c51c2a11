"""encoders.npz: what transformers computes with toy encoders and their heads.

To make it again, install the extra `peers` and run

    python tests/goldens/make_encoders.py

Weights are not stored: `seeded_tensor` of make_encoder_decoder.py makes each from its
name and shape, here and in the tests. README.md says what is stored.
"""

import json
import runpy
import tempfile
from pathlib import Path

import numpy as np

_PATH = Path(__file__).parent / "make_encoder_decoder.py"
seeded_tensor = runpy.run_path(str(_PATH))["seeded_tensor"]

_RNG = np.random.default_rng(0)
# RoBERTa has no positions for its padding, token 1.
MASK = np.arange(12) < np.array([[12], [8]])
TOKENS = np.where(MASK, _RNG.integers(2, 41, (2, 12)), 1)
TYPES = np.broadcast_to((np.arange(12) > 5).astype(np.int64), (2, 12))
PIXELS = _RNG.standard_normal((2, 3, 12, 8)).astype(np.float32)
LABELS = np.array([2, 0])

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
TEXT = {**SIZES, "vocab_size": 41, "max_position_embeddings": 24}
ROBERTA = {**TEXT, "pad_token_id": 1, "type_vocab_size": 1}
# Neither images nor patches are square.
IMAGE = {**SIZES, "image_size": [12, 8], "patch_size": [4, 2]}
# Name of transformers' config class, its arguments, and the head.
FAMILIES = {
    "bert": ("Bert", TEXT, "SequenceClassification"),
    "bert_tokens": ("Bert", TEXT, "MaskedLM"),
    "roberta_tokens": ("Roberta", ROBERTA, "MaskedLM"),
    "xlm_roberta": ("XLMRoberta", ROBERTA, "SequenceClassification"),
    "vit": ("ViT", IMAGE, "ImageClassification"),
    "deit": ("DeiT", IMAGE, "ImageClassification"),
}


def toy(family, folder, seed=0):
    """Returns transformers' model with a seed's weights, and the shapes in its file."""
    import transformers
    from safetensors.numpy import load_file, save_file

    kind, options, head = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**options)
    model_class = getattr(transformers, f"{kind}For{head}")
    model_class(config).save_pretrained(folder)
    path = Path(folder) / "model.safetensors"
    shapes = {name: tensor.shape for name, tensor in load_file(path).items()}
    tensors = {n: seeded_tensor(family, n, shape, seed) for n, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return model_class.from_pretrained(folder).eval(), shapes


def call(family, model):
    import torch

    if "Image" in FAMILIES[family][2]:
        return model(pixel_values=torch.tensor(PIXELS)).logits
    options = {"token_type_ids": torch.tensor(TYPES)} if family[:4] == "bert" else {}
    return model(
        input_ids=torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK.astype(np.int64)),
        **options,
    ).logits


def family_goldens(family):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model, shapes = toy(family, folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    about = {"config": config, "shapes": shapes}
    logits = call(family, model)
    goldens = {
        f"{family}_json": np.frombuffer(json.dumps(about).encode(), np.uint8),
        f"{family}_logits": logits.detach().numpy(),
    }
    if logits.ndim == 2:
        with tempfile.TemporaryDirectory() as folder:
            direction, _ = toy(family, folder, seed=1)
        torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
        parameters = zip(model.parameters(), direction.parameters(), strict=True)
        slope = sum((p.grad.double() * d.double()).sum() for p, d in parameters)
        goldens[f"{family}_slope"] = np.float64(slope.item())
    return goldens


def main():
    goldens = {}
    for family in FAMILIES:
        goldens |= family_goldens(family)
    np.savez_compressed(Path(__file__).parent / "encoders.npz", **goldens)


if __name__ == "__main__":
    main()
