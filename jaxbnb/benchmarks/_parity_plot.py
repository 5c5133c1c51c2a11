"""Plots the curves of `jaxbnb bench parity`, one panel for each family."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbnb.benchmarks._figure import Figure
from jaxbnb.benchmarks._plots import COLORS, GREY, import_pyplot

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_STYLES = tuple(
    {"color": color, "linestyle": dashes}
    for color, dashes in zip(COLORS, _DASHES, strict=False)
)
_TWIN, _BAND = GREY, "#dedede"
_COLUMNS = 3
_TITLE = (
    "{title}, means of {seeds} seeds.\n"
    "Bands: standard deviation of the 32-bit twin over the seeds. "
    "Bars: standard error."
)


def plot_parity(figures: Sequence[Figure], path: Path) -> None:
    """Draws the curves of figures to a file.

    Args:
        figures: figures from `bench_parity`.
        path: path of the file; its suffix selects PNG, SVG or PDF.
    """
    plt = import_pyplot()
    families: dict[str, list[dict[str, Any]]] = {}
    for figure in figures:
        families.setdefault(figure.data["twin"], []).append(figure.data)
    columns = min(_COLUMNS, len(families))
    rows = math.ceil(len(families) / columns)
    page = plt.figure(figsize=(2.7 * columns + 0.6, 3.3 * rows + 0.5))
    page.set_layout_engine("constrained", h_pad=0.06, w_pad=0.06)
    data = figures[0].data
    title = _TITLE.format(title=data["title"], seeds=data["setting"]["seeds"])
    page.suptitle(title, fontsize=10)
    grid = page.add_gridspec(2 * rows, columns, height_ratios=(2, 1) * rows)
    top = bottom = None
    for index, (twin, runs) in enumerate(families.items()):
        row, column = divmod(index, columns)
        top = page.add_subplot(grid[2 * row, column], sharex=top, sharey=top)
        bottom = page.add_subplot(grid[2 * row + 1, column], sharex=top, sharey=bottom)
        _draw_losses(top, twin, runs)
        _draw_differences(bottom, runs)
        if column == 0:
            top.set_ylabel(f"training loss,\nnats a {data['unit']}")
            bottom.set_ylabel("held-out loss,\nminus 32 bits")
        else:
            top.tick_params(labelleft=False)
            bottom.tick_params(labelleft=False)
        if index + columns >= len(families):
            bottom.set_xlabel("step")
    everything = [data for runs in families.values() for data in runs]
    _set_limits(top, bottom, everything)
    page.savefig(path, dpi=120)
    plt.close(page)


def _draw_losses(axes, twin: str, runs: list[dict[str, Any]]) -> None:
    steps = runs[0]["setting"]["steps"]
    loss = np.array(runs[0]["twin_loss"]["train"])
    x = (np.arange(loss.shape[1]) + 0.5) * steps / loss.shape[1]
    mean, std = loss.mean(axis=0), loss.std(axis=0, ddof=1)
    axes.fill_between(x, mean - std, mean + std, color=_BAND, linewidth=0)
    axes.plot(x, mean, color=_TWIN, linewidth=4, label=twin)
    for run, style in zip(runs, _STYLES, strict=False):
        mean = np.mean(run["optimizer_loss"]["train"], axis=0)
        axes.plot(x, mean, linewidth=1.4, label=run["optimizer"], **style)
    axes.tick_params(labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _draw_differences(axes, runs: list[dict[str, Any]]) -> None:
    """Draws differences of held-out losses over the twin's spread between seeds."""
    x = runs[0]["held_out_after"]
    std = np.std(runs[0]["twin_loss"]["held_out"], axis=0, ddof=1)
    axes.fill_between(x, -std, std, color=_BAND, linewidth=0)
    axes.axhline(0, color=_TWIN, linewidth=1)
    for run, style in zip(runs, _STYLES, strict=False):
        mean, error = _compute_difference(run)
        axes.errorbar(x, mean, error, linewidth=1.4, elinewidth=1, **style)
    axes.spines[["top", "right"]].set_visible(False)


def _compute_difference(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean difference from the twin, and its standard error over seeds."""
    losses = run["optimizer_loss"]["held_out"], run["twin_loss"]["held_out"]
    difference = np.subtract(*losses)
    error = difference.std(axis=0, ddof=1) / math.sqrt(len(difference))
    return difference.mean(axis=0), error


def _set_limits(top, bottom, runs: list[dict[str, Any]]) -> None:
    """Cuts off the first steps, above 4 nats a byte, which would dwarf the rest."""
    lowest = min(np.min(run["twin_loss"]["train"]) for run in runs)
    # Curves that start lower get room for the legend above them.
    top.set_ylim(0.95 * lowest, max(4.0, 1.35 * lowest))
    # Skips the first two evaluations, where seeds still differ by their weights.
    highest = 0.0
    for run in runs:
        std = np.std(run["twin_loss"]["held_out"], axis=0, ddof=1)
        mean, error = _compute_difference(run)
        highest = np.nanmax([highest, *std[2:], *(np.abs(mean) + error)[2:]])
    bottom.set_ylim(-1.1 * highest, 1.1 * highest)
    bottom.set_xlim(0, runs[0]["setting"]["steps"])
