"""Functions in jnp, computed by Mosaic GPU kernels on arrays in registers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxbnb_kernels._mosaic_gpu.instructions import elementwise

_CALLS = ("jit", "pjit")


def in_registers(fn: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """Returns ``fn`` for scalars and for float32 arrays in that layout.

    Pallas has square roots only from jax 0.12 on, and it does not have ``isfinite``.
    Its quotients take seven instructions. Here a quotient of arrays takes two. The
    relative error of a root is at most 2^-23, and that of a quotient 2^-22. A radicand
    or a divisor below 2^-126 counts as zero, and a divisor beyond 2^126 as infinite.
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
    """Evaluates ``jaxpr``, with ``instead`` in place of the primitives it names."""
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
            # All other primitives in kernels have one result.
            outputs = [equation.primitive.bind(*inputs, **equation.params)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]
