"""Rules that choose the format of each layer, and the report of what they did."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp

from jaxbnb.core.config import QuantConfig, as_config
from jaxbnb.core.paths import matches

Rule = tuple[str | Sequence[str], QuantConfig | str | None]
# The name of such a rule in errors.
FORM: Final = "(layers, config) pairs"

# Smaller weights are not worth a line; min_quantized_size of optimizers is the same.
_LARGE: Final = 4096


class Report(list[str]):
    """The dotted paths of the layers that were quantised, and what was left alone.

    Attributes:
        left_alone: shapes, by dotted path, of the large floating-point weights that
            stay as they are, because they were skipped or no quantised layer can hold
            them. Large is at least two axes and 4096 elements.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Dict(up=nnx.Linear(64, 256, rngs=nnx.Rngs(0)),
        ...                  lm_head=nnx.Linear(256, 32, rngs=nnx.Rngs(1)))
        >>> report = jaxbnb.nnx.quantize_model(model)
        >>> report, report.left_alone
        (['up'], {'lm_head.kernel': (256, 32)})
    """

    # It is a list because most callers want only the layers.

    def __init__(self, layers: Iterable[str], weights: Mapping[str, Any]):
        super().__init__(layers)
        self.left_alone = {
            path: tuple(weight.shape)
            for path, weight in weights.items()
            if weight.ndim >= 2
            and weight.size >= _LARGE
            and jnp.issubdtype(weight.dtype, jnp.floating)
        }


def check_rules(rules: Any, form: str, sizes: Collection[int] = (2,)) -> None:
    """Raises TypeError unless rules are a list of tuples; a dict, for example, is not.

    Args:
        rules: rules of the caller.
        form: description of a rule, for the error.
        sizes: lengths that a rule may have.

    Example:
        >>> check_rules(["up"], "(layers, config) pairs")
        Traceback (most recent call last):
            ...
        TypeError: rules are (layers, config) pairs in a list; one of them is 'up'
    """
    if isinstance(rules, Mapping):
        raise TypeError(
            f"rules are {form} in a list, got a {type(rules).__name__}; give "
            "list(rules.items()) if its keys are what a rule begins with"
        )
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"rules are {form} in a list, got {rules!r:.200}")
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) not in sizes:
            raise TypeError(f"rules are {form} in a list; one of them is {rule!r:.200}")


def choose_formats(
    layers: Mapping[str, bool],
    config: QuantConfig | str,
    rules: Sequence[Rule],
    skip: str | Sequence[str],
    model: str,
    quantized: Mapping[str, str] | None = None,
) -> dict[str, QuantConfig]:
    """Chooses the format of each layer that is to be quantised.

    Args:
        layers: whether each layer is an embedding, by dotted path. Embeddings are
            quantised only by rules.
        config: format of layers that no rule names, or its name.
        rules: ``(layers, config)`` pairs; the first that names a layer decides.
        skip: layers to leave alone unless a rule names them.
        model: name of the model for errors.
        quantized: format of each layer that is already quantised, by dotted path.

    Raises:
        ValueError: no layer would be quantised, or a rule does not decide any layer.
        TypeError: a format is neither a config nor a name.

    Example:
        >>> from jaxbnb import QuantConfig
        >>> formats = choose_formats({"embed": True, "up": False, "head": False},
        ...     QuantConfig(), [(["embed"], QuantConfig("int8"))], ["head"], "Model")
        >>> {path: config.quant_type for path, config in formats.items()}
        {'embed': 'int8', 'up': 'nf4'}
    """
    config = as_config(config)
    choices = [None if choice is None else as_config(choice) for _, choice in rules]
    chosen: dict[str, QuantConfig] = {}
    deciding: set[int] = set()
    for path, is_embed in layers.items():
        named = (i for i, (names, _) in enumerate(rules) if matches(path, names))
        first = next(named, None)
        if first is not None:
            deciding.add(first)
            choice = choices[first]
        else:
            choice = None if is_embed or matches(path, skip) else config
        if choice is not None:
            chosen[path] = choice
    linears = [path for path, is_embed in layers.items() if not is_embed]
    done = f"; quantised already are {_by_format(quantized)}" if quantized else ""
    idle = [
        (names, choice and choice.quant_type)
        for i, ((names, _), choice) in enumerate(zip(rules, choices, strict=True))
        if i not in deciding
    ]
    if idle:
        raise ValueError(
            f"rules that decide over no layer of {model}: {idle}; its linear "
            f"layers are {linears}, its embeddings "
            f"{[path for path in layers if path not in linears]}{done}"
        )
    if quantized and not chosen:
        raise ValueError(
            f"{model} is quantised already: {_by_format(quantized)}. To change "
            "formats, decode it first, with dequantize_model, or in Linen "
            f"dequantize_params. Not quantised are {list(layers)}, and skip is {skip!r}"
        )
    if not chosen:
        raise ValueError(
            f"nothing to quantise in {model}: its linear layers are {linears}, and "
            f"skip is {skip!r}"
        )
    return chosen


def _by_format(quantized: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups layers by their format."""
    found: dict[str, list[str]] = {}
    for path, quant_type in quantized.items():
        found.setdefault(quant_type, []).append(path)
    return found
