"""Compiling programs that run a whole model."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

_Function = Callable[..., Any]


def compiler_options(arguments: Any) -> dict[str, str | bool] | None:
    """Returns options of XLA for a program; None for XLA's own.

    XLA on a CPU takes one layer of a stack of 16-bit floats by way of float32. Before
    jax 0.12, it moved that conversion out of the loop over layers, and so held all of
    them in float32, too.

    Args:
        arguments: arrays or shapes that the program takes, in any pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> compiler_options(jnp.ones(3)) is None
        True
    """
    if jax.__version_info__ >= (0, 12) or jax.default_backend() != "cpu":
        return None
    if not any(map(_is_narrow, jax.tree.leaves(arguments))):
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def jit_model(**options: Any) -> Callable[[_Function], _Function]:
    """Returns a decorator: ``jax.jit`` with `compiler_options`.

    Args:
        **options: further arguments of ``jax.jit``.

    Example:
        >>> import jax.numpy as jnp
        >>> double = jit_model(static_argnums=1)(lambda x, number: x * number)
        >>> int(double(jnp.int32(3), 2))
        6
    """

    def decorate(function: _Function) -> _Function:
        jitted = functools.partial(jax.jit, function, **options)
        usual, other = jitted(), None

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal other
            found = compiler_options(arguments)
            if found is None or _is_traced(arguments):
                return usual(*arguments)
            other = other or jitted(compiler_options=found)
            return other(*arguments)

        return call

    return decorate


def _is_narrow(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return False
    return dtype.itemsize == 2


def _is_traced(arguments: Any) -> bool:
    """Whether this is a part of another program, which has its own options."""
    leaves = (*jax.tree.leaves(arguments), jnp.zeros(()))
    return any(isinstance(x, jax.core.Tracer) for x in leaves)
