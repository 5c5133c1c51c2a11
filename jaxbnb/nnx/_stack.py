"""LayerStack: identical layers with stacked variables, which one scan runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxbnb.nnx._kept import PRODUCT, differentiated_once, keeping_products

# The inputs of layers that a backward pass keeps, for policies of jax.checkpoint.
_INPUT = "jaxbnb_layer_input"


@dataclasses.dataclass(frozen=True)
class Remat:
    """Which inputs of layers a backward pass keeps, and where (gradient checkpointing).

    Everything else is computed again. ``remat=True`` is ``Remat()``.

    Attributes:
        every: number of layers for each input that is kept. Above 1, the forward pass
            runs once more: first each group's layers, to get the inputs of its layers,
            then each layer.
        offload: whether the inputs are kept in the memory of the host.
        products: whether the results of linear layers are kept as well, so that only
            what lies between them is computed again; see `keep_product`. With
            ``every``, those of one group of layers are kept at a time. In 16
            bits, a second derivative is then an error.

    Raises:
        ValueError: ``every`` is not a positive int.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.nnx import LayerStack, Remat
        >>> stack = LayerStack(
        ...     lambda rngs: nnx.Linear(8, 8, rngs=rngs), 12, rngs=nnx.Rngs(0))
        >>> stack(lambda layer, x, i: layer(x), jnp.ones((2, 8)),
        ...       remat=Remat(every=4)).shape
        (2, 8)
    """

    every: int = 1
    offload: bool = False
    products: bool = False

    def __post_init__(self):
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every must be a positive int, got {self.every!r}")

    @staticmethod
    def of(*ways: Any) -> "Remat | None":
        """Returns what values of ``remat`` mean: None if all of them keep everything.

        Args:
            *ways: bools, policies of ``jax.checkpoint``, and any `Remat`; the first of
                these decides.

        Example:
            >>> Remat.of(False, True), Remat.of(False)
            (Remat(every=1, offload=False, products=False), None)
        """
        if not any(ways):
            return None
        return next((x for x in ways if isinstance(x, Remat)), Remat())


class LayerStack(nnx.Module):
    """``num_layers`` copies of a layer, with their variables stacked on a leading axis.

    Only one layer is compiled, and with ``remat`` the backward pass keeps only each
    layer's input. `jaxbnb.nnx.quantize_model` and `jaxbnb.lora` treat the stack as one
    layer, in which every variable has a leading axis.

    Attributes:
        layer: module in which every variable has shape ``(num_layers, ...)``.
        num_layers: number of layers.
        remat: True or a `Remat` to recompute each layer in the backward pass, even if a
            call does not say so; or a policy of ``jax.checkpoint_policies``, which says
            what to keep.

    Args:
        make_layer: ``make_layer(rngs)`` makes one layer.
        num_layers: number of layers.
        rngs: random streams, which are split into one for each layer.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> stack = jaxbnb.nnx.LayerStack(
        ...     lambda rngs: nnx.Linear(8, 8, rngs=rngs), 12, rngs=nnx.Rngs(0))
        >>> stack.layer.kernel.shape
        (12, 8, 8)
        >>> stack(lambda layer, x, i: layer(x), jnp.ones((2, 8)), remat=True).shape
        (2, 8)
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        # Variables with named axes get one more axis, without a name, for the layers.
        stack = nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})
        make_layers = nnx.split_rngs(splits=num_layers)(stack)
        self.layer = make_layers(rngs)
        self.num_layers = num_layers
        self.remat: bool | Remat | Callable[..., bool] = False

    def __call__(
        self,
        apply: Callable[[nnx.Module, Any, jax.Array], Any],
        carry: Any,
        *,
        remat: bool | Remat = False,
    ) -> Any:
        """Runs the layers one after the other.

        Args:
            apply: ``apply(layer, carry, index)`` returns the next carry, where
                ``layer`` has the variables of layer ``index``. Assignments to them are
                dropped, except to each ``nnx.Intermediate`` and to the counts of random
                streams, without which every call would use the same dropout.
            carry: input of the first layer, any pytree.
            remat: whether to recompute each layer in the backward pass instead of
                keeping its intermediate values; by the policy in ``self.remat``, if
                there is one. A `Remat` keeps fewer inputs, or keeps them elsewhere.

        Returns:
            The carry after the last layer.

        Raises:
            TypeError: ``remat`` is neither a bool nor a `Remat`.
            ValueError: ``remat`` offloads or keeps products, and ``self.remat`` is a
                policy.
        """
        if not isinstance(remat, bool | Remat):
            raise TypeError(
                "remat must be True, False or a jaxbnb.nnx.Remat; got "
                f"{type(remat).__name__}"
            )
        how = Remat.of(remat, self.remat)
        keeps_products = how is not None and how.products
        graphdef, state = nnx.split(self.layer)
        kept = nnx.Any(nnx.Intermediate, nnx.RngCount)

        def run(carry, scanned):
            layer_state, index = scanned
            before = _get_values(layer_state)
            layer = nnx.merge(graphdef, layer_state)
            with keeping_products(keeps_products):
                carry = apply(layer, carry, index)
            return carry, _changed(nnx.state(layer, kept), before)

        scanned = state, jnp.arange(self.num_layers)
        if how is None:
            carry, assigned = jax.lax.scan(run, carry, scanned)
        else:
            policy = self.remat if callable(self.remat) else None
            carry, assigned = _scan_again(run, carry, scanned, how, policy)
        nnx.update(self.layer, assigned)
        if keeps_products:
            carry = jax.tree.map(_once_if_narrow, carry)
        return carry


def _once_if_narrow(x: jax.Array) -> jax.Array:
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return differentiated_once(x) if is_narrow else x


def _get_values(state: nnx.State) -> dict[Any, Any]:
    return {path: _value(x) for path, x in nnx.to_flat_state(state)}


def _value(x: Any) -> Any:
    # Inside some of Flax's transformations a state holds arrays.
    return x.get_value() if isinstance(x, nnx.Variable) else x


def _changed(state: nnx.State, before: dict[Any, Any]) -> nnx.State:
    """Returns the variables that are new or have been assigned.

    Without dropout that is none. So a model in evaluation may be called inside a loop
    of JAX that it was made outside of, where Flax refuses assignments.
    """
    new = object()
    return nnx.from_flat_state(
        [
            (path, variable)
            for path, variable in nnx.to_flat_state(state)
            if _value(variable) is not before.get(path, new)
        ]
    )


_Body = Callable[[Any, Any], tuple[Any, Any]]


def _scan_again(
    run: _Body, carry: Any, scanned: Any, how: Remat, policy: Callable | None
) -> tuple[Any, Any]:
    """``jax.lax.scan`` with a backward pass that recomputes as ``how`` says."""
    num_layers = jax.tree.leaves(scanned)[0].shape[0]
    if num_layers % how.every:
        raise ValueError(
            f"every={how.every} must divide the number of layers, {num_layers}"
        )
    if how.every == 1:
        return jax.lax.scan(_checkpoint(run, how, policy), carry, scanned)
    one = _checkpoint(run, dataclasses.replace(how, offload=False), policy)

    def run_group(carry, scanned):
        return jax.lax.scan(one, carry, scanned)

    groups = jax.tree.map(lambda x: x.reshape(-1, how.every, *x.shape[1:]), scanned)
    group = _checkpoint(run_group, dataclasses.replace(how, products=False), None)
    carry, assigned = jax.lax.scan(group, carry, groups)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), assigned)


def _checkpoint(run: _Body, how: Remat, policy: Callable | None) -> _Body:
    """Returns ``run`` with a backward pass that keeps what ``how`` says of each call.

    Args:
        run: body of a scan.
        how: whether to offload the inputs, and to keep products.
        policy: policy that takes the place of ``how``.
    """
    if not (how.offload or how.products):
        return jax.checkpoint(run, policy=policy)
    if policy is not None:
        raise ValueError(
            "offload=True and products=True are a policy of their own, and the stack "
            f"has one in remat: {policy}; give one of the two"
        )

    def run_named(carry, scanned):
        return run(jax.tree.map(lambda x: checkpoint_name(x, _INPUT), carry), scanned)

    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[PRODUCT] if how.products else [],
        names_which_can_be_offloaded=[_INPUT] if how.offload else [],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(run_named, policy=policy)
