import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.lora._order import gradients_together

ARRAYS = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.eye(4)[:, :2], jnp.ones((2, 5))


def alone(x, a, b):
    return jnp.sum(jnp.sin(x @ a @ b))


def together(x, a, b):
    return alone(*gradients_together(x, a, b))


# Those of the input, or of one factor, may not be asked for.
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1, 2), (2,)])
def test_one_barrier_of_the_gradients_that_are_asked_for(wanted):
    gradient = jax.grad(together, wanted)
    equations = jax.make_jaxpr(gradient)(*ARRAYS).jaxpr.eqns
    (barrier,) = (e for e in equations if e.primitive.name == "optimization_barrier")
    assert len(barrier.outvars) == len(wanted)
    check(jax.jit(jax.checkpoint(gradient)), jax.grad(alone, wanted), ARRAYS)


def check(fn, expected, args):
    """The same numbers, of sums of up to five terms in any order: 8 ulps."""
    for one, other in zip(fn(*args), expected(*args), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_forward_mode_and_mapped():
    check(
        lambda *args: jax.jvp(together, args, args),
        lambda *args: jax.jvp(alone, args, args),
        ARRAYS,
    )
    x, a, b = ARRAYS
    mapped = jax.vmap(jax.grad(together, (0, 1)), (0, None, None))
    expected = jax.vmap(jax.grad(alone, (0, 1)), (0, None, None))
    check(mapped, expected, (x[None], a, b))
