"""What would lower the peak of a run, by the estimate."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh

from jaxbnb.models import DecoderConfig
from jaxbnb.models.load import STORED
from jaxbnb.nnx import Remat
from jaxbnb.planning._estimate import count_row_parts, estimate_peak
from jaxbnb.planning._result import Change
from jaxbnb.planning._step import Setting, Shapes, make_shapes
from jaxbnb.sharding.activations import BATCH_AXES


class Measure:
    """Estimates of peaks, for settings of one model; shapes are made once each."""

    def __init__(self, source: Any, config: DecoderConfig | None):
        self._source, self._config = source, config
        self._shapes: dict[Any, Shapes] = {}
        self._sizes: dict[Any, dict[str, int]] = {}

    def shapes(self, setting: Setting) -> Shapes:
        """Returns the arrays of a step."""
        key = _key(setting)
        if key not in self._shapes:
            self._shapes[key] = make_shapes(self._source, setting)
        return self._shapes[key]

    def sizes(self, setting: Setting, mesh: AbstractMesh) -> dict[str, int]:
        """Returns the bytes of each part on a device.

        Raises:
            ValueError: the mesh does not divide the arrays.
        """
        key = _key(setting), mesh
        if key not in self._sizes:
            self._sizes[key] = self.shapes(setting).bytes_on(mesh)
        return self._sizes[key]

    def estimate(self, setting: Setting, mesh: AbstractMesh) -> int:
        """Returns the peak of a device.

        Raises:
            ValueError: the mesh does not divide the arrays.
        """
        sizes = self.sizes(setting, mesh)
        return estimate_peak(self._config, sizes, setting, mesh.shape)


def _key(setting: Setting) -> Any:
    """Returns what the shapes depend on."""
    return (
        *(setting.quant, setting.double_quant, setting.optimizer),
        *(setting.rank, setting.dtype),
    )


def find_largest(make: Callable[[int], int], limit: float, most: int) -> int:
    """Returns the largest number with a peak that fits; 0 if that of 1 does not.

    Args:
        make: returns the peak for a number.
        limit: the largest peak.
        most: the largest number.
    """
    low, high = 0, 1
    while high <= most and make(high) <= limit:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if make(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def find_changes(
    setting: Setting,
    mesh: AbstractMesh,
    measure: Measure,
    correction: float,
    peak: int,
) -> tuple[Change, ...]:
    """Lists what would lower the peak by at least one percent.

    Args:
        setting: the run.
        mesh: its mesh.
        measure: estimates of its model.
        correction: what estimates are multiplied by.
        peak: peak of the run.
    """
    found: list[Change] = []
    rows = count_row_parts(mesh.shape)

    def add(what: str, option: str, mesh: AbstractMesh = mesh, **changes: Any) -> None:
        changed = dataclasses.replace(setting, **changes)
        # Another format may have blocks that the mesh does not divide.
        with contextlib.suppress(ValueError):
            estimate = round(measure.estimate(changed, mesh) * correction)
            found.append(Change(what, option, peak - estimate))

    if setting.quant is None and setting.rank is not None:
        add("quantise the weights to NF4", "--quant nf4", quant="nf4")
    if setting.rank is None and setting.quant != STORED:
        add("train adapters over NF4", "--quant nf4 --rank 16", rank=16, quant="nf4")
    is_fixed = setting.quant in (None, "llm_int8", STORED)
    if not is_fixed and not setting.double_quant:
        add("quantise the absmax too", "--double-quant", double_quant=True)
    if not setting.optimizer.startswith("paged_"):
        add(
            "keep the optimizer's state on the host",
            "--optimizer paged_adamw8bit",
            optimizer="paged_adamw8bit",
        )
    if setting.remat is False:
        add("recompute layers", "--remat layer", remat=True)
    how = Remat.of(setting.remat)
    if how is not None and how.products:
        add("compute products again", "--remat layer", remat=True)
    if setting.remat is True:
        add("keep the input of every 4th layer", "--remat 4", remat=Remat(every=4))
        add(
            "keep layers' inputs on the host",
            "--remat offload",
            remat=Remat(offload=True),
        )
    if setting.batch > rows:
        each = " on each GPU" if rows > 1 else ""
        what = f"one row{each}, and accumulate gradients"
        add(what, f"--batch {rows}", batch=rows)
    if set(mesh.axis_names) <= set(BATCH_AXES) and mesh.size > 1:
        if mesh.shape.get("data", 1) > 1:
            shared = AbstractMesh((mesh.size,), ("fsdp",))
            option = f"--mesh fsdp={mesh.size}"
            add("divide the weights among all GPUs", option, shared)
        else:
            more = AbstractMesh((2 * mesh.size,), ("fsdp",))
            option = f"--devices {2 * mesh.size} --batch {2 * setting.batch}"
            add("twice the GPUs", option, more, batch=2 * setting.batch)
    half = setting.seq // 2
    if half >= 64:
        add("half the sequence", f"--seq {half}", seq=half)
    if setting.rank is not None and setting.rank > 8:
        add(
            "adapters of half the rank",
            f"--rank {setting.rank // 2}",
            rank=setting.rank // 2,
        )
    worthwhile = [change for change in found if change.saved_bytes >= peak / 100]
    return tuple(sorted(worthwhile, key=lambda change: -change.saved_bytes))
