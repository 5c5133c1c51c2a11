"""Plan: what a training run needs, as data and as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxbnb.core.table import format_table
from jaxbnb.core.units import format_bytes
from jaxbnb.nnx import Remat
from jaxbnb.planning._roofline import Roofline
from jaxbnb.planning._step import Setting
from jaxbnb.planning.gpus import Gpu


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that would make a run smaller.

    Attributes:
        what: the change, in words.
        option: the option of ``jaxbnb plan`` for it.
        saved_bytes: how much lower the peak would be.
    """

    what: str
    option: str
    saved_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training run would need, on each device.

    All bytes are those of one device.

    Attributes:
        gpu: the GPU.
        setting: the run.
        devices: number of GPUs.
        mesh: axes of the mesh of GPUs, with their sizes.
        sharding: preset of `jaxbnb.sharding` that the mesh stands for; None if every
            GPU has the whole model.
        weight_bytes: size of the frozen weights, exact.
        adapter_bytes: size of the trained variables, exact.
        optimizer_bytes: size of the optimizer's state, exact. A paged one is in the
            host's memory, and not in the peak.
        peak_bytes: peak of the GPU's memory in a step.
        is_compiled: whether XLA compiled the step for this GPU, so that the peak is
            exact. Otherwise it is an estimate.
        collectives: bytes that a device gets from the others in a step, by kind of
            collective; None if the step is not compiled.
        proposed_mesh: mesh on which fewer GPUs share the weights, so that they send
            each other less, and which fits by the estimate; None if there is none.
        longest_seq: longest sequence, in steps of 64 tokens, that fits with this batch;
            0 if none does.
        largest_batch: largest batch that fits with this sequence; 0 if none does.
        is_longest_the_models: whether the model, and not the memory, limits
            ``longest_seq``.
        changes: what would lower the peak, the largest saving first.
        roofline: the least that a step takes.
    """

    gpu: Gpu
    setting: Setting
    devices: int
    mesh: Mapping[str, int]
    sharding: str | None
    weight_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    is_compiled: bool
    collectives: Mapping[str, int] | None
    proposed_mesh: Mapping[str, int] | None
    longest_seq: int
    largest_batch: int
    is_longest_the_models: bool
    changes: tuple[Change, ...]
    roofline: Roofline

    @property
    def fits(self) -> bool:
        """Whether the peak is at most the memory that the GPU has for a program."""
        return self.peak_bytes <= self.gpu.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        setting = dataclasses.asdict(self.setting)
        remat = self.setting.remat
        if isinstance(remat, Remat):
            setting["remat"] = dataclasses.asdict(remat)
        else:
            setting["remat"] = "layer" if remat else "none"
        return {
            "gpu": self.gpu.name,
            "devices": self.devices,
            "mesh": dict(self.mesh),
            "sharding": self.sharding,
            "setting": setting,
            "bytes": {
                "weights": self.weight_bytes,
                "adapters": self.adapter_bytes,
                "optimizer": self.optimizer_bytes,
                "peak": self.peak_bytes,
                "usable": self.gpu.usable_bytes,
            },
            "fits": self.fits,
            "peak_is": "compiled" if self.is_compiled else "estimated",
            "collectives": self.collectives,
            "proposed_mesh": self.proposed_mesh,
            "longest_seq": self.longest_seq,
            "largest_batch": self.largest_batch,
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "roofline": dataclasses.asdict(self.roofline),
        }

    def __str__(self) -> str:
        return format_plan(self)


def format_plan(plan: Plan) -> str:
    """Formats a plan as a table for people."""
    setting, gpu = plan.setting, plan.gpu
    trained = "all parameters" if setting.rank is None else f"rank {setting.rank}"
    how = "compiled" if plan.is_compiled else "estimated"
    is_paged = setting.optimizer.startswith("paged_")
    rows = [
        ("", "size"),
        (f"weights, {setting.quant or setting.dtype}", format_bytes(plan.weight_bytes)),
        (f"trained, {trained}", format_bytes(plan.adapter_bytes)),
        (
            f"optimizer state{' (on the host)' if is_paged else ''}",
            format_bytes(plan.optimizer_bytes),
        ),
        (f"peak of a step, {how}", format_bytes(plan.peak_bytes)),
        (f"memory of the {gpu.name}", format_bytes(gpu.usable_bytes)),
    ]
    where, each = gpu.name, ""
    if plan.devices > 1:
        where = f"{plan.devices} x {gpu.name}, mesh {format_mesh(plan.mesh)}"
        each = ", each"
    left = gpu.usable_bytes - plan.peak_bytes
    verdict = (
        f"It fits, with {format_bytes(left)} to spare{each}."
        if plan.fits
        else f"It does not fit: {format_bytes(-left)} too much{each}."
    )
    lines = [
        f"{setting.batch} x {setting.seq:,} tokens on {where}"
        f"{'; sizes of each' if each else ''}",
        "",
        format_table(rows, 1),
        "",
        verdict,
    ]
    if plan.longest_seq or plan.largest_batch:
        most = " (the most that the model takes)" if plan.is_longest_the_models else ""
        lines.append(
            f"Longest sequence with this batch: {plan.longest_seq:,} tokens{most}. "
            f"Largest batch with this sequence: {plan.largest_batch:,} rows."
        )
    if plan.devices > 1:
        lines += _describe_sending(plan)
    if plan.roofline.seconds is not None:
        lines.append(
            f"A step takes at least {plan.roofline.seconds * 1e3:.0f} ms, by "
            f"{plan.roofline.bound}."
        )
    if plan.changes:
        title = "What would save memory:" if plan.fits else "What to change:"
        table = [
            (change.what, change.option, format_bytes(change.saved_bytes))
            for change in plan.changes
        ]
        lines += ["", title, format_table(table, 1)]
        if not plan.fits and -left > plan.changes[0].saved_bytes:
            lines.append("None of these is enough alone.")
    return "\n".join(lines)


def _describe_sending(plan: Plan) -> list[str]:
    """Says what the devices send to each other, and how they would send less."""
    if plan.collectives is None:
        lines = ["What the GPUs send to each other is unknown: nothing was compiled."]
    else:
        total = format_bytes(sum(plan.collectives.values()))
        kinds = ", ".join(
            f"{kind} {format_bytes(size)}" for kind, size in plan.collectives.items()
        )
        lines = [f"Each GPU gets {total} from the others in a step: {kinds}."]
    if plan.proposed_mesh is not None:
        lines.append(
            f"By the estimate, --mesh {format_mesh(plan.proposed_mesh)} fits too, and "
            "sends fewer weights."
        )
    return lines


def format_mesh(axes: Mapping[str, int]) -> str:
    """Writes a mesh as ``--mesh`` takes it.

    Example:
        >>> format_mesh({"data": 2, "fsdp": 4})
        'data=2,fsdp=4'
    """
    return ",".join(f"{name}={size}" for name, size in axes.items())
