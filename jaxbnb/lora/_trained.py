"""TrainedModule: a frozen module and copies of it that are trained in full."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.core.parts import apply_or_eval_shape
from jaxbnb.lora._switch import AdaptedModule
from jaxbnb.nnx import QuantParam, dequantize_model


class TrainedModule(AdaptedModule):
    """A frozen module and its trained copies; the active copy is called in its place.

    ``modules_to_save`` of `LoraConfig` makes them, and ``bias="all"`` for modules other
    than linear layers. A quantised module is decoded in its copies. Other attributes
    are those of the module that is called.

    Attributes:
        base: the frozen module.
        adapters: ``nnx.Dict`` of the copies, by the adapter's name. Their parameters
            are ``nnx.LoRAParam``.
        active: names of the active adapters; at most one of them has a copy.
        adapter_index: the active adapter that each row uses, see `adapter_rows`; None
            if every row uses all of them.
        heads: names of the adapters with an embedding that is the model's output head
            as well; see ``ensure_weight_tying`` of `LoraConfig`.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Dict(up=nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
        ...                  norm=nnx.LayerNorm(8, rngs=nnx.Rngs(0)))
        >>> config = jaxbnb.lora.LoraConfig(modules_to_save=["norm"])
        >>> _ = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(1))
        >>> type(model["norm"]).__name__, model["norm"].epsilon
        ('TrainedModule', 1e-06)

    References:
        ``modules_to_save`` of PEFT.
    """

    def __init__(
        self, base: nnx.Module, active: tuple[str, ...], stack: tuple[int, ...]
    ):
        super().__init__(base, active)
        self._stack = stack
        self.heads: tuple[str, ...] = ()

    def add(self, name: str, *, only_bias: bool = False, is_head: bool = False) -> None:
        """Adds a copy.

        Args:
            name: name of the adapter.
            only_bias: whether to train only the bias, rather than all parameters.
            is_head: whether the copy is of an embedding, and is the head as well.
        """
        self.adapters[name] = _copy_module(self.base, only_bias)
        if is_head:
            self.heads = (*self.heads, name)

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that stack layers in front of every variable."""
        return self._stack

    @property
    def is_head(self) -> bool:
        """Whether an adapter trains an embedding that is the head, too."""
        return bool(self.heads)

    @property
    def module(self) -> Any:
        """The module that is called: the active copy, or the base if there is none."""
        chosen = self._chosen()
        return self.adapters[chosen[0]] if chosen else self.base

    def check_active(self, path: str, names: tuple[str, ...]) -> None:
        """Raises ValueError if more than one adapter has a copy."""
        both = [name for name in names if name in self.adapters]
        if len(both) > 1:
            raise ValueError(
                f"{path} has a copy for each of the adapters {both}, and copies cannot "
                "be added up; activate one of them"
            )

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the active copy; with `adapter_rows`, every copy and the base."""
        return self._choose(lambda module: module(*args, **options), self._chosen())

    def as_head(
        self, hidden: Float[Array, "*batch hidden"], multiply: Callable[[Any], Array]
    ) -> Float[Array, "*batch vocab"]:
        """Computes the logits of a tied head by the base, or by a copy that is a head.

        Args:
            hidden: hidden states.
            multiply: function that multiplies them by the rows of an embedding.
        """
        del hidden
        names = [name for name in self._chosen() if name in self.heads]
        return self._choose(multiply, names)

    def _choose(self, function: Callable[[Any], Any], names: Sequence[str]) -> Any:
        """Applies a function to the copy in use, or for rows to all of them."""
        if self.adapter_index is None:
            return function(self.adapters[names[0]] if names else self.base)
        result = function(self.base)
        for name in names:
            new = function(self.adapters[name])
            result = self._keep_rows(name, new.astype(result.dtype), result)
        return result

    def __getattr__(self, name: str) -> Any:
        # Flax looks for attributes before there are any.
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(name)
        return getattr(self.module, name)


def copy_for_training(
    variable: nnx.Variable[Any], dtype: jax.typing.DTypeLike | None = None
) -> nnx.LoRAParam:
    """Copies a parameter as one that is trained with the adapters.

    The array is new, because a train step donates it.
    """

    def copy(x: Any) -> Any:
        return jnp.array(x, x.dtype if dtype is None else dtype, copy=True)

    return nnx.LoRAParam(apply_or_eval_shape(copy, variable.get_value()))


def _copy_module(base: nnx.Module, only_bias: bool) -> nnx.Module:
    # tree_map makes new variables, which share the arrays.
    graphdef, state = nnx.split(base)
    holder = nnx.Dict(module=nnx.merge(graphdef, jax.tree.map(lambda x: x, state)))
    variables = [v for _, v in nnx.to_flat_state(nnx.state(holder))]
    if not only_bias and any(isinstance(v, QuantParam) for v in variables):
        dequantize_model(holder)
    for _, module in list(nnx.iter_modules(holder)):
        names = ["bias"] if only_bias else list(vars(module))
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, nnx.Param):
                # In float32, small steps are not lost. A module with a dtype of its own
                # still computes in that.
                is_cast = getattr(module, "dtype", None) is not None
                new = copy_for_training(value, jnp.float32 if is_cast else None)
                setattr(module, name, new)
    return holder.module
