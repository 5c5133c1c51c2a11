"""LoRA adapters over full-precision or quantised linear layers."""

from jaxbnb.lora._adapter import LoraConfig, LoraLinear, add_adapter
from jaxbnb.lora._peft import AdapterError, load_adapter, save_adapter

__all__ = [
    "AdapterError",
    "LoraConfig",
    "LoraLinear",
    "add_adapter",
    "load_adapter",
    "save_adapter",
]
