"""quantize_state: any Optax transformation with its state in 8 bits, 4 bits or fp8."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxbnb.optim._arguments import check_arguments, names_arguments
from jaxbnb.optim._separate import check_separate
from jaxbnb.optim._sharding import explicit_spec
from jaxbnb.optim._transformation import Definition, Part, note
from jaxbnb.optim.rules import Overrides, Pattern, check_rules, refuse_quantized
from jaxbnb.optim.state_format import (
    StateBits,
    StateFormat,
    StatePolicy,
    policies_of,
)
from jaxbnb.optim.state_layout import Place, float32_shape


class QuantizedState(NamedTuple):
    """The state of `quantize_state`: two trees of plain arrays, of one structure.

    Attributes:
        codes: state of the inner transformation, where codes replace the arrays that
            belong to a parameter.
        absmax: one absmax a block for each of these arrays, a single zero elsewhere.
            The sign bit says that no element of the block is negative.
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

    Each parameter takes a step of its own: its state is decoded, ``tx`` updates it, and
    the new state is encoded. So there is never more than one parameter's decoded state
    next to the codes. ``tx`` must therefore treat each parameter separately, as all
    optimizers of Optax do. What mixes them, such as ``optax.clip_by_global_norm``,
    belongs in a chain around this.

    Each block takes the signed or the unsigned map by the sign of its elements. Where
    the square of a gradient element, or any of its state, is not finite, its update is
    NaN and all of its state stays as it was. Everything is computed in float32.

    Args:
        tx: any Optax transformation.
        state_bits: 8 or 4 for the dynamic maps, "fp8" for float8_e4m3fn times an
            absmax, 32 for ``tx`` itself.
        block_size: largest number of elements that share an absmax; by default 256, or
            128 in 4 bits.
        min_quantized_size: smaller arrays of state stay as they are.
        rules: pairs of a pattern and a dict with any of ``state_bits``, ``block_size``
            and ``min_quantized_size``, for the parameters that match. The first match
            wins. A pattern is a regular expression for the whole dotted path, or a list
            of names, each the last parts of a path.

    Returns:
        An ``optax.GradientTransformation`` with a `QuantizedState`.

    Raises:
        TypeError: a rule has an unknown key.
        ValueError: an argument is out of range, or, in ``init``, a rule matches no
            parameter, or ``tx`` mixes parameters.
        NotImplementedError: the state of ``tx`` is not in trees like the parameters'
            own, as with ``optax.sm3`` and ``optax.lbfgs``; raised by ``init``.

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
    default = StatePolicy(state_bits, block_size, min_quantized_size)
    by_rule = []
    for i, (pattern, changes) in enumerate(check_rules(rules)):
        check_arguments(StatePolicy, changes, name=f"rule {i} of quantize_state")
        by_rule.append((pattern, dataclasses.replace(default, **changes)))
    tx = optax.with_extra_args_support(tx)
    if state_bits == 32 and not rules:
        return tx
    return QuantizeState(tx, default, tuple(by_rule)).transformation()


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizeState(Definition):
    """What `quantize_state` does.

    Attributes:
        tx: inner transformation.
        default: policy where no rule matches.
        rules: patterns of paths and the policies they lead to.
    """

    tx: optax.GradientTransformationExtraArgs
    default: StatePolicy
    rules: tuple[tuple[Pattern, StatePolicy], ...]

    def init(self, params: optax.Params) -> QuantizedState:
        refuse_quantized(params)
        shapes, params = params, _in_float32(params)
        view = self.view(params)
        check_separate(self.tx, params, view.owners)
        codes: list[Any] = [None] * len(view.owners)
        # One zero for what is not quantised, because Orbax does not save an array
        # without elements. Separate arrays, because none may be donated twice.
        absmax: list[Any] = [jnp.zeros((1,), jnp.float32) for _ in view.owners]
        for i in view.turns():
            # Under jit, XLA would otherwise encode these constants while it compiles,
            # which takes 10 s at 2^20 elements.
            state = jax.lax.optimization_barrier(self.tx.init(view.only(params, i)))
            state = view.flatten(state)
            view.encode(i, state, codes, absmax)
        state = QuantizedState(view.unflatten(codes), view.unflatten(absmax))
        return note(self, shapes, state)

    def update(self, updates, state, params=None, **extra_args):
        results = list(jax.tree.leaves(updates))
        updates, params = _in_float32((updates, params))
        view = self.view(updates if params is None else params, state)
        old, old_absmax = view.flatten(state.codes), view.flatten(state.absmax)
        codes, absmax = list(old), list(old_absmax)
        before = None
        for i in view.turns():
            param = None if params is None else view.only(params, i)
            args = view.seen(i, old), view.seen(i, old_absmax), view.only(updates, i)
            turn = functools.partial(self._turn, view, i, extra_args)
            if view.streams(i, updates):
                turn = functools.partial(_after, before, turn)
            result, new, new_absmax = turn(*args, param)
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
        """The view of the state of these parameters.

        Args:
            params: parameters or their shapes, in boxes if any of them declares its
                ``state_bits``.
            state: state that ``init`` returned. It decides what is quantised.
        """
        params = _in_float32(params)
        policies = policies_of(params, self.default, self.rules)
        return _View(self.tx, params, policies, state)

    def describe_state(self, part: Part, positions: Any) -> tuple[Any, list[Place]]:
        view = self.view(part.params)
        codes, absmax = view.flatten(positions.codes), view.flatten(positions.absmax)
        shapes, places = [], []
        rows = zip(view.shapes, view.formats, codes, absmax, strict=True)
        for x, format_, k, a in rows:
            shapes.append(x if format_ is None else float32_shape(x))
            places.append(Place(k) if format_ is None else Place(k, a, format_))
        return view.unflatten(shapes), places


class _View:
    """The state of ``tx`` as a list of arrays, and which parameter each belongs to."""

    def __init__(self, tx, params, policies: list[StatePolicy], state=None):
        self._params_structure = jax.tree.structure(params)
        self._policies = policies
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
                "optax.tree_map_params cannot tell which state of tx belongs to which "
                "parameter, as for optax.sm3 and optax.lbfgs, so it cannot be held in "
                "few bits"
            ) from error
        self._structure = jax.tree.structure(shapes)
        self.shapes = jax.tree.leaves(shapes)
        self.owners = [owner.index for owner in jax.tree.leaves(owners)]
        codes = self.shapes if state is None else self.flatten(state.codes)
        self.formats = [
            self._format(*row, is_stored=state is not None)
            for row in zip(self.shapes, self.owners, codes, strict=True)
        ]

    def turns(self) -> Sequence[int | None]:
        """The parameters, which take turns; a single None where there are none."""
        return range(len(self._policies)) or [None]

    def owned(self, i: int | None) -> list[int]:
        """The positions of the arrays that belong to a parameter."""
        return [k for k, owner in enumerate(self.owners) if owner == i]

    def stored(self, i: int | None) -> list[int]:
        """The positions of the arrays that a turn keeps; the last adds shared ones."""
        last = i is None or i == len(self._policies) - 1
        return self.owned(i) + (self.owned(None) if last and i is not None else [])

    def seen(self, i: int | None, state: list[Any]) -> list[Any]:
        """The list with None in place of what belongs to other parameters."""
        pairs = zip(self.owners, state, strict=True)
        return [x if owner in (None, i) else None for owner, x in pairs]

    def streams(self, i: int | None, updates: Any) -> bool:
        """Whether a turn is compiled and has state to decode."""
        if i is None:
            return False
        update = self._params_structure.flatten_up_to(updates)[i]
        compiled = isinstance(update, jax.core.Tracer) and explicit_spec(update) is None
        return compiled and any(self.formats[k] is not None for k in self.owned(i))

    def only(self, tree: Any, i: int | None) -> Any:
        """A tree like the parameters in which all but one are masked."""
        leaves = self._params_structure.flatten_up_to(tree)
        masked = [x if k == i else optax.MaskedNode() for k, x in enumerate(leaves)]
        return self._params_structure.unflatten(masked)

    def flatten(self, state: Any) -> list[Any]:
        return self._structure.flatten_up_to(state)

    def unflatten(self, leaves: list[Any]) -> Any:
        return self._structure.unflatten(leaves)

    def _format(self, shape, owner, codes, is_stored: bool) -> StateFormat | None:
        """The format of an array; None for one that stays as ``tx`` has it.

        ``init`` decides, and steps go by the dtype of what is stored.
        """
        if owner is None:
            return None
        policy = self._policies[owner]
        is_quantized = policy.quantizes(shape)
        if is_stored:
            is_quantized = codes.dtype != shape.dtype
        if not is_quantized:
            return None
        format_ = policy.format()
        want = format_.codes_shape(shape.shape), format_.codes_dtype
        if is_stored and (codes.shape, codes.dtype) != want:
            raise ValueError(
                f"the state has codes {codes.dtype}{codes.shape} where state_bits is "
                f"{policy.state_bits!r}. Was it made with other state_bits or rules?"
            )
        return format_

    def decode(self, i: int | None, codes: list[Any], absmax: list[Any]) -> list[Any]:
        """The state that the inner transformation sees in a parameter's turn."""
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
        """Stores a parameter's new state; in the last turn, also what is shared."""
        for k in self.stored(i):
            format_ = self.formats[k]
            if format_ is None:
                codes[k] = state[k]
            else:
                codes[k], absmax[k] = format_.encode(state[k].astype(jnp.float32))


def _after(before, turn, codes, absmax, updates, params):
    """Computes a turn only after the update ``before`` of another one.

    Otherwise XLA keeps several parameters' decoded states in memory: for a CPU, which
    it schedules breadth first, those of all; for a GPU those of some. For a GPU, a
    barrier is enough. For a CPU, the turn becomes a branch of a conditional, which is
    computed as a whole. That branch is always taken, on a predicate that needs the
    other update.
    """
    args = codes, absmax, updates, params
    turn = jax.jit(turn)  # Traced once for all that follows.
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
        before[(0,) * before.ndim], *args, cpu=on_cpu, default=elsewhere
    )


def _in_float32(tree: Any) -> Any:
    """Widens 16-bit floats, which have no room for the square of a gradient."""

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
    """Puts NaN in the update of an element that is not finite, and keeps its old state.

    Also where only the square of the gradient is not finite: a first moment would take
    that gradient to its block, while the second moment keeps its old value.
    """
    floating = [k for k in owned if jnp.issubdtype(new[k].dtype, jnp.floating)]
    bad = ~jnp.isfinite(grad * grad)
    for k in floating:
        if new[k].shape == grad.shape:
            bad |= ~jnp.isfinite(new[k])
    new = list(new)
    for k in floating:
        # A mean over rows or columns does not belong to an element.
        same = new[k].shape == grad.shape
        kept = bad if same else ~jnp.isfinite(new[k])
        new[k] = jnp.where(kept, old[k], new[k])
    return jnp.where(bad, jnp.nan, update).astype(update.dtype), new
