"""prepare_for_training: sets dtypes and gradient checkpointing, and reports them."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbnb.core.paths import matches
from jaxbnb.core.table import format_table
from jaxbnb.nnx import LayerStack, QuantLinear, surgery

logger = logging.getLogger("jaxbnb.lora")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A report of what `prepare_for_training` did. It prints as a table.

    Attributes:
        dtypes: old dtype of each variable that was cast to float32.
        added_bytes: bytes that the casts added.
        remat: setting of each `jaxbnb.nnx.LayerStack`.
        notes: modules that were left unchanged, and why.
    """

    dtypes: dict[str, str]
    added_bytes: int
    remat: dict[str, bool | Callable[..., bool]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("what", "was", "is")]
        rows += [(path, dtype, "float32") for path, dtype in self.dtypes.items()]
        rows += [
            (path, "", f"remat={getattr(remat, '__name__', remat)}")
            for path, remat in self.remat.items()
        ]
        rows.append(("bytes added", "", str(self.added_bytes)))
        return "\n".join([format_table(rows, num_right=0), *self.notes])


def prepare_for_training(
    model: nnx.Module,
    *,
    head: str | Sequence[str] = ("lm_head",),
    remat: bool | Callable[..., bool] = True,
) -> Prepared:
    """Casts norms and head to float32, and sets gradient checkpointing, in place.

    Use it for a model that was loaded in 16 bits or less, before or after
    `add_adapter`. PEFT's ``prepare_model_for_kbit_training`` does two more things that
    are not needed here. Nothing needs freezing, because the optimizer's ``wrt`` selects
    what is trained. And the embedding's output needs no mark, because gradients pass
    through a frozen layer to the adapters before it, checkpointed or not.

    A norm, Flax's or a model's own, is a module with "norm" in the name of its class or
    of a class it inherits from. All its parameters have the same shape, and it does not
    contain other modules. The results of norms keep their dtype; those of the head
    become float32. If a model's own norm would return float32 instead, it stays
    unchanged, and the notes say so.

    Args:
        model: any NNX model.
        head: names of the output head, like ``skip`` of `jaxbnb.nnx.quantize_model`;
            ``()`` leaves it alone.
        remat: setting for each `jaxbnb.nnx.LayerStack`. True keeps only the input of
            each layer for the backward pass, a policy of ``jax.checkpoint_policies``
            keeps more, and False leaves it to each call.

    Returns:
        A report, which is also logged to ``jaxbnb.lora`` as INFO.

    Raises:
        ValueError: ``remat`` is set, and there is not a `jaxbnb.nnx.LayerStack`.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Dict(
        ...     norm=nnx.RMSNorm(64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        ...     lm_head=nnx.Linear(64, 256, use_bias=False, param_dtype=jnp.bfloat16,
        ...                        rngs=nnx.Rngs(1)))
        >>> print(jaxbnb.lora.prepare_for_training(model, remat=False))
        what            was       is
        lm_head.kernel  bfloat16  float32
        norm.scale      bfloat16  float32
        bytes added               32896
    """
    below: list[tuple[str, Any]] = [("", model)]
    below += [(path, module) for path, _, _, module in surgery.iter_children(model)]
    stacks = {path: m for path, m in below if isinstance(m, LayerStack)}
    if remat and not stacks:
        raise ValueError(
            f"remat={remat!r} is for LayerStack, and {type(model).__name__} has none; "
            "wrap its blocks in nnx.remat, and give remat=False here"
        )
    dtypes: dict[str, str] = {}
    notes: list[str] = []
    added, has_head = 0, False
    for path, module in below:
        is_head = matches(path.removesuffix(".base"), head) and isinstance(
            module, nnx.Linear | QuantLinear
        )
        has_head = has_head or is_head
        if isinstance(module, QuantLinear) and is_head:
            notes.append(f"{path} is {module.config.quant_type}, and stays so")
        elif isinstance(module, nnx.Linear) and is_head:
            added += _cast(path, module, ("kernel", "bias"), dtypes)
            module.dtype = module.param_dtype = jnp.float32
        elif params := _find_norm_params(module):
            if not _keeps_dtype(module, params):
                notes.append(
                    f"{path} is unchanged: {type(module).__name__} would give float32"
                )
                continue
            if hasattr(module, "param_dtype"):
                _keep_dtype(module)
            added += _cast(path, module, params, dtypes)
    if head and not has_head:
        notes.append(
            f"no output head {head!r}: it is the embedding, or has another name"
        )
    for stack in stacks.values():
        stack.remat = remat
    remats = dict.fromkeys(stacks, remat)
    prepared = Prepared(dict(sorted(dtypes.items())), added, remats, tuple(notes))
    logger.info("%s", prepared)
    return prepared


def _find_norm_params(module: nnx.Module) -> tuple[str, ...]:
    """Returns the names of a norm's parameters, or nothing if it is not a norm."""
    names = [cls.__name__.lower() for cls in type(module).__mro__]
    if not isinstance(module, nnx.Module) or not any("norm" in n for n in names):
        return ()
    params = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param)
    }
    has_modules = any(isinstance(v, nnx.Module) for v in vars(module).values())
    if has_modules or len({value.shape for value in params.values()}) != 1:
        return ()
    return tuple(sorted(params))


def _keep_dtype(norm: Any) -> None:
    """Fixes the dtype of a Flax norm's results before its parameters become float32."""
    if norm.dtype is None:
        norm.dtype = norm.param_dtype
    norm.param_dtype = jnp.float32


def _keeps_dtype(module: nnx.Module, params: Sequence[str]) -> bool:
    """Whether results keep their dtype when the parameters become float32.

    Flax's norms have a ``dtype``, which can be set. For others, a call is traced.
    """
    if hasattr(module, "dtype") and hasattr(module, "param_dtype"):
        return True
    graphdef, state = nnx.split(module)
    param = getattr(module, params[0]).get_value()
    # If the norm is stacked, x has a row for each layer.
    x = jax.ShapeDtypeStruct((1, *param.shape), param.dtype)

    def call(state, x, dtype):
        state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
        return nnx.merge(graphdef, state)(x)

    try:
        before, after = (
            jax.eval_shape(functools.partial(call, dtype=dtype), state, x).dtype
            for dtype in (param.dtype, jnp.float32)
        )
    except (TypeError, ValueError, AttributeError):
        # The norm takes other arguments, which are unknown here.
        return False
    return before == after


def _cast(
    path: str, module: nnx.Module, names: Sequence[str], dtypes: dict[str, str]
) -> int:
    """Casts variables of a module to float32; returns the number of bytes added."""
    added = 0
    for name in names:
        variable = getattr(module, name, None)
        if not isinstance(variable, nnx.Variable):
            continue
        value = variable.get_value()
        if value.dtype == jnp.float32:
            continue
        dtypes[f"{path}.{name}".removeprefix(".")] = value.dtype.name
        added += value.size * 4 - value.nbytes
        variable.set_value(jax.lax.convert_element_type(value, jnp.float32))
    return added
