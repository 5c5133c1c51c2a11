"""The same optimizer under another name: paged, or with other ``state_bits``."""

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import optax

from jaxbnb.optim._arguments import check_arguments, chosen_storage
from jaxbnb.optim._paged import paged

_P = ParamSpec("_P")
_Make = TypeVar("_Make", bound=Callable[..., Any])

_PAPER_4_BIT = "Li et al., Memory Efficient Optimizers with 4-bit States, 2023."
_PAPER_FP8 = "Micikevicius et al., FP8 Formats for Deep Learning, 2022."


def paged_form(
    make: Callable[_P, optax.GradientTransformation],
) -> Callable[_P, optax.GradientTransformationExtraArgs]:
    """The function that makes the same optimizer `paged`."""
    name = make.__name__
    doc = f"""`{name}` with its state in host memory; see `paged`.

    Takes the arguments of `{name}`.

    Returns:
        An ``optax.GradientTransformation``, to be used outermost.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> state = jaxbnb.optim.paged_{name}(1e-3).init(jnp.ones((64, 64)))
        >>> {{x.sharding.memory_kind for x in jax.tree.leaves(state)}}
        {{'pinned_host'}}
    """

    def make_paged(*args: _P.args, **kwargs: _P.kwargs):
        return paged(make(*args, **kwargs))

    return _form(make, f"paged_{name}", doc, make_paged)


def stored_as(make: _Make, name: str, state_bits: Literal[4, "fp8"]) -> _Make:
    """The function that makes the same optimizer with other ``state_bits``."""
    base = make.__name__
    how, most, paper = {
        4: ("4 bits, in blocks of 128", 1.1, _PAPER_4_BIT),
        "fp8": ("float8_e4m3fn", 2.1, _PAPER_FP8),
    }[state_bits]
    doc = f"""`{base}` with its moments in {how}.

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

    def make_stored(*args: Any, **kwargs: Any):
        return make(*args, **({"state_bits": state_bits} | chosen_storage(kwargs)))

    return _form(make, name, doc, make_stored)


def _form(make: Any, name: str, doc: str, function: Any) -> Any:
    """A function with the signature of another, but a name and docstring of its own."""

    @functools.wraps(make)
    def form(*args, **kwargs):
        check_arguments(make, kwargs, name=name)
        return function(*args, **kwargs)

    form.__name__ = form.__qualname__ = name
    form.__doc__ = doc
    return form
