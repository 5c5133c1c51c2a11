"""Draws the picture of the README from what `make demo` has measured.

make demo
.venv/bin/python docs/plot_demo.py out/qlora_smollm2/results.json docs/_static/demo.svg
"""

import json
import math
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PARTS = {"weights": "#08519c", "adapters": "#6baed6", "optimizer_state": "#d95f02"}


def main(source, target):
    """Reads results.json, and writes a picture."""
    matplotlib.rcParams["svg.hashsalt"] = "jaxbnb"  # The same bytes each time.
    results = json.loads(Path(source).read_text())
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    draw_losses(left, results)
    draw_memory(right, results["bytes"])
    figure.savefig(target, metadata={"Date": None})


def draw_losses(axes, results):
    """Draws the held-out loss, and that of the float32 model that was not trained."""
    losses = results["held_out_loss"]
    steps = list(map(int, losses))
    axes.plot(steps, losses.values(), "o-", color="#08519c")
    axes.annotate("NF4", (steps[0], losses["0"]), (8, 0), textcoords="offset points")
    before = math.log(results["perplexity"]["float32"])
    axes.axhline(before, color="#777777", linestyle="--", linewidth=1)
    note = "float32, not trained"
    axes.text(steps[-1], before, note, ha="right", va="bottom", color="#777777")
    axes.set(xlabel="step of 1,024 tokens", title="Held-out loss, nats per token")


def draw_memory(axes, sizes):
    """Draws what a step needs, by part."""
    rows = {"bfloat16,\noptax.adamw": sizes["bf16_adamw"], "QLoRA": sizes}
    for row, parts in enumerate(rows.values()):
        start = 0.0
        known = {part: parts[part] for part in PARTS}
        rest = parts["compiled_peak"] - sum(known.values())
        colors = [*PARTS.values(), "#bbbbbb"]
        for size, color in zip([*known.values(), rest], colors, strict=True):
            axes.barh(row, size / 2**20, left=start, color=color, height=0.6)
            start += size / 2**20
        axes.text(start, row, f" {start:,.0f}", va="center")
    axes.set_yticks(range(len(rows)), list(rows))
    labels = [*(part.replace("_", " ") for part in PARTS), "gradients, activations"]
    handles = [Patch(color=color) for color in colors]
    axes.legend(handles, labels, frameon=False, loc="upper right", fontsize="small")
    axes.set(title="Memory of a step, MiB", xlim=(0, 1.15 * axes.get_xlim()[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
