"""AdaptedModule: a frozen module with named adapters that can be switched."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


class AdapterIndex(nnx.Variable[jax.Array]):
    """The adapter that each row of a batch uses; see `adapter_rows`."""


class AdaptedModule(nnx.Module):
    """A frozen module with named adapters; the active ones apply.

    Attributes:
        base: the frozen module.
        adapters: ``nnx.Dict`` of what is trained, by the adapter's name.
        active: names of the adapters that apply, in this module or others; see
            `set_adapter`.
        adapter_index: the active adapter that each row uses, see `adapter_rows`; None
            if every row uses all of them.
    """

    def __init__(self, base: Any, active: tuple[str, ...]):
        self.base = base
        self.adapters: nnx.Dict[Any] = nnx.Dict()
        self.active = active
        self.adapter_index: AdapterIndex | None = nnx.data(None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that this module has a part of."""
        return tuple(self.adapters)

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that stack layers in front of every variable."""
        raise NotImplementedError

    def check_active(self, path: str, names: tuple[str, ...]) -> None:
        """Raises ValueError if the adapters cannot all be active at once."""

    def _chosen(self) -> list[str]:
        return [name for name in self.active if name in self.names]

    def _keep_rows(self, name: str, new: Array, old: Array) -> Array:
        """Returns ``new`` in the rows that use an adapter, and ``old`` in others."""
        if self.adapter_index is None:
            return new
        index = self.adapter_index[...]
        if new.shape[:1] != index.shape:
            raise ValueError(
                f"adapter_index has {index.shape[0]} rows; a module returned an array "
                f"of shape {new.shape}. Its first axis must be the rows, of the same "
                "number"
            )
        is_used = index == self.active.index(name)
        return jnp.where(is_used.reshape(-1, *[1] * (new.ndim - 1)), new, old)
