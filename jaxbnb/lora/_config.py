"""LoraConfig: which layers are adapted, and how."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from jaxbnb.core.paths import matches
from jaxbnb.lora._peft_fields import advice

# What PEFT leaves out of "all-linear": the output head.
_HEADS: Final = ("lm_head",)

# Those that start from the weight, and change it.
FROM_WEIGHT: Final = ("pissa", "olora", "loftq")
INITS: Final = (True, False, "gaussian", *FROM_WEIGHT)

_Config = TypeVar("_Config", bound=type)


def _names_fields(config: _Config) -> _Config:
    """Makes a dataclass say what to do about a keyword that it does not take."""
    make: Any = config.__init__
    fields = [field.name for field in dataclasses.fields(config)]

    @functools.wraps(make)
    def checked(self, *args, **kwargs):
        for name, value in kwargs.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = advice(name, value) or (f"perhaps {near[0]}" if near else "")
                raise TypeError(
                    f"{config.__name__} takes no argument {name!r}"
                    f"{f': {hint}. It' if hint else '; it'} takes {', '.join(fields)}"
                )
        make(self, *args, **kwargs)

    config.__init__ = checked
    return config


@_names_fields
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how; PEFT's field names.

    The layers of a `jaxbnb.nnx.LayerStack` go by two names here and in the patterns:
    ``model.layers.layer.mlp.up_proj`` is all of them, ``model.layers.3.mlp.up_proj``
    the fourth. Where only some are named, or their ranks differ, the factors of the
    others are filled up with zeros, which stay zeros in training.

    Attributes:
        r: the rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        target_modules: "all-linear" for every linear layer but the output head; or
            names, each a whole dotted path or its last parts; or one regular expression
            that matches whole paths. "lm_head" gives a model whose head is its
            embedding a head of its own, a copy.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        use_dora: learn the norm of each column of the weight beside its direction.
        lora_dropout: share of the inputs of an update that is dropped in training.
        init_lora_weights: True: ``lora_a`` uniform, ``lora_b`` zeros; "gaussian":
            ``lora_a`` normal with a deviation of ``1 / r``, ``lora_b`` zeros; False:
            both uniform, so that the model changes at once. Three start from the weight
            and take their start out of it: "pissa", its largest singular values;
            "olora", its QR decomposition; "loftq", what quantisation loses of it.
        rank_pattern: ranks other than ``r`` of layers: regular expressions of the end
            of their paths; the first that matches counts.
        alpha_pattern: likewise, other than ``lora_alpha``.
        loftq_iter: how often "loftq" quantises and decomposes.
        exclude_modules: layers that are not adapted even if ``target_modules`` names
            them: names, or one regular expression; None for none.
        layers_to_transform: number of the layer to adapt, or of several, if
            ``target_modules`` is a list; None for all.
        layers_pattern: names of the lists that ``layers_to_transform`` numbers; None
            for the first list on the way to a module, whatever its name.

    Raises:
        ValueError: a value is not of these forms.
        TypeError: a keyword is not among these. For PEFT's other fields, the message
            says whether to leave them out.

    Example:
        >>> import jaxbnb
        >>> config = jaxbnb.lora.LoraConfig(
        ...     r=16, lora_alpha=32, rank_pattern={"down_proj": 4})
        >>> config.scaling, config.rank_of("model.layers.0.mlp.down_proj")
        (2.0, 4)

    References:
        ``peft.LoraConfig``. Kalajdzievski, A Rank Stabilization Scaling Factor for
        Fine-Tuning with LoRA, 2023. Liu et al., DoRA, 2024. Meng et al., PiSSA, 2024.
        Büyükakyüz, OLoRA, 2024. Li et al., LoftQ, 2023.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    loftq_iter: int = 1
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self):
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_rank("loftq_iter", self.loftq_iter)
        dropout = self.lora_dropout
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1); got {dropout!r}")
        # 1 == True, but "pissa" is what is meant by no number.
        init = self.init_lora_weights
        if not isinstance(init, bool | str) or init not in INITS:
            raise ValueError(f"init_lora_weights must be one of {INITS}; got {init!r}")
        for name, check in (
            ("rank_pattern", _check_rank),
            ("alpha_pattern", _check_alpha),
        ):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ValueError(f"{name} must be a dict; got {pattern!r}")
            for key, value in pattern.items():
                _check_regex(name, key)
                check(f"{name}[{key!r}]", value)
            object.__setattr__(self, name, dict(pattern))
        if init in FROM_WEIGHT and not all(
            alpha > 0 for alpha in (self.lora_alpha, *self.alpha_pattern.values())
        ):
            raise ValueError(
                f"init_lora_weights={init!r} divides by the scale; lora_alpha must be "
                f"positive, got {self.lora_alpha!r} and {self.alpha_pattern!r}"
            )
        if not self.target_modules:
            raise ValueError("target_modules must name something, e.g. 'all-linear'")
        _freeze_names(self, "target_modules")
        _freeze_names(self, "exclude_modules")
        self._check_layers()

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and not (
            isinstance(layers, Sequence)
            and all(type(n) is int and n >= 0 for n in layers)
        ):
            raise ValueError(
                "layers_to_transform must be layer numbers, from 0; got "
                f"{self.layers_to_transform!r}"
            )
        # As in PEFT, whose empty lists mean None.
        layers, pattern = tuple(layers or ()) or None, pattern or None
        if (layers or pattern) and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform and layers_pattern need a list of "
                f"target_modules; got {self.target_modules!r}"
            )
        if pattern and not layers:
            raise ValueError("layers_pattern needs layers_to_transform as well")
        pattern = [pattern] if isinstance(pattern, str) else pattern
        if pattern is not None and not isinstance(pattern, Sequence):
            raise ValueError(f"layers_pattern must be names; got {pattern!r}")
        for name in pattern or ():
            _check_regex("layers_pattern", name)
        object.__setattr__(self, "layers_to_transform", layers)
        object.__setattr__(self, "layers_pattern", pattern and tuple(pattern))

    def __hash__(self):
        # A model keeps it among what jit compares; the patterns are dicts.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(
            tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values)
        )

    @property
    def scaling(self) -> float:
        """What ``x A B`` is multiplied by where no pattern says otherwise."""
        return self.scaling_of("")

    def rank_of(self, *names: str) -> int:
        """The rank of a layer that goes by these names."""
        return _first(self.rank_pattern, names, self.r)

    def scaling_of(self, *names: str) -> float:
        """The scale of a layer that goes by these names."""
        rank, alpha = self.rank_of(*names), self.alpha_of(*names)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_of(self, *names: str) -> float:
        """The alpha of a layer that goes by these names."""
        return _first(self.alpha_pattern, names, self.lora_alpha)

    def targets(self, *names: str) -> bool:
        """Whether to adapt a linear layer that goes by these dotted paths."""
        excluded = self.exclude_modules
        if excluded and any(matches(name, excluded) for name in names):
            return False
        if self.target_modules == "all-linear":
            return not any(matches(name, _HEADS) for name in names)
        return any(self._means(name) for name in names)

    def _means(self, name: str) -> bool:
        targets, layers = self.target_modules, self.layers_to_transform
        layers = (layers,) if isinstance(layers, int) else layers
        # PEFT does not check the layer of a module that is named by its whole path.
        if layers is None or name in targets or not matches(name, targets):
            return matches(name, targets)
        for pattern in self.layers_pattern or (r"[^.]*",):
            # The layer's number comes first, before an expert's, and after some list.
            start = r".*?\." if self.layers_pattern is None else r"(?:^|.*?\.)"
            if found := re.match(rf"{start}{pattern}\.(\d+)\.", name):
                return int(found[1]) in layers
        return False


def _freeze_names(config: LoraConfig, field: str) -> None:
    """Makes names a tuple, or checks that they are one regular expression."""
    names = getattr(config, field)
    if isinstance(names, str):
        _check_regex(field, names)
    elif names is not None:
        if not isinstance(names, Sequence) or not all(
            isinstance(name, str) for name in names
        ):
            raise ValueError(f"{field} must be names or one string; got {names!r}")
        object.__setattr__(config, field, tuple(names))


def _first(pattern, names, default):
    """PEFT's rule for patterns: the end of a path, from one of its dots on."""
    for key, value in pattern.items():
        if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names):
            return value
    return default


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(name, value):
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not 1 <= value < 2**31:
        hint = ", more than int32 holds" if is_int and value > 0 else ""
        raise ValueError(f"{name} must be a positive int; got {value!r:.100}{hint}")


def _check_alpha(name, value):
    # NaN compares as false. A number beyond float32 would become infinite.
    if not _is_number(value) or not abs(value) < 2.0**128:
        raise ValueError(f"{name} must be a number in float32; got {value!r:.100}")


def _check_regex(name, value):
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} {value!r} is no regular expression: {error}; give names as a list"
        ) from error
