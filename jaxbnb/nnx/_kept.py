"""Results that a backward pass keeps, in layers that it computes again otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Final

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# The name of such results, for policies of jax.checkpoint.
PRODUCT: Final = "jaxbnb_product"
_is_keeping = contextvars.ContextVar("is_keeping", default=False)


@contextlib.contextmanager
def keeping_products(yes: bool) -> Iterator[None]:
    """Says whether `keep_product` marks results; a stack says so for its own layers."""
    before = _is_keeping.set(yes)
    try:
        yield
    finally:
        _is_keeping.reset(before)


def keep_product(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Marks a result that ``Remat(products=True)`` keeps; returns it unchanged.

    The layers of `jaxbnb.models` mark the results of their linear layers, except those
    of experts. Call this in a layer of your own in a `LayerStack`; elsewhere it does
    nothing.

    Args:
        y: result that would take long to compute again.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.nnx import LayerStack, Remat, keep_product
        >>> stack = LayerStack(
        ...     lambda rngs: nnx.Linear(8, 8, rngs=rngs), 12, rngs=nnx.Rngs(0))
        >>> def apply(layer, x, index):
        ...     return jnp.tanh(keep_product(layer(x)))
        >>> stack(apply, jnp.ones((2, 8)), remat=Remat(products=True)).shape
        (2, 8)
    """
    return _mark(y) if _is_keeping.get() else y


def _name(y: Array) -> Array:
    if y.dtype.itemsize != 2:
        return checkpoint_name(y, PRODUCT)
    # XLA on a CPU has no operations on 16-bit floats: to put one layer's results into
    # an array of all, it converts them to float32 and back.
    bits = jax.lax.bitcast_convert_type(y, jnp.uint16)
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, PRODUCT), y.dtype)


_mark = jax.custom_jvp(_name)


@_mark.defjvp
def _mark_jvp(primals, tangents):
    # The name must be in sight of the policy, not within a function of its own. So the
    # bits, which are integers, would end a second derivative: see below.
    return _name(*primals), tangents[0]


@jax.custom_vjp
def differentiated_once(x: Array) -> Array:
    """Returns ``x``; where the loss is not linear, a second derivative is an error."""
    return x


@jax.custom_jvp
def _cotangent(dx: Array) -> Array:
    return dx


@_cotangent.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "Remat(products=True) has no second derivative in 16 bits; use remat=True"
    )


differentiated_once.defvjp(lambda x: (x, None), lambda _, dx: (_cotangent(dx),))
