"""Where a low-bit state has what the same optimizer's state in 32 bits has."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbnb.optim._check_state import StateMismatchError, check_state
from jaxbnb.optim._paged import Paged
from jaxbnb.optim._transformation import definition_of, parts_of
from jaxbnb.optim.rules import like_boxed
from jaxbnb.optim.state_format import StateFormat


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the low-bit state has an array of the 32-bit state.

    Attributes:
        position: position of the array, or of its codes, among the leaves.
        absmax: position of its absmax; None for an array that is not quantised.
        format: format of its codes; None for an array that is not quantised.
        dtype: dtype to cast an array to that is not quantised; None to keep its own.
        is_copy: whether another array of the 32-bit state has the same position, and
            is the one that is written.
        count: position of the count of the elementwise rule that it belongs to.
    """

    position: int
    absmax: int | None = None
    format: StateFormat | None = None
    dtype: Any = None
    is_copy: bool = False
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """How a low-bit state corresponds to the same optimizer's in 32 bits.

    Attributes:
        low_bit: shapes of the low-bit state, as ``jax.ShapeDtypeStruct``.
        in_32_bits: shapes of Optax's state, with moments in float32.
        places: place of each leaf of ``in_32_bits``.
        page_in: function that brings a paged state to the device, as ``low_bit``.
        page_out: its inverse.
    """

    low_bit: Any
    in_32_bits: Any
    places: list[Place]
    page_in: Callable[[Any], Any]
    page_out: Callable[[Any], Any]

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the leaves of ``in_32_bits``."""
        return [x.shape for x in jax.tree.leaves(self.in_32_bits)]

    @functools.cached_property
    def counts(self) -> dict[int, list[int]]:
        """Positions of the counts that ``in_32_bits`` does not have.

        Each comes with the positions in ``in_32_bits`` of the moments that it counts.
        """
        known = {place.position for place in self.places}
        counts: dict[int, list[int]] = {}
        for k, place in enumerate(self.places):
            if place.count is not None and place.count not in known:
                counts.setdefault(place.count, []).append(k)
        return counts

    def flatten(self, state: optax.OptState) -> list[Any]:
        """The leaves of a low-bit state, on the device.

        Raises:
            StateMismatchError: it is not a state of this transformation.
        """
        check_state(state, self.low_bit)
        return jax.tree.leaves(self.page_in(state))

    def unflatten(self, leaves: list[Any]) -> optax.OptState:
        """The inverse of `flatten`."""
        structure = jax.tree.structure(self.low_bit)
        return self.page_out(structure.unflatten(leaves))

    def read(self, leaves: list[Any], k: int) -> Any:
        """A leaf of the 32-bit state, from those of the low-bit one."""
        place = self.places[k]
        if place.format is None:
            return leaves[place.position]
        assert place.absmax is not None
        codes, absmax = leaves[place.position], leaves[place.absmax]
        want = jax.tree.leaves(self.low_bit)[place.position].dtype
        if codes.dtype != want:
            raise StateMismatchError(
                f"the state has codes of dtype {codes.dtype}, and tx of {want}"
            )
        return place.format.decode(codes, absmax, self.shapes[k])

    def write(self, leaves: list[Any], k: int, value: Any) -> None:
        """Stores a leaf of the 32-bit state in those of the low-bit one."""
        place = self.places[k]
        if place.is_copy:
            return
        if place.format is None:
            if place.dtype is not None:
                value = jnp.asarray(value).astype(place.dtype)
            leaves[place.position] = value
            return
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise StateMismatchError(
                f"the state has a moment of dtype {value.dtype}, which is not floating"
            )
        assert place.absmax is not None
        codes, absmax = place.format.encode_exactly(value.astype(jnp.float32))
        leaves[place.position], leaves[place.absmax] = codes, absmax


def state_layout(
    tx: optax.GradientTransformation, params: optax.Params, like: Any
) -> StateLayout:
    """The layout of the state of any transformation.

    Args:
        tx: the transformation.
        params: its parameters, in boxes if any of them declares its ``state_bits``.
        like: a state, or its parameters. Where it has no boxes, the layout has none.

    Raises:
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.
    """
    definition = definition_of(tx)
    if isinstance(definition, Paged):
        inner = state_layout(definition.tx, params, like)
        return dataclasses.replace(
            inner,
            page_in=lambda state: definition.page_in(state, params),
            page_out=lambda state: definition.page_out(state, params),
        )
    parts, structure = jax.tree.flatten(parts_of(tx, params))
    wide, places = [], []
    start = 0
    for part in parts:
        leaves, inside = jax.tree.flatten(part.shapes)
        positions = inside.unflatten(range(start, start + len(leaves)))
        start += len(leaves)
        shapes, more = part.shapes, [Place(k) for k in jax.tree.leaves(positions)]
        if part.definition is not None:
            shapes, more = part.definition.describe_state(part, positions)
        wide.append(shapes)
        places += more
    low_bit = structure.unflatten([part.shapes for part in parts])
    in_32_bits = structure.unflatten(wide)
    _refuse_low_bit(in_32_bits)
    return StateLayout(
        like_boxed(low_bit, like),
        like_boxed(in_32_bits, like),
        places,
        page_in=lambda state: state,
        page_out=lambda state: state,
    )


def float32_shape(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of ``x`` with dtype float32."""
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _refuse_low_bit(state: Any) -> None:
    """Raises if a low-bit state is left in it that no definition has noted."""

    def is_low_bit(node):
        return any(x.endswith("absmax") for x in getattr(node, "_fields", ()))

    for node in jax.tree.leaves(state, is_leaf=is_low_bit):
        if is_low_bit(node):
            raise NotImplementedError(
                f"a wrapper around what made the {type(node).__name__} rebuilds its "
                "state in init, so jaxbnb cannot tell which transformation it belongs "
                "to. The state of paged() is known where it is outermost; "
                "quantize_state is for optimizers with 32-bit state"
            )
