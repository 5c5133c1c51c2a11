"""Converts the state of a bitsandbytes optimizer to the state of ``tx``, and back."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from jaxbnb.convert._bitsandbytes_moments import load_moments, save_moments
from jaxbnb.convert._bitsandbytes_slots import (
    KERNELS,
    Slot,
    find_slots,
    get_slot,
    list_parameters,
)
from jaxbnb.convert._bitsandbytes_state import WRAPPER, list_keys, read_entries
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.optim import decode_state, encode_state
from jaxbnb.optim.state_layout import state_layout

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
    """Converts the ``state_dict()`` of a bitsandbytes optimizer to a state of ``tx``.

    Adam, AdamW and LAMB convert to any of `adam8bit`, `adamw8bit` and `lamb8bit`;
    AdEMAMix to `ademamix8bit`; Lion to `lion8bit`; RMSprop to `rmsprop8bit`; Adagrad to
    `adagrad8bit`; SGD to `sgd8bit`, and so does LARS, because bitsandbytes' 8-bit LARS
    is SGD. The 32-bit and paged forms convert too. ``tx`` may be paged, keep 4 bits, be
    a `quantize_state` or an optimizer of Optax, and stand inside a chain, a mask, a
    partition or ``optax.MultiSteps``. The file does not name its optimizer. Everything
    that its tensors reveal is checked, but the states of Lion and SGD look the same.

    Codes and absmax keep every bit where ``tx`` uses the same map and the same blocks.
    bitsandbytes' blocks divide the flattened tensor, so they are the same if the
    parameter is not transposed and either 256 divides the size of its last axis, or
    that size divides 256. Otherwise a moment is decoded, by the map in the file, and
    encoded again, with one rounding (none in a ``tx`` that keeps float32). This is the
    case for kernels, because the blocks of a torch weight run along the other axis, and
    for RMSprop and Adagrad, because bitsandbytes keeps their squares in the signed map
    and jaxbnb in the unsigned one. A value that bitsandbytes has stored as zero stays
    zero.

    Args:
        state_dict: result of ``optimizer.state_dict()``, with tensors of torch or
            NumPy.
        tx: the transformation that continues.
        params: the parameters.
        order: dotted paths of the parameters in the order in which the optimizer got
            them. None for the order of ``jax.tree.leaves``, which sorts dicts by key.
        transposed: parameters that are ``(in, out)`` in Flax and ``(out, in)`` in
            torch, or ``(*window, in, out)`` and ``(out, in, *window)``. Either names,
            each a whole path or its last parts, or one regular expression for the whole
            path.
        count: steps taken; None for the number in the file, which must then be the same
            for all parameters. All counts in ``tx`` are set to it, including those of
            schedules.

    Returns:
        The state, with the structure of ``tx.init(params)``. A parameter without state
        in the file, because it had no gradient yet, keeps its initial state.

    Raises:
        MissingTensorError: a tensor is missing.
        UnsupportedCheckpointError: the state does not belong to an optimizer of
            bitsandbytes, or is in the tensor-wise 8 bits of its old versions.
        CheckpointError: the file has a different number of parameters than ``params``,
            a tensor of a different shape, or the state of a different family of
            optimizers than ``tx``.
        ValueError: ``order`` or ``transposed`` names a parameter that does not exist.

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
    parameters = list_parameters(params, order, transposed)
    entries = read_entries(state_dict)
    if len(entries) != len(parameters.order):
        raise CheckpointError(
            f"the file has {len(entries)} parameters, but "
            f"{'params' if order is None else 'order'} has {len(parameters.order)}"
        )
    layout = state_layout(tx, params, params)
    slots = find_slots(layout, params)
    matched = []
    for index, entry in zip(parameters.order, entries, strict=True):
        if entry is not None:
            name = f"{entry.name}, for {parameters.paths[index]!r}"
            slot = get_slot(slots, index, name)
            matched.append((dataclasses.replace(entry, name=name), slot))
    _check_units(tx, params, [slot for _, slot in matched])
    leaves = layout.flatten(tx.init(params))
    for entry, slot in matched:
        load_moments(entry, layout, leaves, slot, parameters)
    steps = {entry.step for entry, _ in matched}
    if count is None and len(steps) > 1:
        raise CheckpointError(
            f"the parameters have taken different numbers of steps, {sorted(steps)}, "
            "but tx has one count for all. Choose it with count="
        )
    if count is None and steps:
        (count,) = steps
    if count is not None:
        for index, (path, leaf) in enumerate(
            jax.tree_util.tree_leaves_with_path(layout.low_bit)
        ):
            name = getattr(path[-1], "name", None) if path else None
            if name in _COUNTS and jnp.issubdtype(leaf.dtype, jnp.integer):
                leaves[index] = jnp.full(leaf.shape, count, leaf.dtype)
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
    """Converts a state of ``tx`` to the ``state_dict()`` of a bitsandbytes optimizer.

    The inverse of `optimizer_state_from_bitsandbytes`, and exact in the same cases. A
    moment that ``tx`` keeps in few bits becomes 8 bits, any other float32; bitsandbytes
    continues with either. Moments in 4 bits and fp8 are rounded once more. So are
    squares, for the signed map of RMSprop and Adagrad, but none of them to zero.

    Args:
        tx: the transformation; `optimizer_state_from_bitsandbytes` lists which.
        state: state of ``tx``.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.
        order: dotted paths of the parameters in the order in which the optimizer gets
            them; see `optimizer_state_from_bitsandbytes`.
        transposed: parameters that torch has the other way round; see
            `optimizer_state_from_bitsandbytes`.
        param_groups: ``optimizer.state_dict()["param_groups"]`` of the optimizer that
            will load the result; it takes learning rate, betas and everything else from
            here. None for one group that has only the numbers of the parameters.
        count: steps taken; None for the count in the state, or 1 if it has none.

    Returns:
        A dict for ``optimizer.load_state_dict``, after ``torch.from_numpy`` on its
        arrays, which are NumPy's. Before the first step it has no state.

    Raises:
        StateMismatchError: the state does not belong to ``tx`` and ``params``.
        CheckpointError: bitsandbytes has no optimizer with the state of ``tx``.
        ValueError: ``order``, ``transposed`` or ``param_groups`` do not match the
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
    parameters = list_parameters(params, order, transposed)
    groups = [{"params": list(range(len(parameters.order)))}]
    if param_groups is not None:
        groups = [copy.deepcopy(dict(group)) for group in param_groups]
    keys = list_keys(groups)
    if len(keys) != len(parameters.order):
        raise ValueError(
            f"param_groups have {len(keys)} parameters, but "
            f"{'params' if order is None else 'order'} has {len(parameters.order)}"
        )
    layout = state_layout(tx, params, state)
    leaves = layout.flatten(state)
    all_slots = find_slots(layout, params)
    slots = [
        get_slot(all_slots, index, repr(parameters.paths[index]))
        for index in parameters.order
    ]
    _check_units(tx, params, slots)
    states = {}
    for key, slot in zip(keys, slots, strict=True):
        steps = count
        if steps is None:
            steps = 1 if slot.count is None else int(leaves[slot.count])
        if steps:
            tensors = save_moments(layout, leaves, slot, parameters)
            states[key] = {"step": steps, WRAPPER: tensors}
    return {"state": states, "param_groups": groups}


def _check_units(
    tx: optax.GradientTransformation, params: Any, slots: list[Slot]
) -> None:
    """Raises if a trace accumulates updates, as in LARS, instead of gradients.

    The state does not show the difference, but a step does: without a gradient, SGD
    moves against its momentum.
    """
    if not any(slot.family == "TraceState" for slot in slots):
        return
    zeros = jax.tree.map(lambda p: jnp.zeros((1,) * len(p.shape), p.dtype), params)

    def is_trace(node):
        return isinstance(node, optax.TraceState)

    def fill_trace(node):
        return jax.tree.map(jnp.ones_like, node) if is_trace(node) else node

    state = decode_state(tx, tx.init(zeros), zeros)
    state = jax.tree.map(fill_trace, state, is_leaf=is_trace)
    try:
        updates, _ = tx.update(zeros, encode_state(tx, state, zeros), zeros)
    except TypeError:
        return  # ``tx`` needs more than gradients and parameters.
    if any(jnp.any(update > 0) for update in jax.tree.leaves(updates)):
        raise CheckpointError(
            "tx accumulates updates, which include the learning rate, in its momentum, "
            "but bitsandbytes accumulates gradients. Its 8-bit LARS is SGD: use sgd8bit"
        )
