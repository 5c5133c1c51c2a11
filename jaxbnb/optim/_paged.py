"""Optimizer state in host memory."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxbnb.optim._transformation import (
    Definition,
    choose,
    definition_of,
    fused_step,
)


def paged(
    tx: optax.GradientTransformation, device_budget: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of ``tx`` in pinned host memory and brings it in for each step.

    Each array moves separately, so XLA may overlap the transfer of one with the step of
    another. This must be the outermost wrapper: ``paged(optax.MultiSteps(tx, 4))``, not
    the reverse, because the branches of a conditional may not differ in where their
    results live. JAX raises a TypeError there. `fused_step` works with it.

    Floating arrays lie on the host as their bits, integers of the same width. JAX
    matches donated buffers with outputs by shape and dtype alone, and a parameter that
    got a moment's buffer on the host would end the process. With integers there,
    anything may be donated.

    The state is on the host of its parameters' devices. On a mesh, each device pages
    its own part, so put the parameters on the mesh before ``init``. The state of
    parameters on one device stays bound to that device, and JAX refuses a step with
    gradients on several.

    Args:
        tx: any Optax transformation.
        device_budget: bytes of state that may stay on the device. The largest arrays go
            to the host first, until the rest fits. None: all go.

    Returns:
        The same transformation, with its state in memory of kind ``pinned_host``.
        `unpage` returns that state as ``tx`` knows it.

    Raises:
        ValueError: ``device_budget`` is negative.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> state = jaxbnb.optim.paged(optax.adam(1e-3)).init(jnp.ones(4))
        >>> state[0].mu.sharding.memory_kind, state[0].mu.dtype.name
        ('pinned_host', 'uint32')
        >>> tx = jaxbnb.optim.paged(optax.adam(1e-3), device_budget=1024)
        >>> state = tx.init({"small": jnp.ones(4), "large": jnp.ones((64, 64))})
        >>> [state[0].mu[k].sharding.memory_kind for k in ("small", "large")]
        ['device', 'pinned_host']
    """
    if device_budget is not None and device_budget < 0:
        raise ValueError(f"device_budget must be at least 0 bytes; got {device_budget}")
    tx = optax.with_extra_args_support(tx)
    return Paged(tx, device_budget).transformation()


@dataclasses.dataclass(frozen=True, eq=False)
class Paged(Definition):
    """What `paged` does.

    Attributes:
        tx: transformation that it wraps.
        device_budget: bytes of state that may stay on the device; None for none.
    """

    tx: optax.GradientTransformationExtraArgs
    device_budget: int | None

    def init(self, params: optax.Params) -> Any:
        return self.page_out(self.tx.init(params), params)

    def update(self, updates, state, params=None, **extra_args):
        state = self.page_in(state, updates if params is None else params)
        updates, state = self.tx.update(updates, state, params, **extra_args)
        return updates, self._page_out(state, functools.partial(_host_of, None))

    def fused_step(self, grads, state, params):
        state = self.page_in(state, params)
        params, state = fused_step(self.tx)(grads, state, params)
        return params, self._page_out(state, functools.partial(_host_of, None))

    def conditional_step(self, is_taken, grads, state, params):
        state = self.page_in(state, params)
        new_params, new_state = fused_step(self.tx)(grads, state, params)
        chosen = choose(is_taken, (new_params, new_state), (params, state))
        new_params, new_state = chosen
        return new_params, self._page_out(new_state, functools.partial(_host_of, None))

    def page_out(self, state: Any, params: optax.Params) -> Any:
        """Moves a state of the inner transformation to the host."""
        return self._page_out(state, functools.partial(_host_of, _home(params)))

    def _page_out(self, state: Any, host_of: Callable[[Any], Any]) -> Any:
        leaves, structure = jax.tree.flatten(state)
        for k in self._on_host(leaves):
            x, host = leaves[k], host_of(leaves[k])
            bits = _BITS.get(x.dtype.name)
            if bits is not None:
                x = jax.lax.bitcast_convert_type(x, bits)
            leaves[k] = jax.device_put(x, host)
        return structure.unflatten(leaves)

    def page_in(self, state: Any, params: optax.Params) -> Any:
        """Moves a state back to the device, as the inner transformation knows it."""
        leaves, structure = jax.tree.flatten(state)
        inner = jax.tree.leaves(jax.eval_shape(self.tx.init, params))
        for k in self._on_host(leaves):
            leaves[k] = jax.device_put(leaves[k], jax.memory.Space.Device)
            # The dtypes differ where a parameter declared that its state has 32 bits.
            floating = jnp.issubdtype(inner[k].dtype, jnp.floating)
            if floating or leaves[k].dtype != inner[k].dtype:
                dtype: Any = _FLOATS.get(leaves[k].dtype.name, leaves[k].dtype)
                leaves[k] = jax.lax.bitcast_convert_type(leaves[k], dtype)
        return structure.unflatten(leaves)

    def _on_host(self, leaves: list[Any]) -> list[int]:
        """The arrays that go to the host: the largest, and the first of equals."""
        sizes = [math.prod(x.shape) * x.dtype.itemsize for x in leaves]
        order = sorted(range(len(leaves)), key=lambda k: -sizes[k])
        if self.device_budget is None:
            return order
        left = sum(sizes) - np.cumsum([0, *(sizes[k] for k in order)])
        return order[: int(np.argmax(left <= self.device_budget))]


def unpage(
    tx: optax.GradientTransformation, state: Any, params: optax.Params
) -> optax.OptState:
    """The state of a `paged` transformation as the one inside knows it, on the device.

    Args:
        tx: transformation that `paged` or a ``paged_`` optimizer returned.
        state: its state.
        params: the parameters.

    Returns:
        The state, with its floating arrays as floats again.

    Raises:
        ValueError: ``tx`` is not paged.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> tx = jaxbnb.optim.paged(optax.adam(1e-3))
        >>> params = jnp.ones(4)
        >>> jaxbnb.optim.unpage(tx, tx.init(params), params)[0].mu.dtype.name
        'float32'
    """
    definition = definition_of(tx)
    if not isinstance(definition, Paged):
        raise ValueError("unpage needs a paged transformation, as paged() returns it")
    return definition.page_in(state, params)


# All different, so that the dtype alone tells the way back.
_BITS = {
    "float64": jnp.uint64,
    "float32": jnp.uint32,
    "bfloat16": jnp.uint16,
    "float16": jnp.int16,
}
_FLOATS = {jnp.dtype(bits).name: name for name, bits in _BITS.items()}


def _home(params: Any) -> Sharding | None:
    """The devices that parameters are bound to; None if they are traced or free."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    concrete = [x for x in arrays if not isinstance(x, jax.core.Tracer)]
    bound = [x.sharding for x in concrete if x.committed]
    for sharding in bound:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return bound[0] if bound else None


def _host_of(home: Sharding | None, x: jax.Array) -> Any:
    """Where a state array goes: the host of its own devices, if they are home's."""
    if home is None or isinstance(x, jax.core.Tracer):
        return jax.memory.Space.Host
    at_home = x.sharding.device_set == home.device_set
    return (x.sharding if at_home else home).with_memory_kind("pinned_host")
