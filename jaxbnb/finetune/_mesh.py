"""The devices of a run of `fit`: a single device or a mesh."""

import contextlib
import dataclasses
import math
import warnings
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxbnb.core.processes import put
from jaxbnb.finetune._config import mesh_sizes
from jaxbnb.finetune._data import Batch
from jaxbnb.sharding import make_automatic, place_rest
from jaxbnb.sharding.activations import batch_axes


@dataclasses.dataclass(frozen=True)
class Place:
    """The devices of a run.

    Attributes:
        batch_sharding: division of the rows of a batch that is not on the mesh yet; for
            a single device, that device.
        mesh: mesh with automatic axes; None for a single device.
    """

    batch_sharding: Sharding
    mesh: Mesh | None = None

    def context(self) -> AbstractContextManager:
        """Returns a context that puts new arrays and compiled functions on the mesh."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    def put_variables(self, tree: Any) -> Any:
        """Puts arrays on the mesh: divided as they are, or as the axes' names say.

        A mesh with other names gets copies of those that it does not have yet.
        """
        return place_rest(tree, self.mesh)

    def put_back(self, tree: Any, before: Any) -> Any:
        """Puts arrays back where those of ``before`` are."""

        def move(x, old):
            if (x.sharding, x.committed) == (old.sharding, old.committed):
                return x
            if old.committed:
                return jax.device_put(x, old.sharding)
            return jnp.asarray(np.asarray(x))  # Not committed to a device, like old.

        return jax.tree.map(move, tree, before)

    def put_batch(self, batch: Batch, name: str) -> Batch:
        """Puts a batch on the devices, with extra rows, not counted, to divide evenly.

        Raises:
            ValueError: the batch and the model are on different devices.
        """
        if self.mesh is None:
            return jax.device_put(batch, self.batch_sharding)
        sharding = _get_automatic_sharding(batch.tokens)
        if sharding is None:
            *leading, rows, _ = batch.tokens.shape
            rows_spec: Any = self.batch_sharding
            spec = PartitionSpec(*[None for _ in leading], *rows_spec.spec)
            sharding = NamedSharding(self.mesh, spec)
            batch = _with_rows(batch, -rows % _count_parts(sharding))
        elif sharding.device_set != set(self.mesh.devices.flat):
            raise ValueError(
                f"{name} is on the mesh {sharding.mesh}, but the model is on "
                f"{self.mesh}. Put both on one: jax.device_put(batch, "
                "NamedSharding(mesh, PartitionSpec(axis)))"
            )
        # Each process sends its own devices their rows.
        return jax.tree.map(lambda x: put(x, sharding), batch)


def make_mesh(text: str | None) -> Mesh | None:
    """Returns the mesh of a run over all devices of all processes.

    Args:
        text: see `TrainConfig.mesh`.

    Raises:
        ConfigError: the sizes do not fit the number of devices.
    """
    if text is None and jax.process_count() == 1:
        return None
    axes = mesh_sizes(text or "data", jax.device_count())
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def find_place(variables: Any, tokens: Any) -> Place:
    """Finds the place of a run: the mesh of the model, first batch or context.

    The first mesh in this order is used. Rows of a batch are divided along the axes
    "data" and "fsdp". If the mesh has axes with other names than those of
    `jaxbnb.sharding`, rows are divided along every axis that does not divide a
    variable. Otherwise, all devices along that axis would compute the same.

    Args:
        variables: variables of the model, as arrays.
        tokens: tokens of the first batch.
    """
    leaves = jax.tree.leaves(variables)
    placed = [
        s for s in map(_get_automatic_sharding, [*leaves, tokens]) if s is not None
    ]
    context = jax.sharding.get_mesh()
    if not placed and context.empty:
        (device, *_) = leaves[0].sharding.device_set
        return Place(jax.sharding.SingleDeviceSharding(device))
    mesh = make_automatic(placed[0].mesh if placed else context)
    used = {name for x in leaves for name in _list_axes(_get_automatic_sharding(x))}
    free = batch_axes(mesh)
    is_known = free is not None
    if free is None:
        free = tuple(name for name in mesh.axis_names if name not in used)
    place = Place(NamedSharding(mesh, PartitionSpec(free or None)), mesh)
    if _get_automatic_sharding(tokens) is None and (free or not is_known):
        _warn_of_idle_devices(place.batch_sharding, tokens.shape[-2], mesh)
    return place


def _warn_of_idle_devices(sharding: Any, rows: int, mesh: Mesh) -> None:
    parts = _count_parts(sharding)
    if parts == 1 < mesh.size:
        what = (
            f"the model is divided along all axes of the mesh, {mesh.axis_names}, so "
            "every device gets the whole batch"
        )
    elif rows < parts:
        what = f"a batch of {rows} rows is divided among {parts} devices"
    else:
        return
    axes = "axis" if parts == 1 else repr(sharding.spec[0])
    warnings.warn(
        f"{what}. Give more rows, or place the batches yourself: "
        f"jax.device_put(batch, NamedSharding(mesh, PartitionSpec({axes})))",
        stacklevel=6,
    )


def _get_automatic_sharding(x: Any) -> NamedSharding | None:
    """Returns an array's sharding with automatic axes; None if it is not on a mesh."""
    sharding = x.sharding if isinstance(x, jax.Array) else None
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = make_automatic(sharding.mesh)
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _list_axes(sharding: NamedSharding | None) -> list[str]:
    """Lists the axes of the mesh that an array is divided along."""
    if sharding is None:
        return []
    parts = [part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    return [name for part in parts for name in part if name is not None]


def _count_parts(sharding: Any) -> int:
    """Returns the number of parts that rows are divided into."""
    return math.prod(sharding.mesh.shape[name] for name in _list_axes(sharding))


def _with_rows(batch: Batch, more: int) -> Batch:
    """Adds copies of a batch's last row that do not count."""
    if more == 0:
        return batch
    batch = jax.tree.map(
        lambda x: np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)], mode="edge"),
        batch,
    )
    mask: Any = batch.mask
    mask[..., -more:, :] = False
    return batch
