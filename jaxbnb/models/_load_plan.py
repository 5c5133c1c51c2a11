"""LoadPlan: a model without values, and where the tensors of a checkpoint go in it."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.convert import (
    Checkpoint,
    CheckpointError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._encoder import EncoderModel
from jaxbnb.models._encoder_config import EncoderConfig
from jaxbnb.models._encoder_decoder_config import (
    EncoderDecoderConfig,
    ModelConfig,
    read_model_config,
)
from jaxbnb.models._encoder_decoder_lm import EncoderDecoderLM
from jaxbnb.models._places import (
    Place,
    check_count,
    check_tensors,
    find_places,
    is_redundant,
    with_full_names,
)
from jaxbnb.models._stored import (
    STORED,
    find_decoded,
    find_stored_formats,
    keep_stored,
)
from jaxbnb.models._tied import resolve_tied_head
from jaxbnb.models._vision import VisionLM
from jaxbnb.models._vision_config import VisionLMConfig
from jaxbnb.models.families import get_family
from jaxbnb.nnx import quantize_model

Model: TypeAlias = CausalLM | EncoderDecoderLM | EncoderModel
# Heads, and what reads images: it has few weights, and a decoder amplifies its errors.
_SKIP: Final = r"lm_head|head\.out_proj|vision\..*|connector"
_FLOATS: Final = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """A model without values, and the places in it of a checkpoint's tensors.

    Attributes:
        checkpoint: the checkpoint, with the names that transformers uses now.
        config: config of the model.
        quant: format that linear layers are quantised to; None for no quantisation.
        graphdef: the model's structure.
        variables: its variables by path, without values.
        places: places of each tensor's parts, by the tensor's name.
        decoded: weights to warn about, because they are decoded, and their encodings.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    quant: QuantConfig | None
    graphdef: Any
    variables: dict[Any, Any]
    places: dict[str, list[Place]]
    decoded: Mapping[str, str]


def prepare(
    path: str | os.PathLike[str],
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
) -> LoadPlan:
    """Plans what `load_pretrained` will do. Raises its errors, and reads no weights."""
    is_stored = quant == STORED
    quant = None if quant is None or is_stored else as_config(quant)
    checkpoint = open_checkpoint(path)
    config = _read_config(checkpoint)
    checkpoint = with_full_names(checkpoint, get_family(config))
    check_count(checkpoint, config)
    checkpoint = resolve_tied_head(checkpoint, config)
    config = _read_config(checkpoint)
    dtype = jnp.dtype(_check_dtype(dtype) or _find_common_dtype(checkpoint, config))
    formats: dict[str, QuantConfig] = {}
    decoded: Mapping[str, str] = {}
    variables: dict[Any, Any]
    if is_stored or checkpoint.quantized or checkpoint.stored is not None:
        abstract = nnx.eval_shape(lambda: make_model(config, None, dtype, {}))
        variables = dict(nnx.to_flat_state(nnx.state(abstract)))
        names: dict[Any, list[str]] = {}
        for name, where in find_places(variables, config).items():
            for place in where:
                names.setdefault(place.path, []).append(name)
        if is_stored:
            checkpoint = keep_stored(checkpoint, names)
        if checkpoint.quantized:
            formats = find_stored_formats(checkpoint, quant, names)
        if quant is None:
            decoded = find_decoded(checkpoint, names, is_asked=is_stored)
    abstract = nnx.eval_shape(lambda: make_model(config, quant, dtype, formats))
    graphdef, state = nnx.split(abstract)
    variables = dict(nnx.to_flat_state(state))
    places = find_places(variables, config)
    check_tensors(checkpoint, config, places)
    return LoadPlan(checkpoint, config, quant, graphdef, variables, places, decoded)


def _check_dtype(dtype: jax.typing.DTypeLike | None) -> jax.typing.DTypeLike | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be floating, e.g. bfloat16, got {jnp.dtype(dtype)}; quant= "
            "makes the weights smaller"
        )
    return dtype


def merge(graphdef: Any, variables: dict[Any, Any]) -> Any:
    """Builds the model from its variables by path."""
    return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))


def _read_config(checkpoint: Checkpoint) -> ModelConfig:
    is_read = checkpoint.quantized or checkpoint.decoded
    if checkpoint.config.get("quantization_config") and not is_read:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised already, as its quantization_config says; "
            "load the original checkpoint, with quant= to quantise it"
        )
    if not checkpoint.config and checkpoint.path.is_file():
        raise CheckpointError(
            f"{checkpoint.path} is a file of weights without a config.json that "
            "describes the model; give the folder that holds both, e.g. "
            f"{checkpoint.path.parent}"
        )
    try:
        return read_model_config(checkpoint.config)
    except (NotImplementedError, ValueError) as error:
        error.add_note(f"This is the config of {checkpoint.path}.")
        raise


def _find_common_dtype(checkpoint: Checkpoint, config: ModelConfig) -> np.dtype:
    dtypes = {
        info.dtype
        for name, info in checkpoint.tensors.items()
        if not is_redundant(name, config)
    }
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {*_FLOATS} else _FLOATS[0]


def make_model(
    config: ModelConfig,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    formats: Mapping[str, QuantConfig],
) -> Any:
    """Makes a model, quantised to a single format, to ``formats`` by path, or not."""
    options: Any = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
    if isinstance(config, EncoderDecoderConfig):
        model: Any = EncoderDecoderLM(config, **options)
    elif isinstance(config, EncoderConfig):
        model = EncoderModel(config, **options)
    elif isinstance(config, VisionLMConfig):
        model = VisionLM(config, **options)
    else:
        model = CausalLM(config, **options)
    if quant is not None:
        quantize_model(model, quant, skip=_SKIP)
    if formats:
        rules = [([path], chosen) for path, chosen in formats.items()]
        quantize_model(model, rules=rules, skip=".*")
    return model
