"""A plan as a stacked bar beside the memory of its GPU."""

import os
from pathlib import Path

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.core.units import format_bytes
from jaxbnb.planning._result import Plan

_COLOURS = ("#08519c", "#3182bd", "#9ecae1", "#fdae6b")


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Plots what a GPU's memory would hold, to a PNG or SVG file.

    Args:
        plan: the plan.
        path: file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import_extra("matplotlib", needed_by="the plot of a plan", extra="plots")
    from matplotlib.figure import Figure

    is_paged = plan.setting.optimizer.startswith("paged_")
    state = 0 if is_paged else plan.optimizer_bytes
    held = plan.weight_bytes + plan.adapter_bytes + state
    parts = {
        "weights": plan.weight_bytes,
        "trained": plan.adapter_bytes,
        "optimizer": state,
        "activations, gradients and the rest": max(0, plan.peak_bytes - held),
    }
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for (name, size), colour in zip(parts.items(), _COLOURS, strict=True):
        if size:
            label = f"{name}: {format_bytes(size)}"
            axes.barh(0, size / 2**30, left=start, color=colour, label=label)
            start += size / 2**30
    usable = plan.gpu.usable_bytes / 2**30
    axes.axvline(usable, color="#d95f02", linestyle="--")
    axes.annotate(
        f"{plan.gpu.name}: {usable:.1f} GiB for a program",
        (usable, 0.42),
        xytext=(-4, 0),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="bottom",
        color="#d95f02",
    )
    how = "compiled" if plan.is_compiled else "estimated"
    axes.set(
        yticks=[],
        ylim=(-0.5, 0.75),
        xlim=(0, 1.03 * max(usable, start)),
        xlabel="GiB",
        title=f"Peak of a step of {plan.setting.batch} x {plan.setting.seq:,} tokens"
        f"{_describe_devices(plan)}, {how}",
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    path = Path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")


def _describe_devices(plan: Plan) -> str:
    return "" if plan.devices == 1 else f" on one of {plan.devices} GPUs"
