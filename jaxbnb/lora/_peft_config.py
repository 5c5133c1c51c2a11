"""Reads and writes adapter_config.json: PEFT's fields as a `LoraConfig`, and back."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from flax import nnx

from jaxbnb.core.paths import matches
from jaxbnb.lora._base import get_param
from jaxbnb.lora._config import INITS, LoraConfig
from jaxbnb.lora._peft_fields import PLAIN, WITHOUT_EFFECT
from jaxbnb.lora._targets import Adapted, find_linears
from jaxbnb.lora.file_names import FileLayer, NamesLayers, Piece, get_alpha

# Other ways in which factors may have started. Trained values do not depend on them.
_STARTS: Final = ("eva", "orthogonal")
# Further ways to start change the base model, and not deterministically.
_PLAIN: Final = {**PLAIN, "init_lora_weights": (*INITS, *_STARTS, None)}
# Fields with the same meaning here.
_READ: Final = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loftq_config"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "bias", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying"),
)
KNOWN_FIELDS: Final = frozenset((*_PLAIN, *_READ, *WITHOUT_EFFECT))


class AdapterError(ValueError):
    """An adapter's files are missing, damaged, or do not fit the model."""


def read_config(path: Path, is_transposed: bool) -> LoraConfig:
    """Reads the configuration of an adapter.

    Args:
        path: path of ``adapter_config.json``.
        is_transposed: whether the base model's files hold kernels as ``(in, out)``.

    Raises:
        AdapterError: the file is missing or damaged.
        NotImplementedError: the file has a field that changes what is computed and is
            not supported.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent
        what = "has no" if folder.is_dir() else "is not a folder with"
        # What `jaxbnb finetune` writes to is easily taken for the adapter in it.
        inner = folder / "adapter"
        hint = f"; {inner} has one" if (inner / path.name).is_file() else ""
        raise AdapterError(f"{folder} {what} {path.name}{hint}") from None
    # ValueError also covers text that is not UTF-8, and numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "r" not in fields:
        raise AdapterError(f"{path} is not an adapter's configuration: it has no 'r'")
    for name, plain in _PLAIN.items():
        if name == "fan_in_fan_out" and is_transposed:
            # This concerns the base's kernel. The adapter's factors do not change.
            continue
        if name in fields and fields[name] not in plain:
            raise NotImplementedError(
                f"{path} has {name}={fields[name]!r}, which is not supported; only "
                f"{plain[0]!r} is"
            )
    unknown = {n: v for n, v in fields.items() if n not in KNOWN_FIELDS and v}
    if unknown:
        warnings.warn(
            f"{path} has fields that jaxbnb does not know: {unknown!r:.300}; they are "
            "ignored",
            stacklevel=3,
        )
    loftq = fields.get("loftq_config") or {}
    init = fields.get("init_lora_weights")
    init = True if init is None or init in _STARTS else init
    try:
        return LoraConfig(
            r=fields["r"],
            lora_alpha=fields.get("lora_alpha", 8),
            target_modules=fields.get("target_modules") or "all-linear",
            exclude_modules=fields.get("exclude_modules"),
            layers_to_transform=fields.get("layers_to_transform"),
            layers_pattern=fields.get("layers_pattern"),
            use_rslora=bool(fields.get("use_rslora", False)),
            use_dora=bool(fields.get("use_dora", False)),
            lora_dropout=fields.get("lora_dropout") or 0.0,
            init_lora_weights=init,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            loftq_iter=loftq.get("loftq_iter", 1),
            bias=fields.get("bias") or "none",
            modules_to_save=fields.get("modules_to_save"),
            trainable_token_indices=fields.get("trainable_token_indices"),
            ensure_weight_tying=bool(fields.get("ensure_weight_tying", False)),
        )
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def make_fields(model: nnx.Module, layers: list[Adapted], name: str) -> dict[str, Any]:
    """Makes the contents of ``adapter_config.json``, in which layers are numbered."""
    config = layers[0].layer.adapters[name].config
    ranks, alphas = {}, {}
    for linear in layers:
        for each, rank in zip(
            linear.names, linear.layer.adapters[name].ranks, strict=True
        ):
            if rank:
                ranks[each] = rank
                alphas[each] = config.alpha_of(each, linear.path)
    fields = {
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": config.init_lora_weights,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": _choose_pattern(
            config.rank_pattern, config.rank_of, ranks, config.r
        ),
        "alpha_pattern": _choose_pattern(
            config.alpha_pattern, config.alpha_of, alphas, config.lora_alpha
        ),
        "target_modules": _find_target_modules(
            [each for linear in find_linears(model) for each in linear.names],
            set(ranks),
        ),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if config.init_lora_weights == "loftq":
        kernel: Any = get_param(layers[0].layer.base).get_value()
        bits = 8 * kernel.codes.nbytes // kernel.size
        fields["loftq_config"] = {"loftq_bits": bits, "loftq_iter": config.loftq_iter}
    return fields


def make_fields_in_files(
    model: nnx.Module,
    joined: Mapping[str, Piece],
    layers: Mapping[str, FileLayer],
    config: LoraConfig,
) -> dict[str, Any]:
    """Makes the fields that use names from the base model's files."""
    ranks = {name: piece.rank for name, piece in joined.items()}
    alphas = {n: get_alpha(piece, config) for n, piece in joined.items()}
    return {
        "fan_in_fan_out": isinstance(model, NamesLayers)
        and model.is_transposed_in_files(),
        "rank_pattern": _make_pattern(ranks, config.r),
        "alpha_pattern": _make_pattern(alphas, config.lora_alpha),
        "target_modules": _find_target_modules(
            {layer.name for layer in layers.values()}, set(joined)
        ),
    }


def _make_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {re.escape(n): value for n, value in values.items() if value != default}


def _choose_pattern(
    pattern: Mapping[str, Any],
    value_of: Callable[[str], Any],
    values: dict[str, Any],
    default: Any,
) -> dict[str, Any]:
    """Returns the user's pattern if it fits the numbered layers, or else a new one."""
    if all(value_of(name) == value for name, value in values.items()):
        return dict(pattern)
    return _make_pattern(values, default)


def _find_target_modules(every: Iterable[str], names: set[str]) -> list[str]:
    """Names each adapted layer by the shortest end of its path that is unambiguous."""
    others = [name for name in every if name not in names]
    shortest = set()
    for name in names:
        parts = name.split(".")
        suffixes = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
        free = (s for s in suffixes if not any(matches(p, [s]) for p in others))
        shortest.add(next(free, name))
    return sorted(shortest)
