"""A bitsandbytes optimizer's ``state_dict()`` to the state of ``tx``, and back."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbnb.convert._bitsandbytes_state import (
    BLOCK_SIZE,
    CODEBOOKS,
    FAMILIES,
    WRAPPER,
    Blocks8bit,
    Entry,
    encode,
    keys_of,
    read_entries,
)
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.core.paths import matches
from jaxbnb.optim import decode_state, encode_state
from jaxbnb.optim.rules import flatten_with_paths
from jaxbnb.optim.state_layout import Place, StateLayout, state_layout
from jaxbnb_kernels.update_8bit import block_layout

# What is (in, out) in Flax and in jaxbnb.lora, and (out, in) in torch.
KERNELS: Final = ("kernel", "lora_a", "lora_b")
_COUNTS: Final = ("count", "count_m2", "gradient_step")


def optimizer_state_from_bitsandbytes(
    state_dict: Mapping[str, Any],
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    order: Sequence[str] | None = None,
    transposed: str | Sequence[str] = KERNELS,
    count: int | None = None,
) -> optax.OptState:
    """The state of ``tx`` from the ``state_dict()`` of a bitsandbytes optimizer.

    Adam, AdamW and LAMB there go to any of `adam8bit`, `adamw8bit` and `lamb8bit`;
    AdEMAMix to `ademamix8bit`; Lion to `lion8bit`; SGD, and LARS, whose 8-bit form is
    SGD there, to `sgd8bit`; RMSprop to `rmsprop8bit`; Adagrad to `adagrad8bit`. So do
    their 32-bit and paged forms, and ``tx`` may be paged, in 4 bits, a
    `quantize_state`, Optax's own, and inside a chain, a mask, a partition or
    ``optax.MultiSteps``. The file does not name its optimizer. What its tensors give
    away is checked, but Lion's and SGD's state look the same.

    Codes and absmax are kept to the bit where ``tx`` has the same map and the same
    blocks, which are of the flattened tensor there: where the parameter is not
    transposed and 256 divides its last axis, or its last axis 256. Otherwise a moment
    is decoded, by the map in the file, and encoded anew, with one rounding; in a ``tx``
    that keeps float32 with none. That is so for kernels, because the blocks of a torch
    weight run along the other axis, and for RMSprop and Adagrad, whose squares are in
    the signed map there and in the unsigned one here. What bitsandbytes has stored as
    zero is zero.

    Args:
        state_dict: what ``optimizer.state_dict()`` returned, with tensors of torch or
            NumPy.
        tx: the transformation that goes on.
        params: the parameters.
        order: dotted paths of the parameters in the order in which the optimizer got
            them. None for that of ``jax.tree.leaves``, where dicts are sorted by key.
        transposed: which parameters are ``(in, out)`` here and ``(out, in)`` in torch,
            or ``(*window, in, out)`` and ``(out, in, *window)``: names, each the whole
            path or its last parts, or one regular expression for the whole path.
        count: steps taken; None for what the file says, which must then be the same for
            all parameters. All counts of ``tx`` become it, those of schedules too.

    Returns:
        The state, as ``tx.init(params)`` has it. A parameter without state in the file,
        because it had no gradient yet, has its initial one.

    Raises:
        MissingTensorError: a tensor is not there.
        UnsupportedCheckpointError: the state is not of bitsandbytes' optimizers, or of
            the tensor-wise 8 bits of its old versions.
        CheckpointError: the file has another number of parameters, a tensor of another
            shape, or the state of another family of optimizers than ``tx``.
        ValueError: ``order`` or ``transposed`` names what is not there.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, numpy as np
        >>> from jaxbnb.convert import optimizer_state_from_bitsandbytes
        >>> saved = {
        ...     "state": {
        ...         0: {"step": 3, "state1": np.full((4, 8), 0.5, np.float32)},
        ...         1: {"step": 3, "state1": np.zeros(4, np.float32)}},
        ...     "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
        >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
        >>> state = optimizer_state_from_bitsandbytes(
        ...     saved, jaxbnb.lion8bit(1e-4), params, order=["kernel", "bias"])
        >>> state[0].count.item(), state[0].mu["kernel"].shape
        (3, (8, 4))
    """
    names = _Names.of(params, order, transposed)
    entries = read_entries(state_dict)
    if len(entries) != len(names.order):
        raise CheckpointError(
            f"the file has {len(entries)} parameters, and "
            f"{'params' if order is None else 'order'} {len(names.order)}"
        )
    layout = state_layout(tx, params, params)
    slots = _slots(layout, params)
    held = []
    for index, entry in zip(names.order, entries, strict=True):
        if entry is not None:
            name = f"{entry.name}, for {names.paths[index]!r}"
            slot = _slot(slots, index, name)
            held.append((dataclasses.replace(entry, name=name), slot))
    _check_units(tx, params, [slot for _, slot in held])
    leaves = layout.flatten(tx.init(params))
    for entry, slot in held:
        _load(entry, layout, leaves, slot, names)
    steps = {entry.step for entry, _ in held}
    if count is None and len(steps) > 1:
        raise CheckpointError(
            f"the parameters have taken different numbers of steps, {sorted(steps)}; "
            "tx counts them together. Say which it is: count="
        )
    if count is None and steps:
        (count,) = steps
    if count is not None:
        shapes = jax.tree_util.tree_leaves_with_path(layout.low_bit)
        for k, (path, leaf) in enumerate(shapes):
            name = getattr(path[-1], "name", None) if path else None
            if name in _COUNTS and jnp.issubdtype(leaf.dtype, jnp.integer):
                leaves[k] = jnp.full(leaf.shape, count, leaf.dtype)
    return layout.unflatten(leaves)


def optimizer_state_to_bitsandbytes(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    *,
    order: Sequence[str] | None = None,
    transposed: str | Sequence[str] = KERNELS,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    count: int | None = None,
) -> dict[str, Any]:
    """The ``state_dict()`` of a bitsandbytes optimizer with the state of ``tx``.

    The inverse of `optimizer_state_from_bitsandbytes`, and exact where that is. A
    moment that ``tx`` holds in low bits is in 8 bits there, others are float32:
    bitsandbytes goes on with what it is given. Moments in 4 bits and in fp8 are rounded
    once more; squares in the signed map of RMSprop and Adagrad too, but none to zero.

    Args:
        tx: the transformation; see `optimizer_state_from_bitsandbytes` for which.
        state: its state.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.
        order: dotted paths of the parameters in the order in which the optimizer gets
            them, as for `optimizer_state_from_bitsandbytes`.
        transposed: which parameters torch has the other way, likewise.
        param_groups: those of the optimizer that is to load it,
            ``optimizer.state_dict()["param_groups"]``: it takes learning rate, betas
            and all else from here. None for one group that has nothing but the
            parameters' numbers.
        count: steps taken; None for what the state says, or 1 where it has no count.

    Returns:
        A dict for ``optimizer.load_state_dict`` once its arrays, which are NumPy's,
        went through ``torch.from_numpy``. Before the first step it has no state.

    Raises:
        StateMismatchError: the state is not of ``tx``, or of other parameters.
        CheckpointError: bitsandbytes has no optimizer with the state of ``tx``.
        ValueError: ``order``, ``transposed`` or ``param_groups`` are not of these
            parameters.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from jaxbnb.convert import optimizer_state_to_bitsandbytes
        >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
        >>> tx = jaxbnb.adamw8bit(1e-3)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> saved = optimizer_state_to_bitsandbytes(
        ...     tx, state, params, order=["kernel", "bias"])
        >>> entry = saved["state"][0]["__bnb_optimizer_quant_state__"]
        >>> {name: array.shape for name, array in entry.items()}
        {'state1': (128, 64), 'qmap1': (256,), 'absmax1': (32,),
         'state2': (128, 64), 'qmap2': (256,), 'absmax2': (32,)}

        In PyTorch, with an optimizer of the same kind::

            import torch
            from torch.utils import _pytree as pytree

            optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
            saved = optimizer_state_to_bitsandbytes(
                tx, state, params, order=order,
                param_groups=optimizer.state_dict()["param_groups"])
            optimizer.load_state_dict(pytree.tree_map(
                lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x,
                saved))
    """
    names = _Names.of(params, order, transposed)
    groups = [{"params": list(range(len(names.order)))}]
    if param_groups is not None:
        groups = [copy.deepcopy(dict(group)) for group in param_groups]
    keys = keys_of(groups)
    if len(keys) != len(names.order):
        raise ValueError(
            f"param_groups have {len(keys)} parameters, and "
            f"{'params' if order is None else 'order'} {len(names.order)}"
        )
    layout = state_layout(tx, params, state)
    leaves = layout.flatten(state)
    every = _slots(layout, params)
    slots = [_slot(every, index, repr(names.paths[index])) for index in names.order]
    _check_units(tx, params, slots)
    states = {}
    for key, slot in zip(keys, slots, strict=True):
        steps = count
        if steps is None:
            steps = 1 if slot.count is None else int(leaves[slot.count])
        if steps:
            states[key] = {"step": steps, WRAPPER: _save(layout, leaves, slot, names)}
    return {"state": states, "param_groups": groups}


@dataclasses.dataclass(frozen=True)
class _Names:
    """The parameters as both sides know them.

    Attributes:
        paths: of each leaf.
        order: the position among the leaves of each parameter of the optimizer.
        transposed: of each leaf.
    """

    paths: list[str]
    order: list[int]
    transposed: list[bool]

    @classmethod
    def of(
        cls, params: Any, order: Sequence[str] | None, transposed: str | Sequence[str]
    ) -> "_Names":
        paths, _, _ = flatten_with_paths(params)
        places = list(range(len(paths)))
        if order is not None:
            missing = [path for path in order if path not in paths]
            if missing or len(set(order)) < len(order):
                raise ValueError(
                    f"order must have each parameter once; got {missing or order} with "
                    f"the parameters {paths}"
                )
            places = [paths.index(path) for path in order]
        if transposed != KERNELS:
            patterns = transposed if isinstance(transposed, str) else tuple(transposed)
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                one = pattern if isinstance(patterns, str) else (pattern,)
                if not any(matches(path, one) for path in paths):
                    raise ValueError(
                        f"transposed has {pattern!r}, which matches none of {paths}"
                    )
        return cls(paths, places, [matches(path, transposed) for path in paths])

    def axes(self, index: int, ndim: int) -> tuple[int, ...]:
        """The axes of a parameter in the order that torch has."""
        if ndim < 2 or not self.transposed[index]:
            return tuple(range(ndim))
        return (ndim - 1, ndim - 2, *range(ndim - 2))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The state of one parameter.

    Attributes:
        index: of the parameter.
        family: the name of Optax's state.
        places: of its moments, among the leaves of the 32-bit state.
        count: the position of its count among the leaves of the state of ``tx``.
    """

    index: int
    family: str
    places: tuple[int, ...]
    count: int | None


def _slots(layout: StateLayout, params: Any) -> list[list[_Slot]]:
    """The state of each parameter that is of a family of bitsandbytes' too."""
    structure = jax.tree.structure(params)
    indices = structure.unflatten(range(structure.num_leaves))
    wide = jax.tree.structure(layout.in_32_bits)
    nodes = jax.tree.leaves(
        wide.unflatten(range(wide.num_leaves)),
        is_leaf=lambda node: type(node).__name__ in FAMILIES,
    )
    slots: list[list[_Slot]] = [[] for _ in range(structure.num_leaves)]
    for node in nodes:
        family = type(node).__name__
        columns = [
            _beside(getattr(node, moment.field), indices)
            for moment in FAMILIES.get(family, ())
        ]
        for row in zip(*columns, strict=True):
            places = tuple(place for place, _ in row)
            count = layout.places[places[0]].count
            if "count" in node._fields:
                count = layout.places[node.count].position
            slots[row[0][1]].append(_Slot(row[0][1], family, places, count))
    return slots


def _beside(moments: Any, indices: Any) -> list[tuple[int, int]]:
    """The position of each array of a moment, and which parameter it is of."""
    places, structure = jax.tree.flatten(
        moments, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    try:
        beside = structure.flatten_up_to(indices)
    except (TypeError, ValueError):
        beside = [None] * len(places)
    pairs: list[Any] = [
        (place, index)
        for place, index in zip(places, beside, strict=True)
        if not isinstance(place, optax.MaskedNode)
    ]
    if not all(isinstance(index, int) for _, index in pairs):
        raise CheckpointError(
            "tx keeps its moments in another tree than the parameters', as "
            "optax.flatten does"
        )
    return pairs


def _slot(slots: list[list[_Slot]], index: int, name: str) -> _Slot:
    """The state of a parameter, which must be of one family."""
    if len(slots[index]) != 1:
        families = " and ".join(slot.family for slot in slots[index]) or "nothing"
        raise CheckpointError(
            f"{name}: tx keeps {families} that bitsandbytes knows, and no optimizer of "
            f"bitsandbytes has that. Each has one of {', '.join(sorted(FAMILIES))}"
        )
    return slots[index][0]


def _load(
    entry: Entry, layout: StateLayout, leaves: list, slot: _Slot, names: _Names
) -> None:
    """Stores the moments of a parameter among the leaves of the state of ``tx``."""
    entry.check_family(slot.family)
    for k, moment in zip(slot.places, FAMILIES[slot.family], strict=True):
        place, shape = layout.places[k], layout.shapes[k]
        axes = names.axes(slot.index, len(shape))
        back = tuple(np.argsort(axes))
        stored = entry.read(moment, tuple(shape[axis] for axis in axes))
        if isinstance(stored, Blocks8bit):
            levels, size = stored.levels, stored.block_size
            absmax_shape = _same_blocks(place, shape, axes, levels, size)
            if absmax_shape is not None and place.absmax is not None:
                leaves[place.position] = jnp.asarray(stored.codes.transpose(back))
                leaves[place.absmax] = jnp.asarray(stored.absmax.reshape(absmax_shape))
                continue
            stored = stored.decode()
        if not moment.negative and np.any(stored < 0):
            raise CheckpointError(
                f"{entry.name}: state{moment.number} has negative values, which "
                f"{moment.field} of {slot.family} cannot have; another optimizer wrote "
                "it"
            )
        layout.write(leaves, k, jnp.asarray(stored.transpose(back)))


def _save(
    layout: StateLayout, leaves: list, slot: _Slot, names: _Names
) -> dict[str, np.ndarray]:
    """The tensors of the entry of a parameter."""
    tensors: dict[str, np.ndarray] = {}
    for k, moment in zip(slot.places, FAMILIES[slot.family], strict=True):
        place, shape = layout.places[k], layout.shapes[k]
        axes = names.axes(slot.index, len(shape))
        levels = CODEBOOKS[moment.signed]
        if place.format is None:
            values = np.asarray(layout.read(leaves, k), np.float32)
            parts = {"state": values.transpose(axes)}
        elif _same_blocks(place, shape, axes, levels, BLOCK_SIZE) is not None:
            assert place.absmax is not None
            parts = {
                "state": np.asarray(leaves[place.position]).transpose(axes),
                "qmap": levels,
                "absmax": np.asarray(leaves[place.absmax]).reshape(-1),
            }
        else:
            values = np.asarray(layout.read(leaves, k))
            codes, absmax = encode(values.transpose(axes), moment)
            parts = {"state": codes, "qmap": levels, "absmax": absmax}
        for name, part in parts.items():
            key = f"{name}{moment.number}"
            if moment.row and name != "qmap":
                tensors[key] = np.stack([tensors[key], part])
            else:
                # A copy: torch would write to it.
                tensors[key] = np.array(part, order="C")
    if "absmax1" not in tensors and slot.family in ("ScaleByAdamState", "TraceState"):
        # LAMB and LARS expect room for a norm beside what is not quantised.
        tensors["unorm_vec"] = np.zeros(1, np.float32)
    return tensors


def _same_blocks(
    place: Place,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    levels: np.ndarray,
    block_size: int,
) -> tuple[int, ...] | None:
    """The shape of the absmax here, where codes and absmax are the same in the file.

    Args:
        place: of the moment.
        shape: of the parameter here.
        axes: in the order that they have there.
        levels: of the file.
        block_size: of the file, whose blocks are of the flattened tensor.
    """
    format_ = place.format
    if format_ is None or format_.signed is None:
        return None
    if not np.array_equal(levels, CODEBOOKS[format_.signed]):
        return None
    # An axis of one element may go anywhere.
    long = [axis for axis in axes if shape[axis] > 1]
    if long != sorted(long):
        return None
    layout = block_layout(shape, format_.block_size)
    if math.prod(layout.absmax_shape) == 1:
        return layout.absmax_shape if math.prod(shape) <= block_size else None
    row, rows = math.prod(shape[layout.axis :]), math.prod(shape[: layout.axis])
    same = layout.size == block_size and (row % block_size == 0 or rows == 1)
    return layout.absmax_shape if same else None


def _check_units(
    tx: optax.GradientTransformation, params: Any, slots: list[_Slot]
) -> None:
    """Raises where a trace is of updates, as that of LARS, instead of gradients.

    Nothing in a state says so, but a step does: without a gradient, SGD's goes against
    its momentum.
    """
    if not any(slot.family == "TraceState" for slot in slots):
        return
    zeros = jax.tree.map(lambda p: jnp.zeros((1,) * len(p.shape), p.dtype), params)

    def is_trace(node):
        return isinstance(node, optax.TraceState)

    def push(node):
        return jax.tree.map(jnp.ones_like, node) if is_trace(node) else node

    state = decode_state(tx, tx.init(zeros), zeros)
    state = jax.tree.map(push, state, is_leaf=is_trace)
    try:
        updates, _ = tx.update(zeros, encode_state(tx, state, zeros), zeros)
    except TypeError:
        return  # It asks for more than gradients and parameters.
    if any(jnp.any(update > 0) for update in jax.tree.leaves(updates)):
        raise CheckpointError(
            "the momentum of tx is one of updates, with the learning rate in it, and "
            "bitsandbytes has one of gradients. Its LARS in 8 bits is SGD: use sgd8bit"
        )
