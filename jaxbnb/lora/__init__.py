"""LoRA adapters on linear layers and embeddings, quantised or in full precision."""

from jaxbnb.lora._active import adapter_rows, disable_adapters, set_adapter
from jaxbnb.lora._adapter import adapter_params, add_adapter
from jaxbnb.lora._combine import combine_adapters
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._embed import LoraEmbed
from jaxbnb.lora._factors import LoraAdapter
from jaxbnb.lora._layer import LoraLinear
from jaxbnb.lora._merge import Merged, merge, unmerge
from jaxbnb.lora._peft_config import AdapterError
from jaxbnb.lora._peft_load import (
    check_adapter_files,
    load_adapter,
    saved_vocab_size,
)
from jaxbnb.lora._peft_save import save_adapter
from jaxbnb.lora._prepare import Prepared, prepare_for_training
from jaxbnb.lora._targets import adapter_names
from jaxbnb.lora._tokens import TrainedTokens
from jaxbnb.lora._trained import TrainedModule
from jaxbnb.lora._tree import lora_tree

__all__ = [
    "AdapterError",
    "LoraAdapter",
    "LoraConfig",
    "LoraEmbed",
    "LoraLinear",
    "Merged",
    "Prepared",
    "TrainedModule",
    "TrainedTokens",
    "adapter_names",
    "adapter_params",
    "adapter_rows",
    "add_adapter",
    "check_adapter_files",
    "combine_adapters",
    "disable_adapters",
    "load_adapter",
    "lora_tree",
    "merge",
    "prepare_for_training",
    "save_adapter",
    "saved_vocab_size",
    "set_adapter",
    "unmerge",
]
