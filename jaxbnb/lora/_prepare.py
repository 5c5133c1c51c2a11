"""prepare_for_training: dtypes and gradient checkpointing, set and told."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbnb.core.paths import matches
from jaxbnb.core.table import layout
from jaxbnb.nnx import LayerStack, QuantLinear, surgery

logger = logging.getLogger("jaxbnb.lora")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare_for_training` did; printed, a table.

    Attributes:
        dtypes: of each variable that was cast to float32, the dtype it had.
        added_bytes: that the casts cost.
        remat: of each `jaxbnb.nnx.LayerStack`, what it was set to.
        notes: what is as it was, and why.
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
        return "\n".join([layout(rows, num_right=0), *self.notes])


def prepare_for_training(
    model: nnx.Module,
    *,
    head: str | Sequence[str] = ("lm_head",),
    remat: bool | Callable[..., bool] = True,
) -> Prepared:
    """Norms and output head in float32, and gradient checkpointing, in place.

    For a model that was loaded in 16 bits and less, before or after `add_adapter`. What
    PEFT's ``prepare_model_for_kbit_training`` does besides has no counterpart here:
    what is trained is what the optimizer's ``wrt`` selects, so nothing needs freezing;
    and gradients pass through a frozen layer to the adapters before it, checkpointed or
    not, so the embedding's output needs no mark.

    A norm is a module named so, by its class or one that it inherits from, whose
    parameters are all of one shape and in no other module: Flax's own, and those of a
    model. Norms give results of the dtype that they gave; the head's are float32. A
    norm of a model's own whose results would become float32 stays as it is, and the
    notes say so.

    Args:
        model: any NNX model.
        head: the output head, named as ``skip`` of `jaxbnb.nnx.quantize_model`; ``()``
            to leave it alone.
        remat: of each `jaxbnb.nnx.LayerStack`: True to keep only the input of each
            layer for the backward pass, a policy of ``jax.checkpoint_policies`` to keep
            more, False to leave it to each call.

    Returns:
        What was done; also logged, to ``jaxbnb.lora``, as INFO.

    Raises:
        ValueError: ``remat``, and there is no `jaxbnb.nnx.LayerStack`.

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
    below += [(path, module) for path, _, _, module in surgery.children(model)]
    stacks = {path: m for path, m in below if isinstance(m, LayerStack)}
    if remat and not stacks:
        raise ValueError(
            f"remat={remat!r} is for LayerStack, and {type(model).__name__} has none; "
            "wrap its blocks in nnx.remat, and give remat=False here"
        )
    dtypes: dict[str, str] = {}
    notes: list[str] = []
    added, found = 0, False
    for path, module in below:
        is_head = matches(path.removesuffix(".base"), head) and isinstance(
            module, nnx.Linear | QuantLinear
        )
        found = found or is_head
        if isinstance(module, QuantLinear) and is_head:
            notes.append(f"{path} is {module.config.quant_type}, and stays so")
        elif isinstance(module, nnx.Linear) and is_head:
            added += _cast(path, module, ("kernel", "bias"), dtypes)
            module.dtype = module.param_dtype = jnp.float32
        elif params := _norm_params(module):
            if not _keeps_dtype(module, params):
                notes.append(
                    f"{path} is as it was: {type(module).__name__} would give float32"
                )
                continue
            if hasattr(module, "param_dtype"):
                _keep_dtype(module)
            added += _cast(path, module, params, dtypes)
    if head and not found:
        notes.append(
            f"no output head {head!r}: it is the embedding, or by another name"
        )
    for stack in stacks.values():
        stack.remat = remat
    remats = dict.fromkeys(stacks, remat)
    prepared = Prepared(dict(sorted(dtypes.items())), added, remats, tuple(notes))
    logger.info("%s", prepared)
    return prepared


def _norm_params(module: nnx.Module) -> tuple[str, ...]:
    """The names of a norm's parameters; none of another module."""
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
    """Else float32 parameters of Flax's own would make all that follows float32."""
    if norm.dtype is None:
        norm.dtype = norm.param_dtype
    norm.param_dtype = jnp.float32


def _keeps_dtype(module: nnx.Module, params: Sequence[str]) -> bool:
    """Whether results are of one dtype, whether parameters are float32 or as they are.

    Flax's own take a ``dtype``, which is set; of others a call is traced.
    """
    if hasattr(module, "dtype") and hasattr(module, "param_dtype"):
        return True
    graphdef, state = nnx.split(module)
    param = getattr(module, params[0]).get_value()
    # Along a stack of layers, a row for each.
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
        # It is called in another way, which this cannot know.
        return False
    return before == after


def _cast(
    path: str, module: nnx.Module, names: Sequence[str], dtypes: dict[str, str]
) -> int:
    """Casts variables of a module to float32; the bytes that it cost."""
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
