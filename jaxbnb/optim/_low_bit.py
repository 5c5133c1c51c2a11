"""An Optax transformation made of an elementwise rule and its moments in 8 bits."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
import optax

from jaxbnb.optim._arguments import check_arguments, names_arguments
from jaxbnb.optim._owners import made
from jaxbnb.optim._quantize_state import quantize_state
from jaxbnb.optim.state import Policy, map_leaves
from jaxbnb_kernels.update_8bit import Rule

_Make = TypeVar("_Make", bound=Callable[..., Any])


class Storage(TypedDict, total=False):
    """How an optimizer holds its moments: arguments that all of them take.

    Attributes:
        state_bits: 8, or 4 or "fp8" (see `quantize_state`), or 32: Optax's own.
        block_size: the largest number of elements that share an absmax: 256, or 128 in
            4 bits. A block runs along the last axis, or over several whole rows where
            that is short.
        min_quantized_size: parameters with fewer elements keep float32 moments: 4096.
    """

    state_bits: Literal[4, 8, 32, "fp8"] | None
    block_size: int | None
    min_quantized_size: int | None


@dataclasses.dataclass(frozen=True)
class MomentSpec:
    """A moment of every parameter.

    Attributes:
        name: its field in the state; its absmax are in ``<name>_absmax``.
        signed: whether it can be negative.
        initial: what it is before the first step; not negative.
    """

    name: str
    signed: bool
    initial: jax.typing.ArrayLike = 0.0


@dataclasses.dataclass(frozen=True)
class LowBit:
    """``init`` and ``update`` of such a transformation, and ``step``.

    Attributes:
        state_type: a NamedTuple of ``count`` and two fields for each moment.
        moments: in the order of the rule's.
        rule: what happens to an element.
        scalars: ``scalars(count)`` for the rule, float32; the first count is 1.
        policy: which parameters' moments are quantised, and how.
        in_32_bits: Optax's own, whose state has the moments under the same names.
    """

    state_type: Callable[..., Any]
    moments: tuple[MomentSpec, ...]
    rule: Rule
    scalars: Callable[[jax.Array], dict[str, jax.Array]]
    policy: Policy
    in_32_bits: optax.GradientTransformation

    def init(self, params: optax.Params) -> Any:
        state: dict[str, Any] = {"count": jnp.zeros((), jnp.int32)}
        for m in self.moments:
            codes, absmax = self.policy.init(params, m.signed, m.initial)
            state |= {m.name: codes, f"{m.name}_absmax": absmax}
        return made(self, params, self.state_type(**state))

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        return self._map(self.rule, {}, updates, state)

    def step(
        self,
        finish: Callable[..., jax.Array],
        scalars: dict[str, Any],
        decay: Any,
        grads: optax.Updates,
        state: Any,
        params: optax.Params,
    ) -> tuple[optax.Params, Any]:
        """The new parameters instead of updates.

        Args:
            finish: of the rule.
            scalars: more of them, for ``finish``.
            decay: a tree like ``params`` of the scalar ``weight_decay``, or None.
            grads: of the parameters.
            state: as ``init`` made it.
            params: the parameters.
        """
        rule = dataclasses.replace(self.rule, finish=finish)
        trees = (params,) if decay is None else (params, decay)
        return self._map(rule, scalars, grads, state, *trees)

    def _map(self, rule, more_scalars, grads, state, params=None, decay=None):
        count = jnp.asarray(optax.safe_increment(state.count))
        scalars = self.scalars(count) | more_scalars
        fields = [m.name for m in self.moments]
        fields += [f"{m.name}_absmax" for m in self.moments]
        trees = [getattr(state, field) for field in fields]
        trees += [tree for tree in (params, decay) if tree is not None]
        num = len(self.moments)

        def leaf(grad, *rest):
            moments = [
                (rest[i], rest[num + i], m.signed) for i, m in enumerate(self.moments)
            ]
            param, *weight_decay = (*rest[2 * num :], None)[:2]
            s = scalars
            if decay is not None:
                s = scalars | {"weight_decay": weight_decay[0]}
            return self.policy.update(rule, s, grad, moments, param)

        result, *new = map_leaves(leaf, 1 + 2 * num, grads, *trees)
        return result, self.state_type(
            count=count, **dict(zip(fields, new, strict=True))
        )


def takes_storage(make: _Make) -> _Make:
    """Shows the arguments of `Storage` in the signature of an optimizer.

    ``optax.inject_hyperparams`` goes by the signature, and leaves alone what is None.
    An argument outside the signature is an error that says what to give instead.
    """
    signature = inspect.signature(make)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in Storage.__annotations__
    ]
    make.__signature__ = signature.replace(parameters=named)
    return names_arguments(make)


def given(storage: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    for name in Storage.__annotations__:
        if isinstance(storage.get(name), jax.Array):
            raise TypeError(
                f"{name} decides the shapes of the state and so cannot be an array; "
                f"under optax.inject_hyperparams give static_args={name!r}"
            )
    return {name: value for name, value in storage.items() if value is not None}


def low_bit(
    state_type: Callable[..., Any],
    moments: tuple[MomentSpec, ...],
    rule: Rule,
    scalars: Callable[[jax.Array], dict[str, jax.Array]],
    in_32_bits: optax.GradientTransformation,
    **storage: Unpack[Storage],
) -> optax.GradientTransformation:
    """The transformation of a `LowBit`, or what ``state_bits`` asks for instead."""
    chosen: dict[str, Any] = {"state_bits": 8} | given(storage)
    if chosen["state_bits"] != 8:
        return quantize_state(in_32_bits, **chosen)
    del chosen["state_bits"]
    tx = LowBit(state_type, moments, rule, scalars, Policy(**chosen), in_32_bits)
    return optax.GradientTransformation(tx.init, tx.update)


def stored_as(make: _Make, name: str, state_bits: Literal[4, "fp8"]) -> _Make:
    """The function that makes the same optimizer with other ``state_bits``."""

    @functools.wraps(make)
    def make_stored(*args, **storage):
        check_arguments(make, storage, name=name)
        return make(*args, **({"state_bits": state_bits} | given(storage)))

    base = make.__name__
    how, most, paper = {
        4: ("4 bits, in blocks of 128", 1.1, _PAPER_4_BIT),
        "fp8": ("float8_e4m3fn", 2.1, _PAPER_FP8),
    }[state_bits]
    make_stored.__name__ = make_stored.__qualname__ = name
    make_stored.__doc__ = f"""`{base}` with its moments in {how}.

    The same as ``{base}(..., state_bits={state_bits!r})``; see `quantize_state`.

    Returns:
        An ``optax.GradientTransformation`` with a `QuantizedState`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> params = jnp.ones((256, 256))
        >>> state = jax.eval_shape(jaxbnb.optim.{name}(1e-3).init, params)
        >>> jaxbnb.core.tree_nbytes(state) / params.size < {most}
        True

    References:
        {paper}
    """
    return cast(_Make, make_stored)


_PAPER_4_BIT = "Li et al., Memory Efficient Optimizers with 4-bit States, 2023."
_PAPER_FP8 = "Micikevicius et al., FP8 Formats for Deep Learning, 2022."


def as_float32(**scalars: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Scalars as a rule takes them, by name."""
    return {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}
