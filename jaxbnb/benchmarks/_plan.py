"""Plans beside public claims, and estimates beside compiled peaks."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbnb.benchmarks._data import SMOLLM2
from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._plots import COLORS, GREY, import_pyplot
from jaxbnb.models import DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning import plan
from jaxbnb.planning.gpus import has_compiler


def _llama(hidden: int, features: int, layers: int, heads: int) -> DecoderConfig:
    """The Llama of 2023, with room for long texts."""
    return DecoderConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=features,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=1 << 16,
    )


LLAMA_7B = _llama(4096, 11_008, 32, 32)
LLAMA_13B = _llama(5120, 13_824, 40, 40)
LLAMA_33B = _llama(6656, 17_920, 60, 52)
LLAMA_65B = _llama(8192, 22_016, 80, 64)
LLAMA_3_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1 << 17,
)
LLAMA_3_70B = dataclasses.replace(
    LLAMA_3_8B,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
GEMMA_2_2B = DecoderConfig.from_huggingface(
    {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
)
SMALL = dataclasses.replace(SMOLLM2, max_position_embeddings=1 << 17)
# Hugging Face's table of May 2023, of one T4: what did not run out of memory there.
CLAIMS: tuple[tuple[str, DecoderConfig, str, bool, bool, int, bool], ...] = (
    ("7B", LLAMA_7B, "llm_int8", True, False, 512, True),
    ("7B", LLAMA_7B, "llm_int8", True, False, 1024, False),
    ("7B", LLAMA_7B, "nf4", False, False, 512, True),
    ("7B", LLAMA_7B, "fp4", False, False, 512, True),
    ("7B", LLAMA_7B, "nf4", False, False, 1024, False),
    ("7B", LLAMA_7B, "fp4", False, False, 1024, False),
    ("7B", LLAMA_7B, "nf4", True, False, 1024, True),
    ("13B", LLAMA_13B, "llm_int8", True, False, 512, False),
    ("13B", LLAMA_13B, "fp4", False, False, 512, False),
    ("13B", LLAMA_13B, "nf4", True, False, 512, True),
    ("13B", LLAMA_13B, "nf4", True, False, 1024, False),
    ("13B", LLAMA_13B, "nf4", True, True, 1024, True),
)
_ADAPTERS: dict[str, Any] = {"optimizer": "adamw8bit", "double_quant": True}
_HALF = {"dtype": "float16"}
_FULL: dict[str, Any] = {"quant": None, "rank": None, "optimizer": "adamw8bit"}
# Compiled beside their estimates.
CASES: tuple[tuple[str, DecoderConfig, str, dict[str, Any]], ...] = (
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "seq": 512}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "batch": 4}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "rank": 64}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "quant": "llm_int8"}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {"quant": None, "optimizer": "adamw8bit"}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "seq": 512, "remat": False}),
    (
        *("Llama 3 8B", LLAMA_3_8B, "h100"),
        {**_ADAPTERS, "seq": 8192, "remat": Remat(every=4)},
    ),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "remat": Remat(products=True)}),
    (
        *("Llama 3 8B", LLAMA_3_8B, "rtx4090"),
        {**_ADAPTERS, "seq": 8192, "remat": Remat(products=True)},
    ),
    ("Llama 3 8B", LLAMA_3_8B, "rtx4090", {**_ADAPTERS, "seq": 8192}),
    ("Llama 3 8B", LLAMA_3_8B, "a100", {**_ADAPTERS, "seq": 4096, "batch": 2}),
    ("Llama 3 8B", LLAMA_3_8B, "h200", {**_ADAPTERS, "seq": 32_768}),
    ("Llama 3 8B", LLAMA_3_8B, "b200", {**_ADAPTERS}),
    ("Llama 7B", LLAMA_7B, "t4", {**_ADAPTERS, **_HALF, "seq": 512}),
    (
        *("Llama 7B", LLAMA_7B, "t4"),
        {**_HALF, "double_quant": True, "seq": 1024, "optimizer": "paged_adamw8bit"},
    ),
    ("Llama 7B", LLAMA_7B, "l4", {**_ADAPTERS, "seq": 4096}),
    ("Llama 7B", LLAMA_7B, "h100", {**_ADAPTERS, "seq": 1024, "remat": False}),
    ("Llama 13B", LLAMA_13B, "rtx3090", {**_ADAPTERS}),
    ("Llama 13B", LLAMA_13B, "t4", {**_ADAPTERS, **_HALF, "seq": 512}),
    ("Gemma 2 2B", GEMMA_2_2B, "rtx4090", {**_ADAPTERS}),
    ("Gemma 2 2B", GEMMA_2_2B, "h100", {**_ADAPTERS, "seq": 8192}),
    ("SmolLM2 135M", SMALL, "rtx4090", {**_ADAPTERS}),
    ("SmolLM2 135M", SMALL, "t4", {**_ADAPTERS, **_HALF, "batch": 4}),
    (
        *("SmolLM2 135M", SMALL, "t4"),
        {**_ADAPTERS, **_HALF, "batch": 4, "remat": Remat(products=True)},
    ),
    ("SmolLM2 135M", SMALL, "h100", {**_FULL, "batch": 8}),
    ("SmolLM2 135M", SMALL, "h100", {**_FULL, "optimizer": "adamw", "batch": 8}),
    ("Llama 3 8B", LLAMA_3_8B, "h200", {**_FULL}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "devices": 8}),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_ADAPTERS, "devices": 8, "mesh": "data"}),
    (
        *("Llama 3 8B", LLAMA_3_8B, "h100"),
        {**_ADAPTERS, "devices": 8, "mesh": "fsdp=4,tensor=2"},
    ),
    (
        *("Llama 3 8B", LLAMA_3_8B, "h100"),
        {**_ADAPTERS, "devices": 8, "mesh": "tensor"},
    ),
    ("Llama 3 8B", LLAMA_3_8B, "h100", {**_FULL, "devices": 8}),
    ("Llama 3 70B", LLAMA_3_70B, "h200", {**_ADAPTERS, "devices": 8}),
    (
        *("Llama 3 70B", LLAMA_3_70B, "rtx4090"),
        {"double_quant": True, "seq": 1024, "devices": 2},
    ),
    ("Llama 3 70B", LLAMA_3_70B, "h200", {**_FULL, "devices": 8}),
)
# Largest error of an estimate, as a share of the compiled peak.
LIMIT = 0.1


def bench_plan(plot: Path | None = None) -> Iterator[Figure]:
    """Plans the runs of public claims, then compiles the cases of the estimate.

    Args:
        plot: path of a plot of the estimated and compiled peaks; None for none.
    """
    if plot is not None:
        import_pyplot()  # Raises an error now rather than after the compilations.
    for name, config, quant, remat, double_quant, seq, did_fit in CLAIMS:
        made = plan(
            config,
            "t4",
            quant=quant,
            double_quant=double_quant,
            optimizer="adamw",
            seq=seq,
            remat=remat,
            compile=False,
        )
        how = ", checkpointing" if remat else ""
        nested = ", double quantisation" if double_quant else ""
        claim = "fitted" if did_fit else "ran out of memory"
        yield Figure(
            f"T4: Llama {name}, {quant}{nested}{how}, 1 x {seq}",
            made.peak_bytes / 2**30,
            "GiB",
            None,
            f"{'fits' if made.fits else 'does not fit'} in "
            f"{made.gpu.usable_bytes / 2**30:.1f}; in May 2023 it {claim}",
        )
    for name, config, gpu in (
        ("33B", LLAMA_33B, "rtx4090"),
        ("65B", LLAMA_65B, "a100"),
    ):
        made = plan(config, gpu, double_quant=True, seq=512, compile=False)
        yield Figure(
            f"Llama {name}, nf4, double quantisation, checkpointing, 1 x 512",
            made.peak_bytes / 2**30,
            "GiB",
            None,
            f"weights {made.weight_bytes / 2**30:.2f} GiB",
        )
    if not has_compiler():
        raise NotImplementedError(
            "estimates are compared with compiled peaks by JAX's CUDA plugin: put "
            "jax-cuda13-plugin and jax-cuda13-pjrt in a folder and name it in "
            "PYTHONPATH"
        )
    peaks = []
    for case in CASES:
        _, config, gpu, options = case
        estimated = plan(config, gpu, compile=False, **options)
        compiled = plan(config, gpu, compile=True, **options)
        peaks.append((compiled.peak_bytes, estimated.peak_bytes))
        yield Figure(
            title(case),
            abs(estimated.peak_bytes / compiled.peak_bytes - 1),
            "of the compiled peak off",
            LIMIT,
            f"estimated {estimated.peak_bytes / 2**30:.2f}, compiled "
            f"{compiled.peak_bytes / 2**30:.2f} GiB",
            {"estimated": estimated.peak_bytes, "compiled": compiled.peak_bytes},
        )
    if plot is not None:
        _plot(peaks, plot)


def _plot(peaks: Sequence[tuple[int, int]], path: Path) -> None:
    """Draws estimated peaks over compiled ones, to a PNG or SVG file."""
    plt = import_pyplot()
    compiled, estimated = np.array(peaks).T / 2**30
    ends = np.array([0.7 * compiled.min(), 1.4 * compiled.max()])
    page, axes = plt.subplots(figsize=(5.2, 5), layout="constrained")
    axes.fill_between(
        *(ends, (1 - LIMIT) * ends, (1 + LIMIT) * ends),
        color=GREY,
        alpha=0.4,
        linewidth=0,
        label=f"within {LIMIT:.0%}",
    )
    axes.plot(ends, ends, color=GREY, linewidth=1)
    axes.scatter(compiled, estimated, s=22, color=COLORS[0], zorder=2)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="compiled peak, GiB",
        ylabel="estimated peak, GiB",
        aspect="equal",
    )
    ticks = [x for x in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if ends[0] < x < ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_minor_locator(plt.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    page.savefig(path, dpi=120)
    plt.close(page)


def title(case: tuple[str, DecoderConfig, str, dict[str, Any]]) -> str:
    """Names a case, e.g. "Llama 7B on t4, seq=512"."""
    name, _, gpu, options = case
    what = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name} on {gpu}, {what}"
