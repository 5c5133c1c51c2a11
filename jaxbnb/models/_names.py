"""The names of our models' variables in Hugging Face's checkpoints."""

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from jaxbnb.lora.file_names import FileLayer
from jaxbnb.models._encoder_decoder_config import ModelConfig, get_layer_config
from jaxbnb.models.families import FAMILIES, Family, get_family

_LEAVES: Final = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "sinks": "sinks",
}


def torch_name(
    path: tuple[str, ...],
    index: tuple[int, ...] = (),
    family: Family = FAMILIES["llama"],
) -> str:
    """Returns the name of the tensor that a variable holds, for one layer or expert.

    A ``kernel`` holds its tensor transposed: ``(in, out)`` here, ``(out, in)`` there.

    Args:
        path: path of the variable.
        index: number of the layer, and of the expert, if the variable is stacked; see
            `count_stacks`.
        family: family that decides the names.

    Example:
        >>> torch_name(("model", "norm", "scale"))
        'model.norm.weight'
        >>> path = ("model", "layers", "layer", "mlp", "up_proj", "kernel")
        >>> torch_name(path, (7,))
        'model.layers.7.mlp.up_proj.weight'
        >>> torch_name(path, (7,), FAMILIES["gpt2"])
        'transformer.h.7.mlp.c_fc.weight'
    """
    module, inside = split_module(path)
    if path[-1] not in _LEAVES:
        # A parameter by itself, which is not called a weight.
        return family.names[".".join(path)]
    if inside and module not in family.names:
        default = inside.replace(".layer.", ".{}.")
        name = f"{family.layers}.{{}}.{family.names.get(inside, default)}"
    else:
        name = family.names.get(module, module)
    name = name.format(*index)
    if family.stacked_experts and count_stacks(path) > 1:
        return f"{name}_bias" if path[-1] == "bias" else name
    return f"{name}.{_LEAVES[path[-1]]}"


def find_param_dtype(variables: Mapping[Any, Any]) -> np.dtype:
    """Returns the dtype of a model's variables by path: that of its norms."""
    return next(
        np.dtype(variable.get_value().dtype)
        for path, variable in variables.items()
        if path[-1] == "scale"
    )


def split_module(path: tuple[str, ...]) -> tuple[str, str]:
    """Returns the dotted path of a variable's module, and its part inside a layer.

    Example:
        >>> split_module(("model", "layers", "layer", "mlp", "up_proj", "kernel"))
        ('model.layers.layer.mlp.up_proj', 'mlp.up_proj')
    """
    module = ".".join(path[:-1])
    return module, module.partition("layers.layer.")[2]


def count_stacks(path: tuple[str, ...]) -> int:
    """Counts the leading axes of a variable that number layers, and experts in them.

    Example:
        >>> count_stacks(("model", "layers", "layer", "mlp", "up_proj", "kernel"))
        1
    """
    return path.count("layer")


def file_layer(name: str, config: ModelConfig) -> FileLayer:
    """Returns the module that holds a linear layer in adapters' files of its family.

    Args:
        name: dotted path of the layer, with its number.
        config: config of the model.

    Example:
        >>> from jaxbnb.models import DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=4, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        ...     head_dim=2, model_type="gpt2")
        >>> name, rows, total = file_layer("model.layers.1.self_attn.k_proj", config)
        >>> name, rows.tolist(), total
        ('transformer.h.1.attn.c_attn', [4, 5, 6, 7], 12)
    """
    if name == "lm_head":
        return FileLayer(get_family(config).head)
    family, parts = get_family(config), name.split(".")
    index = tuple(int(part) for part in parts if part.isdigit())
    path = tuple("layer" if part.isdigit() else part for part in parts)
    path = (*path, "kernel")
    if family.stacked_experts and count_stacks(path) > 1:
        # An expert is not a module in transformers, so PEFT has no name for its layers.
        return FileLayer(torch_name(path, index).removesuffix(".weight"))
    theirs = torch_name(path, index, family).removesuffix(".weight")
    theirs = replace_start(theirs, family.in_memory)
    fused = family.find_rows(split_module(path)[1], get_layer_config(config))
    return FileLayer(theirs, *fused) if fused else FileLayer(theirs)


def full_name(name: str, family: Family) -> str:
    """Translates an older name in a family's files to the name it has now."""
    # Folders saved with adapters in the model, merged or not, have this in their names.
    return replace_start(name.replace(".base_layer.", "."), family.renamed)


def replace_start(name: str, starts: Mapping[str, str]) -> str:
    """Replaces the starts of a name that regular expressions match."""
    for start, instead in starts.items():
        name = re.sub("^" + start, instead, name)
    return name


def current_name(name: str, config: ModelConfig) -> str:
    """Translates a module's name from any version of transformers to adapters' files.

    Example:
        >>> from jaxbnb.models import EncoderConfig
        >>> config = EncoderConfig.from_huggingface(
        ...     {"model_type": "vit", "hidden_size": 4, "intermediate_size": 8,
        ...      "num_hidden_layers": 1, "num_attention_heads": 2,
        ...      "architectures": ["ViTForImageClassification"]})
        >>> current_name("vit.encoder.layer.0.intermediate.dense", config)
        'vit.layers.0.mlp.fc1'
    """
    family = get_family(config)
    name = replace_start(full_name(name, family), family.in_memory)
    return family.head if name == family.names.get("lm_head") else name


class NamedInFiles:
    """What `jaxbnb.lora.file_names.NamesLayers` asks of a model, by its config."""

    config: Any

    def file_layer(self, name: str) -> FileLayer:
        """Says which module of PEFT's files for the family holds a linear layer.

        Args:
            name: dotted path of the layer, with its number:
                "model.layers.3.self_attn.q_proj".
        """
        return file_layer(name, self.config)

    def file_name(self, name: str) -> str:
        """Translates a module's name of any version of transformers to PEFT's files."""
        return current_name(name, self.config)

    def is_transposed_in_files(self) -> bool:
        """Whether files of this family hold kernels as ``(in, out)``."""
        return not get_family(self.config).transposed

    def peft_task(self) -> str | None:
        """Returns PEFT's ``task_type``, by which it chooses a class; None for any.

        PEFT's class for encoder-decoders passes tokens, which Whisper does not take,
        and its class for classifiers expects the head among what was trained.
        """
        tasks = {"encoder": None, "encoder-decoder": "SEQ_2_SEQ_LM"}
        reads_audio = getattr(self.config, "num_mel_bins", 0)
        kind = get_family(self.config).kind
        return None if reads_audio else tasks.get(kind, "CAUSAL_LM")
