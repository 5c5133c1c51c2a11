"""quantize_state: any Optax transformation with its state in 8 bits, 4 bits or fp8."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxbnb.optim._arguments import check_arguments, names_arguments
from jaxbnb.optim._formats import StateBits, StateFormat
from jaxbnb.optim._owners import made
from jaxbnb.optim._separate import check_separate
from jaxbnb.optim._sharding import explicit_spec
from jaxbnb.optim.rules import (
    Overrides,
    Pattern,
    check_all_decide,
    check_rules,
    first_match,
    flatten_with_paths,
    keep_32_bits,
    refuse_quantized,
)

_DEFAULT_BLOCK_SIZE = {4: 128, 8: 256, "fp8": 256, 32: 256}


class QuantizedState(NamedTuple):
    """The state of `quantize_state`: two trees of plain arrays, of one structure.

    Attributes:
        codes: the state of the inner transformation, its arrays that belong to a
            parameter replaced by their codes.
        absmax: an absmax a block for each of those, and one zero elsewhere. Its
            sign bit says that no element of the block is negative.
    """

    codes: Any
    absmax: Any


@names_arguments
def quantize_state(
    tx: optax.GradientTransformation,
    *,
    state_bits: StateBits = 8,
    block_size: int | None = None,
    min_quantized_size: int = 4096,
    rules: Sequence[tuple[Pattern, Overrides]] = (),
) -> optax.GradientTransformationExtraArgs:
    """Holds the state of any optimizer in 8 bits, 4 bits or fp8.

    Each parameter is a step of its own: its state is decoded, ``tx`` updates it, and
    the new state is encoded, so there is never more than one decoded parameter's state
    beside the codes. ``tx`` must therefore treat each parameter by itself, as all
    optimizers of Optax do; what mixes them, such as ``optax.clip_by_global_norm``,
    belongs in a chain around this.

    Whether a state is signed is found block by block. Where the square of a gradient
    element, or any state of it, is not finite, the update is NaN and all its state
    stays what it was. Everything is computed in float32.

    Args:
        tx: any Optax transformation.
        state_bits: 8 or 4 for the dynamic maps, "fp8" for float8_e4m3fn times an
            absmax, 32 for ``tx`` itself.
        block_size: the largest number of elements that share an absmax; by default 256,
            or 128 in 4 bits.
        min_quantized_size: smaller arrays of state stay as they are.
        rules: pairs of a pattern and any of ``state_bits``, ``block_size`` and
            ``min_quantized_size`` for the parameters whose path it matches; the first
            match holds. A pattern is a regular expression for the whole dotted path, or
            a list of names, each the last parts of one.

    Returns:
        An ``optax.GradientTransformation`` with a `QuantizedState`.

    Raises:
        TypeError: a rule has an unknown key.
        ValueError: an argument is out of range, or, in ``init``, a rule matches no
            parameter, or ``tx`` mixes parameters.
        NotImplementedError: in ``init``, where the state of ``tx`` is not in trees like
            the parameters' own, as of ``optax.sm3`` and ``optax.lbfgs``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb, optax
        >>> tx = jaxbnb.quantize_state(optax.adamax(1e-3))
        >>> state = tx.init({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> jax.tree.map(lambda x: x.dtype.name, state.codes[0].nu)
        {'bias': 'float32', 'kernel': 'uint8'}

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021.
        Li et al., Memory Efficient Optimizers with 4-bit States, 2023.
    """
    default = _Storage(state_bits, block_size, min_quantized_size)
    by_rule = []
    for i, (pattern, changes) in enumerate(check_rules(rules)):
        check_arguments(_Storage, changes, name=f"rule {i} of quantize_state")
        by_rule.append((pattern, dataclasses.replace(default, **changes)))
    tx = optax.with_extra_args_support(tx)
    if state_bits == 32 and not rules:
        return tx
    quantized = _QuantizeState(tx, default, tuple(by_rule))
    return optax.GradientTransformationExtraArgs(quantized.init, quantized.update)


@dataclasses.dataclass(frozen=True)
class _Storage:
    state_bits: StateBits
    block_size: int | None
    min_quantized_size: int

    def __post_init__(self):
        if self.min_quantized_size < 0:
            raise ValueError(
                f"min_quantized_size must be at least 0; got {self.min_quantized_size}"
            )
        _ = self.format

    @property
    def format(self) -> StateFormat:
        size = self.block_size or _DEFAULT_BLOCK_SIZE.get(self.state_bits, 256)
        return StateFormat(self.state_bits, size)

    def quantizes(self, x: jax.ShapeDtypeStruct) -> bool:
        return (
            self.state_bits != 32
            and x.ndim > 0
            and jnp.issubdtype(x.dtype, jnp.floating)
            and math.prod(x.shape) >= max(self.min_quantized_size, 1)
        )


@dataclasses.dataclass(frozen=True)
class _QuantizeState:
    tx: optax.GradientTransformationExtraArgs
    default: _Storage
    rules: tuple[tuple[Pattern, _Storage], ...]

    def init(self, params: optax.Params) -> QuantizedState:
        refuse_quantized(params)
        shapes, params = params, _in_float32(params)
        view = self.view(params)
        check_separate(self.tx, params, view.owners)
        codes: list[Any] = [None] * len(view.owners)
        # One zero for what is not quantised: Orbax saves no array without elements.
        # Each an array of its own: nothing may be donated twice.
        absmax: list[Any] = [jnp.zeros((1,), jnp.float32) for _ in view.owners]
        for i in view.turns():
            # Under jit XLA would otherwise encode these constants as it compiles: for
            # 10 s at 2^20 elements.
            state = jax.lax.optimization_barrier(self.tx.init(view.only(params, i)))
            state = view.flatten(state)
            view.encode(i, state, codes, absmax)
        state = QuantizedState(view.unflatten(codes), view.unflatten(absmax))
        return made(self, shapes, state)

    def update(self, updates, state, params=None, **extra_args):
        results = list(jax.tree.leaves(updates))
        updates, params = _in_float32((updates, params))
        view = self.view(updates if params is None else params, state)
        old, old_absmax = view.flatten(state.codes), view.flatten(state.absmax)
        codes, absmax = list(old), list(old_absmax)
        before = None
        for i in view.turns():
            one = None if params is None else view.only(params, i)
            args = view.seen(i, old), view.seen(i, old_absmax), view.only(updates, i)
            turn = functools.partial(self._turn, view, i, extra_args)
            if view.streams(i, updates):
                turn = functools.partial(_after, before, turn)
            result, new, new_absmax = turn(*args, one)
            for k in view.stored(i):
                codes[k], absmax[k] = new[k], new_absmax[k]
            if i is not None and result is not None:
                results[i] = result.astype(results[i].dtype)
                before = result if result.size else before
        updates = jax.tree.unflatten(jax.tree.structure(updates), results)
        return updates, QuantizedState(view.unflatten(codes), view.unflatten(absmax))

    def _turn(self, view, i, extra_args, codes, absmax, updates, params):
        """The update of a parameter, and the lists with its new codes and absmax."""
        decoded = view.decode(i, codes, absmax)
        update, new = self.tx.update(
            updates, view.unflatten(decoded), params, **extra_args
        )
        new, result = view.flatten(new), None
        if i is not None:
            (grad,), (result,) = jax.tree.leaves(updates), jax.tree.leaves(update)
            result, new = _keep_finite(grad, result, decoded, new, view.owned(i))
        view.encode(i, new, codes, absmax)
        return result, codes, absmax

    def view(self, params, state: QuantizedState | None = None) -> "_View":
        """How the state of these parameters lies; shapes will do.

        Args:
            params: in boxes if any of them declares its ``state_bits``.
            state: what ``init`` made, to go by instead.
        """
        params = _in_float32(params)
        paths, _, _ = flatten_with_paths(params)
        pairs = [(pattern, {}) for pattern, _ in self.rules]
        chosen = [first_match(path, pairs) for path in paths]
        if paths:  # optax.tree_map_params comes with a tree without leaves.
            check_all_decide(pairs, set(chosen), paths)
        as_it_is = dataclasses.replace(self.default, state_bits=32)
        storages = [
            self.rules[i][1] if i is not None else as_it_is if kept else self.default
            for i, kept in zip(chosen, keep_32_bits(params), strict=True)
        ]
        return _View(self.tx, params, storages, state)


class _View:
    """The state of ``tx`` as a list of arrays, and whose each of them is."""

    def __init__(self, tx, params, storages: list[_Storage], state=None):
        self._params_structure = jax.tree.structure(params)
        self._storages = storages
        num = self._params_structure.num_leaves
        indices = jax.tree.unflatten(self._params_structure, list(range(num)))
        shapes = jax.eval_shape(tx.init, params)
        try:
            owners = optax.tree_map_params(
                tx,
                lambda x, i: x if isinstance(x, optax.MaskedNode) else _Owner(i),
                shapes,
                indices,
                transform_non_params=lambda _: _Owner(None),
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            )
        except (IndexError, TypeError, ValueError) as error:
            raise NotImplementedError(
                "optax.tree_map_params cannot tell which state of tx is of which "
                "parameter, as for optax.sm3 and optax.lbfgs, so it cannot be held in "
                "few bits"
            ) from error
        self._structure = jax.tree.structure(shapes)
        self.shapes = jax.tree.leaves(shapes)
        self.owners = [owner.index for owner in jax.tree.leaves(owners)]
        codes = self.shapes if state is None else self.flatten(state.codes)
        self.formats = [
            self._format(*of, made=state is not None)
            for of in zip(self.shapes, self.owners, codes, strict=True)
        ]

    def turns(self) -> Sequence[int | None]:
        """Which parameter to step, one after the other; None when there is none."""
        return range(len(self._storages)) or [None]

    def owned(self, i: int | None) -> list[int]:
        """The positions in the list of what belongs to a parameter."""
        return [k for k, owner in enumerate(self.owners) if owner == i]

    def stored(self, i: int | None) -> list[int]:
        """The positions of what is kept of a turn: in the last what is shared too."""
        last = i is None or i == len(self._storages) - 1
        return self.owned(i) + (self.owned(None) if last and i is not None else [])

    def seen(self, i: int | None, state: list[Any]) -> list[Any]:
        """The list with None for what belongs to other parameters."""
        pairs = zip(self.owners, state, strict=True)
        return [x if owner in (None, i) else None for owner, x in pairs]

    def streams(self, i: int | None, updates: Any) -> bool:
        """Whether a turn is compiled, and has state to decode."""
        if i is None:
            return False
        update = self._params_structure.flatten_up_to(updates)[i]
        compiled = isinstance(update, jax.core.Tracer) and explicit_spec(update) is None
        return compiled and any(self.formats[k] is not None for k in self.owned(i))

    def only(self, tree: Any, i: int | None) -> Any:
        """A tree like the parameters with all but one masked out."""
        leaves = self._params_structure.flatten_up_to(tree)
        masked = [x if k == i else optax.MaskedNode() for k, x in enumerate(leaves)]
        return self._params_structure.unflatten(masked)

    def flatten(self, state: Any) -> list[Any]:
        return self._structure.flatten_up_to(state)

    def unflatten(self, leaves: list[Any]) -> Any:
        return self._structure.unflatten(leaves)

    def _format(self, shape, owner, codes, made: bool) -> StateFormat | None:
        """Of an array of state; None for as ``tx`` has it.

        ``init`` decides, and steps go by the dtype of what it made.
        """
        if owner is None:
            return None
        storage = self._storages[owner]
        quantized = codes.dtype != shape.dtype if made else storage.quantizes(shape)
        if not quantized:
            return None
        format_ = storage.format
        want = format_.codes_shape(shape.shape), format_.codes_dtype
        if made and (codes.shape, codes.dtype) != want:
            raise ValueError(
                f"the state has codes {codes.dtype}{codes.shape} where state_bits is "
                f"{storage.state_bits!r}. Was it made with other state_bits or rules?"
            )
        return format_

    def decode(self, i: int | None, codes: list[Any], absmax: list[Any]) -> list[Any]:
        """The state that the inner transformation sees in the turn of a parameter."""
        state = []
        for k, (owner, format_) in enumerate(
            zip(self.owners, self.formats, strict=True)
        ):
            if owner not in (None, i):
                state.append(optax.MaskedNode())
            elif format_ is None:
                state.append(codes[k])
            else:
                shape = self.shapes[k]
                spec = explicit_spec(shape)
                values = format_.decode(codes[k], absmax[k], shape.shape, spec)
                state.append(values.astype(shape.dtype))
        return state

    def encode(self, i: int | None, state: list, codes: list, absmax: list) -> None:
        """Stores what a turn made: of its parameter, and in the last what is shared."""
        for k in self.stored(i):
            format_ = self.formats[k]
            if format_ is None:
                codes[k] = state[k]
            else:
                codes[k], absmax[k] = format_.encode(state[k].astype(jnp.float32))


def _after(before, turn, codes, absmax, updates, params):
    """A turn of which nothing is computed before another's update is.

    Else XLA decodes the state of one parameter while that of others is about: for a CPU
    it schedules breadth first, so that of all; for a GPU a part of some. A barrier is
    enough for a GPU. For a CPU the turn is a branch of a conditional, which is
    computed as a whole: always that one, on a predicate that needs the other update.
    """
    args = codes, absmax, updates, params
    turn = jax.jit(turn)  # To be traced once for all that follows.
    if before is None:
        (before,) = jax.tree.leaves(updates)

    def on_cpu(before, *args):
        shapes = jax.eval_shape(turn, *args)
        return jax.lax.cond(
            jnp.isnan(before) & jnp.isinf(before),
            lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            turn,
            *args,
        )

    def elsewhere(before, *args):
        args, _ = jax.lax.optimization_barrier((args, before))
        return turn(*args)

    return jax.lax.platform_dependent(
        before.reshape(-1)[0], *args, cpu=on_cpu, default=elsewhere
    )


def _in_float32(tree: Any) -> Any:
    """For the steps: 16-bit floats have no room for the square of a gradient."""

    def leaf(x):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize >= 4:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(dtype=jnp.float32)
        return x.astype(jnp.float32)

    return jax.tree.map(leaf, tree)


@dataclasses.dataclass(frozen=True)
class _Owner:
    index: int | None


def _keep_finite(grad, update, old, new, owned):
    """NaN in the update, and the old state of an element, where one is not finite.

    Or where the square of the gradient is not: what has room for that gradient would
    otherwise take it to its block, while what has none keeps its old value.
    """
    floating = [k for k in owned if jnp.issubdtype(new[k].dtype, jnp.floating)]
    bad = ~jnp.isfinite(grad * grad)
    for k in floating:
        if new[k].shape == grad.shape:
            bad |= ~jnp.isfinite(new[k])
    new = list(new)
    for k in floating:
        # A mean over rows or columns is of no element's.
        same = new[k].shape == grad.shape
        kept = bad if same else ~jnp.isfinite(new[k])
        new[k] = jnp.where(kept, old[k], new[k])
    return jnp.where(bad, jnp.nan, update).astype(update.dtype), new
