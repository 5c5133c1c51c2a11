"""decode_state and encode_state: low-bit state to Optax's own in 32 bits, and back."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbnb.optim._formats import StateFormat
from jaxbnb.optim._low_bit import LowBit
from jaxbnb.optim._owners import Part, parts_of
from jaxbnb.optim._quantize_state import QuantizedState
from jaxbnb.optim.paging import Paged
from jaxbnb.optim.rules import unboxed
from jaxbnb.optim.state import Policy, holds_codes


class StateMismatchError(ValueError):
    """A state that is not of this transformation, or of other parameters."""


def decode_state(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """The state of a low-bit optimizer as the same optimizer of Optax has it.

    The moments become float32 arrays, and their types Optax's own: the state of
    `adamw8bit` becomes one for ``optax.adamw``, that of ``quantize_state(tx)`` one for
    ``tx``, a paged one comes to the device, and all other state stays as it is. It is
    always a state for the same optimizer with ``state_bits=32``. (Only
    ``optax.rmsprop`` is another chain than that of `rmsprop8bit`.) The low-bit state
    may be anywhere in a chain, a mask, a partition, ``optax.MultiSteps`` and so on.

    The values are those that a step decodes, so nothing is lost but where Optax's state
    has no ``count``: that of `trace8bit`, of `scale_by_rss8bit`, and without
    ``bias_correction`` of `scale_by_rms8bit` and `scale_by_stddev8bit`.

    Args:
        tx: the low-bit transformation.
        state: its state.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.

    Returns:
        The state of the same optimizer in 32 bits.

    Raises:
        StateMismatchError: the state is not of ``tx``, or of other parameters.
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> from jaxbnb.optim import decode_state
        >>> tx = jaxbnb.adamw8bit(1e-3)
        >>> params = {"kernel": jnp.ones((64, 1024))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> state = decode_state(tx, state, params)
        >>> type(state[0]).__name__, state[0].mu["kernel"].dtype.name
        ('ScaleByAdamState', 'float32')
        >>> updates, state = optax.adamw(1e-3).update(params, state, params)
        >>> state[0].count.item()
        2

        ``nnx.Optimizer`` keeps its state in variables, which Flax takes off again:

        >>> from flax import nnx
        >>> model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> params = nnx.state(model, nnx.Param)
        >>> state = decode_state(tx, nnx.as_pure(optimizer.opt_state), params)
        >>> state[0].mu["kernel"].dtype.name
        'float32'
    """
    if isinstance(owner := _owner(tx), Paged):
        check_state(state, jax.eval_shape(owner.tx.init, params))
        return decode_state(owner.tx, owner.page_in(state, params), params)
    layout = state_layout(tx, params, state)
    check_state(state, layout.low_bit)
    leaves = jax.tree.leaves(state)
    values = [layout.read(leaves, k) for k in range(len(layout.places))]
    return jax.tree.unflatten(jax.tree.structure(layout.in_32_bits), values)


def encode_state(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    *,
    count: jax.typing.ArrayLike | None = None,
) -> optax.OptState:
    """The state of a low-bit optimizer from that of the same optimizer of Optax.

    The inverse of `decode_state`: what that returned gives the codes and absmax that it
    was made of, to the bit, and so any low-bit state moves to another format, block
    size or ``min_quantized_size`` with one rounding. Other values are rounded as a step
    rounds them, and no positive second moment becomes zero.

    Two absmax that are neighbours in float32 may decode to the same values. Where they
    do, in fp8 or where hardly an element of a block is not zero, either may come back.
    Values below float32's normal range (1.2e-38) are zero to XLA on a CPU, and then do
    not come back as they were: elements that small are in blocks whose absmax is below
    2.2e-32 (Adam's first moment) or 3.7e-32 (its second).

    Args:
        tx: the low-bit transformation.
        state: of the same optimizer in 32 bits, or what `decode_state` returned for
            another low-bit form of it.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.
        count: steps taken, for the counts that Optax's state does not have; see
            `decode_state`. By default 1, or 0 where all moments are zero: all that
            matters is the ``dampening`` of `trace8bit`, which spares the first step.

    Returns:
        The state of ``tx``. Of AdEMAMix, ``count_m2`` is taken to be ``count``.

    Raises:
        StateMismatchError: the state is not of this optimizer, or of other parameters.
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.
        ValueError: ``count`` is given though the state has all counts.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> from jaxbnb.optim import decode_state, encode_state
        >>> params = {"kernel": jnp.ones((64, 1024))}
        >>> state = optax.adamw(1e-3).init(params)
        >>> eight, four = jaxbnb.adamw8bit(1e-3), jaxbnb.optim.adamw4bit(1e-3)
        >>> state = encode_state(eight, state, params)
        >>> state[0].mu["kernel"].dtype.name
        'uint8'
        >>> state = encode_state(four, decode_state(eight, state, params), params)
        >>> state[0].codes.mu["kernel"].shape
        (64, 512)
    """
    if isinstance(owner := _owner(tx), Paged):
        encoded = encode_state(owner.tx, state, params, count=count)
        return owner.page_out(encoded, params)
    layout = state_layout(tx, params, state)
    check_state(state, layout.in_32_bits, _NOT_IN_32_BITS)
    if count is not None and not layout.counts:
        raise ValueError("the state has all counts; leave count out")
    values = jax.tree.leaves(state)
    structure = jax.tree.structure(layout.low_bit)
    # Zeros are for the absmax of what is not quantised.
    leaves = [
        shape if k in layout.held else jnp.zeros(shape.shape, shape.dtype)
        for k, shape in enumerate(jax.tree.leaves(layout.low_bit))
    ]
    for k, value in enumerate(values):
        layout.write(leaves, k, value)
    for position, moments in layout.counts.items():
        steps = count
        if steps is None:
            stepped = [jnp.any(values[k] != 0) for k in moments]
            steps = jnp.any(jnp.asarray(stepped, bool))
        leaves[position] = jnp.asarray(steps).astype(jnp.int32)
    return structure.unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class Moment8bit:
    """How a `LowBit` transformation holds a moment of a parameter."""

    policy: Policy
    signed: bool

    def decode(self, codes: Any, absmax: Any) -> jax.Array:
        """Returns the float32 values of codes."""
        return self.policy.decode(codes, absmax, self.signed)

    def encode(self, values: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the codes and absmax of float32 values."""
        return self.policy.encode(values, self.signed)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """How `quantize_state` holds an array."""

    format: StateFormat
    shape: tuple[int, ...]

    def decode(self, codes: Any, absmax: Any) -> jax.Array:
        """Returns the float32 values of codes."""
        return self.format.decode(codes, absmax, self.shape)

    def encode(self, values: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the codes and absmax of float32 values."""
        return self.format.encode_exactly(values)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of the 32-bit state is in the low-bit one.

    Attributes:
        position: among the leaves, of the array or of its codes.
        absmax: likewise, of its absmax; None for an array that is not quantised.
        codec: how it is; None for an array that is not.
        dtype: what an array that is not quantised is cast to; None for as it is.
        copy: a second reading of what has another place.
        count: the position of the count of the same `LowBit`, if it is of one.
    """

    position: int
    absmax: int | None = None
    codec: Moment8bit | Quantized | None = None
    dtype: Any = None
    copy: bool = False
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """How a low-bit state lies beside the same optimizer's in 32 bits.

    Attributes:
        low_bit: the state of the transformation, of ``jax.ShapeDtypeStruct``.
        in_32_bits: Optax's, likewise, its moments float32.
        places: of each leaf of ``in_32_bits``.
        counts: positions in ``low_bit`` of counts that ``in_32_bits`` does not have,
            each with the positions there of the same transformation's moments.
    """

    low_bit: Any
    in_32_bits: Any
    places: list[Place]
    counts: dict[int, list[int]]

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the leaves of ``in_32_bits``."""
        return [x.shape for x in jax.tree.leaves(self.in_32_bits)]

    @functools.cached_property
    def held(self) -> set[int]:
        """The positions in ``low_bit`` that `write` or ``counts`` fill."""
        held = {place.position for place in self.places} | self.counts.keys()
        return held | {p.absmax for p in self.places if p.absmax is not None}

    def read(self, leaves: list[Any], k: int) -> Any:
        """A leaf of the 32-bit state, from those of the low-bit one."""
        place = self.places[k]
        if place.codec is None:
            return leaves[place.position]
        assert place.absmax is not None
        codes, absmax = leaves[place.position], leaves[place.absmax]
        want = jax.tree.leaves(self.low_bit)[place.position].dtype
        if codes.dtype != want:
            raise StateMismatchError(
                f"the state has codes of dtype {codes.dtype}, and tx of {want}"
            )
        return _decode(place.codec, codes, absmax)

    def write(self, leaves: list[Any], k: int, value: Any) -> None:
        """Stores a leaf of the 32-bit state in those of the low-bit one."""
        place = self.places[k]
        if place.copy:
            return
        if place.codec is None:
            if place.dtype is not None:
                value = jnp.asarray(value).astype(place.dtype)
            leaves[place.position] = value
            return
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise StateMismatchError(
                f"the state has a moment of dtype {value.dtype}, not of a floating one"
            )
        assert place.absmax is not None
        codes, absmax = _encode(place.codec, value)
        leaves[place.position], leaves[place.absmax] = codes, absmax


def state_layout(
    tx: optax.GradientTransformation, params: optax.Params, like: Any
) -> StateLayout:
    """The layout of the state of any transformation but a paged one.

    Args:
        tx: the transformation.
        params: its parameters, in boxes if any of them declares its ``state_bits``.
        like: a state, or its parameters: where it has no boxes, the layout has none.

    Raises:
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.
    """
    parts, structure = jax.tree.flatten(parts_of(tx, params))
    low_bit = structure.unflatten([part.shapes for part in parts])
    in_32_bits, places, counts = [], [], {}
    position = 0
    for part in parts:
        size = jax.tree.structure(part.shapes).num_leaves
        at = jax.tree.unflatten(
            jax.tree.structure(part.shapes), range(position, position + size)
        )
        if part.owner is None:
            in_32_bits.append(part.shapes)
            places.append(Place(position))
        elif isinstance(part.owner, LowBit):
            wide, more = _moments_8bit(part, at)
            in_32_bits.append(wide)
            if "count" not in wide._fields:
                moments = [len(places) + k for k in range(len(more))]
                counts[at.count] = moments
            places += more
        else:
            wide, more = _quantized(part, at)
            in_32_bits.append(wide)
            places += more
        position += size
    wide = structure.unflatten(in_32_bits)
    _refuse_low_bit(wide)
    return StateLayout(_like(low_bit, like), _like(wide, like), places, counts)


def _like(shapes: Any, state: Any) -> Any:
    """Shapes of a state without boxes, where one that was given has none."""
    boxed = jax.tree.structure(state) != jax.tree.structure(unboxed(state))
    return shapes if boxed else unboxed(shapes)


def _moments_8bit(part: Part, at: Any) -> tuple[Any, list[Place]]:
    """Optax's state, and its places, of what a `LowBit` made; ``at`` has positions."""
    owner: LowBit = part.owner
    wide: Any = jax.eval_shape(owner.in_32_bits.init, part.params)
    signed = {m.name: m.signed for m in owner.moments}
    fields, places = {}, []
    for name in wide._fields:
        if name not in signed:
            fields[name] = getattr(wide, name)
            places.append(Place(at.count, copy=name != "count"))
            continue
        shapes, structure = jax.tree.flatten(getattr(part.shapes, name))
        positions = jax.tree.leaves(getattr(at, name))
        absmax = jax.tree.leaves(getattr(at, f"{name}_absmax"))
        codec = Moment8bit(owner.policy, signed[name])
        for x, k, a in zip(shapes, positions, absmax, strict=True):
            if holds_codes(x):
                places.append(Place(k, a, codec, count=at.count))
            else:
                places.append(Place(k, dtype=jnp.float32, count=at.count))
        fields[name] = structure.unflatten([_float32(x) for x in shapes])
    return type(wide)(**fields), places


def _quantized(part: Part, at: QuantizedState) -> tuple[Any, list[Place]]:
    """The same of what `quantize_state` made."""
    view = part.owner.view(part.params)
    positions, absmax = view.flatten(at.codes), view.flatten(at.absmax)
    shapes, places = [], []
    formats = zip(view.shapes, view.formats, strict=True)
    for (x, format_), k, a in zip(formats, positions, absmax, strict=True):
        if format_ is None:
            shapes.append(x)
            places.append(Place(k))
        else:
            shapes.append(_float32(x))
            places.append(Place(k, a, Quantized(format_, x.shape)))
    return view.unflatten(shapes), places


def _float32(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _decode(codec: Moment8bit | Quantized, codes: Any, absmax: Any) -> jax.Array:
    return codec.decode(codes, absmax)


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: Moment8bit | Quantized, values: Any) -> tuple[jax.Array, jax.Array]:
    return codec.encode(values.astype(jnp.float32))


def _owner(tx: optax.GradientTransformation) -> Any:
    return getattr(tx.update, "__self__", None)


def _refuse_low_bit(state: Any) -> None:
    """Raises if there is still a low-bit state in it, whose maker nobody knows."""

    def is_low_bit(node):
        fields = getattr(node, "_fields", ())
        return isinstance(node, QuantizedState) or any(
            field.endswith("_absmax") for field in fields
        )

    for node in jax.tree.leaves(state, is_leaf=is_low_bit):
        if is_low_bit(node):
            raise NotImplementedError(
                f"a wrapper around what made the {type(node).__name__} rebuilds its "
                "state in init, so that it cannot be told which this is. That of "
                "paged() is known where it is outermost; quantize_state is for "
                "optimizers with 32-bit state"
            )


_NOT_OF_TX = (
    "Was it made by another transformation, with another block_size or "
    "min_quantized_size, or for other parameters? this takes the state that tx has"
)
_NOT_IN_32_BITS = (
    "Was it made by another transformation, or for other parameters? encode_state "
    "takes a state in 32 bits, as decode_state returns it"
)


def check_state(state: Any, want: Any, hint: str = _NOT_OF_TX) -> None:
    """Raises unless structure and shapes are the same.

    Args:
        state: what was given.
        want: of ``jax.ShapeDtypeStruct``; in boxes or not, whatever ``state`` is in.
        hint: what may be wrong.

    Raises:
        StateMismatchError: they are not.
    """
    difference = _difference(state, _like(want, state), "")
    if difference is not None:
        raise StateMismatchError(f"the state has {difference}. {hint}")


def _difference(got: Any, want: Any, path: str) -> str | None:
    """In words, the first node or leaf that differs."""
    (got_children, got_node), (children, node) = _one_level(got), _one_level(want)
    where = f"at {path}" if path else "at its top"
    if got_node != node:
        return f"{_kind(got)} {where}, where {_kind(want)} belongs"
    if jax.tree_util.all_leaves([want]):
        if np.shape(got) != want.shape:
            return f"shape {np.shape(got)} {where}, where {want.shape} belongs"
        return None
    for ((key, *_), mine), (_, theirs) in zip(got_children, children, strict=True):
        deeper = path + jax.tree_util.keystr((key,))
        difference = _difference(mine, theirs, deeper)
        if difference is not None:
            return difference
    return None


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Its children with their keys, and its own structure."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _kind(node: Any) -> str:
    if jax.tree_util.all_leaves([node]):
        return "an array"
    children, _ = _one_level(node)
    keys = ", ".join(jax.tree_util.keystr(k, simple=True) for k, _ in children)
    return f"{type(node).__name__}({keys})"
