"""LoraConfig: which layers are adapted, and how."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from jaxbnb.core.paths import matches
from jaxbnb.lora._peft_fields import advise

# PEFT leaves the output head out of "all-linear".
_HEADS: Final = ("lm_head",)

# These take their start out of the weight, and so change it.
FROM_WEIGHT: Final = ("pissa", "olora", "loftq")
INITS: Final = (True, False, "gaussian", *FROM_WEIGHT)
BIASES: Final = ("none", "all", "lora_only")

_Config = TypeVar("_Config", bound=type)


def _check_keywords(config: _Config) -> _Config:
    """Makes a dataclass say what to do about a keyword that it does not have."""
    construct: Any = config.__init__
    fields = [field.name for field in dataclasses.fields(config)]

    @functools.wraps(construct)
    def checked(self, *args, **kwargs):
        for name, value in kwargs.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = advise(name, value) or (f"perhaps {near[0]}" if near else "")
                raise TypeError(
                    f"{config.__name__} takes no argument {name!r}"
                    f"{f': {hint}. It' if hint else '; it'} takes {', '.join(fields)}"
                )
        construct(self, *args, **kwargs)

    config.__init__ = checked
    return config


@_check_keywords
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The layers to adapt, and how; with PEFT's field names.

    Here and in the patterns, the layers of a `jaxbnb.nnx.LayerStack` have two names:
    ``model.layers.layer.mlp.up_proj`` means all of them, ``model.layers.3.mlp.up_proj``
    the fourth. If only some are named, or their ranks differ, the factors of the others
    are padded with zeros, which stay zero in training.

    Attributes:
        r: the rank.
        lora_alpha: numerator of the scale ``lora_alpha / r`` of the update.
        target_modules: "all-linear" for every linear layer except the output head; or
            names, each a whole dotted path or its last parts; or one regular expression
            that matches whole paths. If the embedding is also the head, "lm_head" makes
            a copy of it the head.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        use_dora: learn the norm of each column of the weight, besides its direction.
        lora_dropout: share of an update's inputs that is dropped in training.
        init_lora_weights: True: ``lora_a`` uniform, ``lora_b`` zeros; "gaussian":
            ``lora_a`` normal with a standard deviation of ``1 / r``, ``lora_b`` zeros;
            False: both uniform, so that the model changes at once. Three options take
            their start out of the weight: "pissa", its largest singular values;
            "olora", its QR decomposition; "loftq", the error of its quantisation.
        rank_pattern: ranks of layers that differ from ``r``. Keys are regular
            expressions for the end of a path; the first match counts.
        alpha_pattern: likewise, alphas that differ from ``lora_alpha``.
        loftq_iter: number of times that "loftq" quantises and decomposes.
        exclude_modules: layers to leave alone even if ``target_modules`` names them:
            names, or one regular expression; None excludes nothing.
        layers_to_transform: number of the layer to adapt, or of several, if
            ``target_modules`` is a list; None for all.
        layers_pattern: names of the lists that ``layers_to_transform`` numbers; None
            for the first list on the path to a module, whatever its name.
        bias: biases to train as well: "none"; "lora_only", those of the adapted layers;
            "all", every ``bias`` of the model.
        modules_to_save: names of modules to train in full, such as embeddings, the head
            or norms. The adapter gets a copy of each, and the base stays as it is. None
            for no modules. They are not adapted, even if ``target_modules`` names them.
        trainable_token_indices: ids of the tokens with rows of the embedding to train;
            or a dict of such ids, by the name of an embedding or linear layer. If the
            embedding is also the head, the head's rows follow. None for no rows.
        ensure_weight_tying: if the embedding is also the head, whether an embedding in
            ``modules_to_save`` is trained as both. If False, the head stays.

    Raises:
        ValueError: a value does not have one of these forms.
        TypeError: a keyword is unknown. For PEFT's other fields, the message says
            whether to leave them out.

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
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self):
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_rank("loftq_iter", self.loftq_iter)
        dropout = self.lora_dropout
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1); got {dropout!r}")
        # 1 == True, so ``in`` alone would accept numbers.
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
                f"init_lora_weights={init!r} divides by the scale, so lora_alpha must "
                f"be positive; got {self.lora_alpha!r} and {self.alpha_pattern!r}"
            )
        if not self.target_modules:
            raise ValueError("target_modules must name something, e.g. 'all-linear'")
        _freeze_names(self, "target_modules")
        _freeze_names(self, "exclude_modules")
        self._check_layers()
        self._check_trained()

    def _check_trained(self) -> None:
        """Checks what is trained besides the factors, and makes it hashable."""
        # PEFT's own default is the string, and its files may hold null.
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {BIASES}; got {self.bias!r}")
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                "modules_to_save must be a list of names; got "
                f"{self.modules_to_save!r}, give [{self.modules_to_save!r}]"
            )
        _freeze_names(self, "modules_to_save")
        object.__setattr__(self, "modules_to_save", self.modules_to_save or None)
        ids = self.trainable_token_indices
        if isinstance(ids, Mapping):
            for name, each in ids.items():
                if not isinstance(name, str) or not name:
                    raise ValueError(
                        "trainable_token_indices must have names of modules as keys; "
                        f"got {name!r}"
                    )
                _check_ids(f"trainable_token_indices[{name!r}]", each)
            frozen: Any = {name: tuple(each) for name, each in ids.items()} or None
            object.__setattr__(self, "trainable_token_indices", frozen)
        elif ids is not None:
            _check_ids("trainable_token_indices", ids)
            object.__setattr__(self, "trainable_token_indices", tuple(ids))
        if not isinstance(self.ensure_weight_tying, bool):
            raise ValueError(
                "ensure_weight_tying must be True or False; got "
                f"{self.ensure_weight_tying!r}"
            )

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
        # As in PEFT, an empty list means None.
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
        # jit compares and hashes the config of a model, and the patterns are dicts.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(
            tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values)
        )

    @property
    def scaling(self) -> float:
        """The factor of ``x A B``, unless a pattern says otherwise."""
        return self.scaling_of("")

    def rank_of(self, *names: str) -> int:
        """Returns the rank of a layer with these names."""
        return _find_first(self.rank_pattern, names, self.r)

    def scaling_of(self, *names: str) -> float:
        """Returns the scale of a layer with these names."""
        rank, alpha = self.rank_of(*names), self.alpha_of(*names)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_of(self, *names: str) -> float:
        """Returns the alpha of a layer with these names."""
        return _find_first(self.alpha_pattern, names, self.lora_alpha)

    def saves(self, *names: str) -> bool:
        """Whether ``modules_to_save`` names a module, or one that contains it."""
        saved = self.modules_to_save or ()
        parts = [name.split(".") for name in names]
        above = (".".join(p[:n]) for p in parts for n in range(1, len(p) + 1))
        return any(matches(name, saved) for name in above)

    def targets(self, *names: str) -> bool:
        """Whether to adapt a layer with these dotted paths."""
        if self.saves(*names):
            return False
        excluded = self.exclude_modules
        if excluded and any(matches(name, excluded) for name in names):
            return False
        if self.target_modules == "all-linear":
            return not any(matches(name, _HEADS) for name in names)
        return any(self._is_named(name) for name in names)

    def _is_named(self, name: str) -> bool:
        targets, layers = self.target_modules, self.layers_to_transform
        layers = (layers,) if isinstance(layers, int) else layers
        # PEFT does not check the layer of a module that is named by its full path.
        if layers is None or name in targets or not matches(name, targets):
            return matches(name, targets)
        for pattern in self.layers_pattern or (r"[^.]*",):
            # The layer's number comes before an expert's, and after the name of a list.
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


def _find_first(pattern, names, default):
    """Returns the value of the first pattern that matches, by PEFT's rule.

    A pattern must match the end of a path, starting after a dot.
    """
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


def _check_ids(name, ids):
    is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
    if not is_list or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{name} must be ids of tokens, from 0; got {ids!r:.100}")
    if len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(f"{name} must have each id once; {twice} occurs twice")


def _check_alpha(name, value):
    # NaN compares as false. A number beyond float32 would become infinite.
    if not _is_number(value) or not abs(value) < 2.0**128:
        raise ValueError(f"{name} must be a number in float32; got {value!r:.100}")


def _check_regex(name, value):
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} {value!r} is not a regular expression: {error}; give names as a "
            "list"
        ) from error
