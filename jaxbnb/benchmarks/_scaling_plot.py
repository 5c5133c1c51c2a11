"""Plots the times of `jaxbnb bench scaling`: a panel for the step, one for products."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from jaxbnb.benchmarks._plots import COLORS, GREY, import_pyplot

_COLOR_OF: Final = {
    "jaxbnb": COLORS[0],
    "jaxbnb, float32": COLORS[4],
    "bitsandbytes": COLORS[1],
    "optax": COLORS[2],
    "dense": COLORS[2],
    "copy": GREY,
}
_LABELS: Final = {
    "optax": "optax.adamw, 32 bits",
    "dense": "XLA, float32 matrix",
    "copy": "copying as many bytes",
}
_FEWER_THREADS: Final = (0, (2, 1.5))


def plot_scaling(
    steps: Sequence[dict[str, Any]], products: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draws the times to a file.

    Args:
        steps: measured times of the step: each with ``threads``, a ``count`` and
            ``seconds`` by name.
        products: measured times of the product.
        path: path of the file; its suffix selects PNG, SVG or PDF.
    """
    plt = import_pyplot()
    page, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    _draw(left, steps, lambda seconds, count: 1e9 * seconds / count)
    left.set(xlabel="parameters", ylabel="ns a parameter", title="A step of AdamW")
    _draw(right, products, lambda seconds, count: 1e3 * seconds)
    right.set(xlabel="rows of the input", ylabel="ms", title="A linear layer in NF4")
    page.savefig(path, dpi=120)
    plt.close(page)


def _draw(axes, runs: Sequence[dict[str, Any]], value_of) -> None:
    most = max(run["threads"] for run in runs)
    for threads in sorted({run["threads"] for run in runs}, reverse=True):
        chosen = [run for run in runs if run["threads"] == threads]
        for name in chosen[0]["seconds"]:
            # Not every function runs at the largest sizes.
            times = [(run["count"], run["seconds"].get(name)) for run in chosen]
            times = [(count, seconds) for count, seconds in times if seconds]
            axes.plot(
                [count for count, _ in times],
                [value_of(seconds, count) for count, seconds in times],
                color=_COLOR_OF[name],
                linestyle="-" if threads == most else _FEWER_THREADS,
                marker="o" if threads == most else None,
                markersize=3,
                linewidth=1.4,
                label=_LABELS.get(name, name) if threads == most else None,
            )
    if most > 1:
        axes.plot([], [], color="black", label=f"{most} threads")
        axes.plot([], [], color="black", linestyle=_FEWER_THREADS, label="1 thread")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
