"""LoRA adapters on linear layers, quantised or in full precision."""

from jaxbnb.lora._active import adapter_rows, disable_adapters, set_adapter
from jaxbnb.lora._adapter import adapter_params, add_adapter
from jaxbnb.lora._combine import combine_adapters
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._layer import LoraAdapter, LoraLinear
from jaxbnb.lora._merge import Merged, merge, unmerge
from jaxbnb.lora._peft_config import AdapterError
from jaxbnb.lora._peft_load import load_adapter
from jaxbnb.lora._peft_save import save_adapter
from jaxbnb.lora._prepare import Prepared, prepare_for_training
from jaxbnb.lora._targets import adapter_names

__all__ = [
    "AdapterError",
    "LoraAdapter",
    "LoraConfig",
    "LoraLinear",
    "Merged",
    "Prepared",
    "adapter_names",
    "adapter_params",
    "adapter_rows",
    "add_adapter",
    "combine_adapters",
    "disable_adapters",
    "load_adapter",
    "merge",
    "prepare_for_training",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
