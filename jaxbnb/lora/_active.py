"""Switches the active adapters of a model, for all rows of a batch or for each row."""

import contextlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Int

from jaxbnb.lora._switch import AdapterIndex
from jaxbnb.lora._targets import check_names, find_modules


def set_adapter(model: nnx.Module, names: str | Sequence[str]) -> None:
    """Switches to an adapter, to the sum of several, or with ``[]`` to none.

    The active adapters are part of the model's structure, so a compiled function is
    compiled again for them. For adapters that change from batch to batch, see
    `adapter_rows`.

    Raises:
        ValueError: the model does not have an adapter of this name; or several have a
            trained copy of the same module, or of the same token's row.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("policy", "reward"):
        ...     _ = jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), name=name,
        ...                                 rngs=nnx.Rngs(1))
        >>> jaxbnb.lora.set_adapter(model, "reward")
        >>> model.layers[0].active
        ('reward',)
    """
    names = check_names(model, names)
    found = list(find_modules(model))
    for path, module in found:
        module.check_active(path, names)
    for _, module in found:
        module.active = names


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """Switches all adapters off within a context, so that the model computes its base.

    With "pissa" and "olora", the base is the remainder that they left of the weights.

    Raises:
        ValueError: the model does not have adapters.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(1))
        >>> with jaxbnb.lora.disable_adapters(model):
        ...     model.layers[0].active
        ()
        >>> model.layers[0].active
        ('default',)
    """
    check_names(model, [])
    with _restore_afterwards(model):
        set_adapter(model, [])
        yield


@contextlib.contextmanager
def adapter_rows(
    model: nnx.Module,
    names: Sequence[str],
    adapter_index: Int[Array, " batch"],
) -> Iterator[None]:
    """Applies to each row of a batch its own adapter, or none, within a context.

    One pass through the base serves all rows. Each adapter is computed for every row,
    which costs little compared with the base. Rows are the first axis of the inputs of
    every adapted layer. The index is a value, not structure: under jit it may change
    without compiling again.

    Args:
        model: a model with adapters.
        names: names of the adapters.
        adapter_index: index into ``names`` for each row; -1 for the base alone.

    Raises:
        ValueError: the model does not have an adapter of this name; or the index does
            not hold ints, has another rank, or points outside ``names`` (if its values
            are known). A layer also raises it for inputs with another number of rows.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> for name in ("policy", "reward"):
        ...     config = jaxbnb.lora.LoraConfig(init_lora_weights=False)
        ...     _ = jaxbnb.lora.add_adapter(model, config, name=name, rngs=nnx.Rngs(1))
        >>> x = jnp.ones((3, 64))
        >>> with jaxbnb.lora.adapter_rows(
        ...     model, ["policy", "reward"], jnp.array([0, 1, -1])):
        ...     y = model(x)
        >>> with jaxbnb.lora.disable_adapters(model):
        ...     bool(jnp.array_equal(y[2], model(x)[2]))
        True

    References:
        ``adapter_names`` of PEFT; Chen et al., Punica: Multi-Tenant LoRA Serving, 2023.
    """
    names = check_names(model, names)
    index = jnp.asarray(adapter_index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            "adapter_index must have an int for each row of the batch; got "
            f"{index.dtype} of shape {index.shape}"
        )
    if not isinstance(index, Tracer) and index.size:
        low, high = int(jnp.min(index)), int(jnp.max(index))
        if low < -1 or high >= len(names):
            raise ValueError(
                f"adapter_index must be in [-1, {len(names)}), for {list(names)}; got "
                f"{low} to {high}"
            )
    with _restore_afterwards(model):
        for _, module in find_modules(model):
            module.active = names
            # Every layer of a stack gets a copy, which is scanned over with the rest.
            rows = jnp.broadcast_to(index, (*module.stack, *index.shape))
            module.adapter_index = AdapterIndex(rows)
        yield


@contextlib.contextmanager
def _restore_afterwards(model: nnx.Module) -> Iterator[None]:
    """Restores the active adapters of each module, and its index, after a context."""
    modules = [module for _, module in find_modules(model)]
    before = [(module.active, module.adapter_index) for module in modules]
    try:
        yield
    finally:
        for module, (active, index) in zip(modules, before, strict=True):
            module.active = active
            module.adapter_index = nnx.data(index)
