"""Functions in jnp, as Mosaic GPU kernels compute them on arrays in registers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxbnb_kernels._mosaic_gpu.instructions import elementwise

_CALLS = ("jit", "pjit")


def in_registers(fn: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """``fn`` of scalars and of float32 arrays in that layout.

    Pallas has no square root before jax 0.12, and never asks whether numbers are
    finite. Its quotients take seven instructions; here an array is divided by an array
    in two. A root is off by 2^-23 of it at most, a quotient by 2^-22, and a radicand or
    a divisor below 2^-126 counts as zero, a divisor beyond 2^126 as infinite.
    """

    def sqrt(x, **_):
        return elementwise("sqrt.approx.ftz.f32 $0, $1;", x, layout)

    def div(x, y, **_):
        if y.ndim == 0:
            return x / y
        inverse = elementwise("rcp.approx.ftz.f32 $0, $1;", y, layout)
        return x * inverse

    instead = {
        "sqrt": sqrt,
        "div": div,
        "is_finite": lambda x, **_: jnp.abs(x) < jnp.inf,
    }

    def call(*args):
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = evaluate(jaxpr, jax.tree.leaves(args), instead)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call


def evaluate(
    jaxpr: ClosedJaxpr, args: Sequence[Any], instead: dict[str, Callable[..., Any]]
) -> list[Any]:
    """What ``jaxpr`` returns, with other functions for the primitives of some names."""
    values: dict[Any, Any] = dict(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            outputs = evaluate(equation.params["jaxpr"], inputs, instead)
        elif name in instead:
            outputs = [instead[name](*inputs, **equation.params)]
        else:
            # All others that kernels take have one result.
            outputs = [equation.primitive.bind(*inputs, **equation.params)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]
