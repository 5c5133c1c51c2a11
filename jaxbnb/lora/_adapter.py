"""LoraLinear and add_adapter: low-rank updates of frozen linear layers."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbnb.core._paths import matches
from jaxbnb.nnx import QuantLinear, _surgery

# What PEFT leaves out of "all-linear": the output head.
_HEADS = ("lm_head",)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how; PEFT's field names.

    Attributes:
        r: the rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        target_modules: "all-linear" for every linear layer but the output head; or
            names, each a whole dotted path or its last parts; or one regular expression
            that matches whole paths.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.

    Raises:
        ValueError: ``r`` is not a positive int, ``lora_alpha`` not a number, or
            ``target_modules`` not of these forms.

    Example:
        >>> import jaxbnb
        >>> jaxbnb.lora.LoraConfig(r=16, lora_alpha=32).scaling
        2.0
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a positive int; got {self.r!r}")
        alpha = self.lora_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"lora_alpha must be a number; got {alpha!r}")
        if not self.target_modules:
            raise ValueError("target_modules must name something, e.g. 'all-linear'")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules {self.target_modules!r} is no regular expression: "
                    f"{error}; give names as a list"
                ) from error
            return
        names = self.target_modules
        if not isinstance(names, Sequence) or not all(
            isinstance(n, str) for n in names
        ):
            raise ValueError(
                f"target_modules must be names or one string; got {names!r}"
            )
        object.__setattr__(self, "target_modules", tuple(names))

    @property
    def scaling(self) -> float:
        """What ``x A B`` is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, path: str) -> bool:
        """Whether the linear layer at a dotted path is adapted."""
        if self.target_modules == "all-linear":
            return not matches(path, _HEADS)
        return matches(path, self.target_modules)


class LoraLinear(nnx.Module):
    r"""A frozen linear layer with a trainable low-rank update.

    .. math:: y = \mathrm{base}(x) + s \, x A B, \qquad s = \alpha / r

    Attributes:
        base: the layer adapted, ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear`.
        lora_a: ``nnx.LoRAParam`` of shape ``(*stack, in_features, r)``; random at
            first.
        lora_b: ``nnx.LoRAParam`` of shape ``(*stack, r, out_features)``; zeros at
            first.
        config: the `LoraConfig`.

    Args:
        base: the layer to adapt; a stack of layers, kernels ``(*stack, in, out)``, gets
            a stack of adapters.
        config: rank and scale.
        rngs: its ``params`` stream seeds ``lora_a``.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> base = jaxbnb.nnx.QuantLinear(128, 64, rngs=nnx.Rngs(0))
        >>> layer = jaxbnb.lora.LoraLinear(base, jaxbnb.lora.LoraConfig(r=4),
        ...                                rngs=nnx.Rngs(1))
        >>> x = jnp.ones((2, 128))
        >>> bool(jnp.array_equal(layer(x), base(x)))
        True
        >>> [path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.LoRAParam))]
        ['lora_a', 'lora_b']

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
    """

    def __init__(
        self, base: nnx.Linear | QuantLinear, config: LoraConfig, *, rngs: nnx.Rngs
    ):
        *stack, fan_in, fan_out = base.kernel.get_value().shape
        # PEFT's kaiming_uniform(a=sqrt(5)): uniform in +-1/sqrt(fan_in).
        bound = 1.0 / math.sqrt(fan_in)
        lora_a = jax.random.uniform(
            rngs.params(), (*stack, fan_in, config.r), jnp.float32, -bound, bound
        )
        self.base = base
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, config.r, fan_out), jnp.float32))
        self.config = config

    def __call__(
        self, inputs: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer along the last axis of ``inputs``."""
        y = self.base(inputs)
        x = inputs.astype(y.dtype)
        update = x @ self.lora_a[...].astype(y.dtype) @ self.lora_b[...].astype(y.dtype)
        return y + self.config.scaling * update


def add_adapter(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> list[str]:
    """Wraps the targeted linear layers of ``model`` in `LoraLinear`, in place.

    The model computes the same as before until the adapters are trained. Train them,
    and nothing else, with ``nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)``.

    Args:
        model: any NNX model with ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear` layers.
        config: which layers, and how.
        rngs: its ``params`` stream seeds the adapters.

    Returns:
        The dotted paths of the layers that were adapted.

    Raises:
        ValueError: ``config.target_modules`` names no linear layer, or the model has
            adapters already.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(), rngs=nnx.Rngs(1))
        ['layers.0']
    """
    for path, _, _, module in _surgery.children(model):
        if isinstance(module, LoraLinear):
            raise ValueError(
                f"{type(model).__name__} has an adapter already, at {path}; "
                "add adapters to a model without"
            )
    linears: list[str] = []

    def new(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, nnx.Linear | QuantLinear):
            return None
        linears.append(path)
        if not config.targets(path):
            return None
        return LoraLinear(module, config, rngs=rngs)

    adapted = _surgery.replace_modules(model, new)
    if not adapted:
        raise ValueError(
            f"target_modules {config.target_modules!r} names none of the linear layers "
            f"of {type(model).__name__}: {linears}"
        )
    return adapted
