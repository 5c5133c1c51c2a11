"""Optimizers that step by an elementwise rule, with their moments in 8 bits."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxbnb.optim._arguments import MaskOrFn, Storage, chosen_storage
from jaxbnb.optim._quantize_state import quantize_state
from jaxbnb.optim._sharding import explicit_spec, on_shards, uncut_spec
from jaxbnb.optim._transformation import Definition, Part, definition_of, note
from jaxbnb.optim.rules import flatten_with_paths, refuse_quantized
from jaxbnb.optim.state_format import StatePolicy, policies_of
from jaxbnb.optim.state_layout import Place, float32_shape
from jaxbnb_kernels.update_8bit import Moment, Rule, update_8bit

Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MomentSpec:
    """A moment of every parameter.

    Attributes:
        name: its field in the state. Its absmax are in ``<name>_absmax``.
        signed: whether it can be negative.
        initial: value before the first step; must not be negative.
    """

    name: str
    signed: bool
    initial: jax.typing.ArrayLike = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise(Definition):
    """An elementwise rule and its moments. Its step is a single pass over a parameter.

    Attributes:
        state_type: NamedTuple of ``count`` and two fields for each moment.
        moments: moments, in the order of the rule's.
        rule: functions of one element.
        scalars: function of the count, 1 in the first step, that returns the rule's.
        policy: which parameters' moments are quantised, and how.
        in_32_bits: Optax's own transformation, with moments of the same names.
    """

    state_type: Callable[..., Any]
    moments: tuple[MomentSpec, ...]
    rule: Rule
    scalars: Callable[[jax.Array], Scalars]
    policy: StatePolicy
    in_32_bits: optax.GradientTransformation

    def init(self, params: optax.Params) -> Any:
        refuse_quantized(params)
        paths, leaves, structure = flatten_with_paths(params)
        for path, p in zip(paths, leaves, strict=True):
            _check_floating(path, p)
        policies = policies_of(params, self.policy)
        state: dict[str, Any] = {"count": jnp.zeros((), jnp.int32)}
        for m in self.moments:
            pairs = [
                policy.format_for(p, m.signed).full(p, m.initial)
                for p, policy in zip(leaves, policies, strict=True)
            ]
            state[m.name] = structure.unflatten([codes for codes, _ in pairs])
            absmax = structure.unflatten([absmax for _, absmax in pairs])
            state[f"{m.name}_absmax"] = absmax
        return note(self, params, self.state_type(**state))

    def update(self, updates, state, params=None, **extra_args):
        del params, extra_args
        return self.step(updates, state)

    def step(
        self,
        grads: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        finish: Callable[..., jax.Array] | None = None,
        scalars: Scalars | None = None,
        decay: Any = None,
    ) -> tuple[Any, Any]:
        """Updates, or new parameters, and the new state.

        Args:
            grads: gradients of the parameters.
            state: state as ``init`` made it.
            params: parameters, for a step that writes them.
            finish: function of scalars, update and parameter; see `Rule`.
            scalars: more scalars, for ``finish``.
            decay: tree like ``params`` with the scalar ``weight_decay`` of each leaf.
        """
        rule = dataclasses.replace(self.rule, finish=finish)
        count = jnp.asarray(optax.safe_increment(state.count))
        shared = self.scalars(count) | (scalars or {})
        leaves, structure = jax.tree.flatten(grads)

        def flatten(tree) -> list[Any]:
            nothing = [None] * len(leaves)
            return nothing if tree is None else structure.flatten_up_to(tree)

        def moments_of(m):
            codes, absmax = getattr(state, m.name), getattr(state, f"{m.name}_absmax")
            pairs = zip(flatten(codes), flatten(absmax), strict=True)
            return [Moment(codes, absmax, m.signed) for codes, absmax in pairs]

        results, stepped = [], []
        columns = map(moments_of, self.moments)
        for grad, param, weight_decay, *moments in zip(
            leaves, flatten(params), flatten(decay), *columns, strict=True
        ):
            own = {} if weight_decay is None else {"weight_decay": weight_decay}
            result, moments = self._step_leaf(rule, shared | own, grad, moments, param)
            results.append(result)
            stepped.append(moments)
        fields = {"count": count}
        for k, m in enumerate(self.moments):
            codes = structure.unflatten([moments[k].codes for moments in stepped])
            absmax = structure.unflatten([moments[k].absmax for moments in stepped])
            fields |= {m.name: codes, f"{m.name}_absmax": absmax}
        return structure.unflatten(results), self.state_type(**fields)

    def _step_leaf(
        self, rule: Rule, scalars: Scalars, grad: Any, moments: list[Moment], param: Any
    ) -> tuple[jax.Array, Sequence[Moment]]:
        """One step of a leaf.

        ``init`` decided whether it is quantised, and steps go by the dtype of codes.

        Returns:
            The update in the dtype of ``grad``, or the new parameter in its own, and
            the new moments.
        """
        if holds_codes(moments[0].codes):
            block_size = self.policy.format().block_size
            step = functools.partial(update_8bit, rule, block_size=block_size)
            spec = explicit_spec(grad)
            if spec is not None:
                step = _on_shards(step, grad.shape, spec, block_size)
            return step(scalars, grad, tuple(moments), param)
        values = tuple(m.codes for m in moments)
        for value in values:
            if (value.shape, value.dtype) != (grad.shape, jnp.float32):
                raise ValueError(
                    f"a gradient of shape {grad.shape} has float32 moments of that "
                    f"shape; the state has {value.dtype} of shape {value.shape}. Was "
                    "it made for another parameter or block_size?"
                )
        grad32 = grad.astype(jnp.float32)
        if param is None:
            result, kept = rule.apply(scalars, grad32, values)
        else:
            param32 = param.astype(jnp.float32)
            result, kept = rule.apply_to(scalars, grad32, values, param32)
        pairs = zip(moments, kept, strict=True)
        new = [dataclasses.replace(m, codes=values) for m, values in pairs]
        return result.astype((grad if param is None else param).dtype), new

    def describe_state(self, part: Part, positions: Any) -> tuple[Any, list[Place]]:
        wide: Any = jax.eval_shape(self.in_32_bits.init, part.params)
        signed = {m.name: m.signed for m in self.moments}
        fields, places = {}, []
        for name in wide._fields:
            if name not in signed:
                # Optax's AdEMAMix counts twice.
                fields[name] = getattr(wide, name)
                places.append(Place(positions.count, is_copy=name != "count"))
                continue
            shapes, structure = jax.tree.flatten(getattr(part.shapes, name))
            codes = jax.tree.leaves(getattr(positions, name))
            absmax = jax.tree.leaves(getattr(positions, f"{name}_absmax"))
            format_ = self.policy.format(signed[name])
            for x, k, a in zip(shapes, codes, absmax, strict=True):
                place = Place(k, dtype=jnp.float32, count=positions.count)
                if holds_codes(x):
                    place = Place(k, a, format_, count=positions.count)
                places.append(place)
            fields[name] = structure.unflatten([float32_shape(x) for x in shapes])
        return type(wide)(**fields), places


def elementwise(
    state_type: Callable[..., Any],
    moments: tuple[MomentSpec, ...],
    rule: Rule,
    scalars: Callable[[jax.Array], Scalars],
    in_32_bits: optax.GradientTransformation,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    """An `Elementwise` transformation, or what ``state_bits`` asks for instead."""
    settings: dict[str, Any] = {"state_bits": 8} | chosen_storage(storage)
    if settings["state_bits"] != 8:
        return quantize_state(in_32_bits, **settings)
    policy = StatePolicy(**settings)
    definition = Elementwise(state_type, moments, rule, scalars, policy, in_32_bits)
    return definition.transformation()


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer(Definition):
    """A chain like ``optax.adamw``: a rescaled gradient, decay and learning rate.

    Attributes:
        scale: first transformation of the chain.
        learning_rate: fixed value or schedule.
        weight_decay: fixed value or schedule; None for a chain without decay.
        mask: which parameters decay.
    """

    scale: optax.GradientTransformation
    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule | None = None
    mask: MaskOrFn = None

    @functools.cached_property
    def chain(self) -> optax.GradientTransformationExtraArgs:
        decay = []
        if self.weight_decay is not None:
            decay = [optax.add_decayed_weights(self.weight_decay, self.mask)]
        rate = optax.scale_by_learning_rate(self.learning_rate)
        return optax.chain(self.scale, *decay, rate)

    def init(self, params: optax.Params) -> Any:
        return self.chain.init(params)

    def update(self, updates, state, params=None, **extra_args):
        return self.chain.update(updates, state, params, **extra_args)

    def fused_step(self, grads, state, params):
        """New parameters and state. A float32 parameter gets the bits of ``update``."""
        rule = definition_of(self.scale)
        if not isinstance(rule, Elementwise):
            return super().fused_step(grads, state, params)
        first, *rest = tuple(state)
        decay = None
        if self.weight_decay is not None:
            decay = self._decay(rest[0], params)
        rate = as_float32(learning_rate=_value(self.learning_rate, rest[-1]))
        new_params, first = rule.step(grads, first, params, _finish, rate, decay)
        # Only for the counts of schedules. XLA removes the rest as nothing reads it.
        after: Any = self.chain.update(grads, state, params)[1]
        return new_params, (first, *after[1:])

    def _decay(self, state, params) -> Any:
        """A scalar for each parameter."""
        value = _value(self.weight_decay, getattr(state, "inner_state", state))
        mask = self.mask(params) if callable(self.mask) else self.mask

        def leaf(decays, subtree):
            scalar = jnp.asarray(value if decays else 0.0, jnp.float32)
            return jax.tree.map(lambda _: scalar, subtree)

        return jax.tree.map(leaf, True if mask is None else mask, params)


def optimizer(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an `Optimizer`."""
    return Optimizer(scale, learning_rate, weight_decay, mask).transformation()


def as_float32(**scalars: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Scalars as a rule takes them, by name."""
    return {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}


def holds_codes(moment: Any) -> bool:
    """Whether a moment is quantised."""
    return moment.dtype == jnp.uint8


def _value(fixed_or_schedule: Any, state: Any) -> Any:
    if callable(fixed_or_schedule):
        return fixed_or_schedule(state.count)
    return fixed_or_schedule


def _finish(scalars, update, param):
    if "weight_decay" in scalars:
        update = update + scalars["weight_decay"] * param
    return -scalars["learning_rate"] * update


def _on_shards(step, shape, spec: Any, block_size: int):
    """A step in which each device computes its own blocks."""
    blocks: Any = uncut_spec(shape, spec, block_size)

    def call(scalars, grad, moments, param):
        inside = tuple(Moment(blocks, blocks, m.signed) for m in moments)
        outside = tuple(Moment(spec, blocks, m.signed) for m in moments)
        return on_shards(
            step,
            (PartitionSpec(), blocks, inside, blocks),
            (blocks, inside),
            (spec, outside),
        )(scalars, grad, moments, param)

    return call


def _check_floating(path: str, p: Any) -> None:
    if jnp.issubdtype(p.dtype, jnp.floating):
        return
    is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
    raise TypeError(
        f"8-bit optimizers need floating parameters; for {path!r} got {p.dtype} of "
        f"shape {p.shape}. "
        + (
            "Wrap the optimizer: optax.contrib.split_real_and_imaginary(tx)"
            if is_complex
            else "Leave it out: optax.masked, optax.partition"
        )
    )
