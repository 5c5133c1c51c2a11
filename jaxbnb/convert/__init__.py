"""Checkpoints in and out: the only package that knows torch's conventions."""

from jaxbnb.convert._bitsandbytes_optimizer import (
    optimizer_state_from_bitsandbytes,
    optimizer_state_to_bitsandbytes,
)
from jaxbnb.convert._checkpoint import Checkpoint, TensorInfo
from jaxbnb.convert._convert import convert_checkpoint, plan_conversion
from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.convert._gguf_tokenizer import gguf_tokenizer
from jaxbnb.convert._open import open_checkpoint
from jaxbnb.convert._state_dict import load_state_dict, load_variables
from jaxbnb.convert._state_dict_assignment import StateDictReport
from jaxbnb.convert._state_file import load_state, save_state
from jaxbnb.convert._tokenizer import Tokenizer, load_tokenizer
from jaxbnb.convert._tokenizer_save import add_tokens, save_tokenizer
from jaxbnb.convert.hub import find_checkpoint
from jaxbnb.convert.plan import TensorReport, report_table

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MissingTensorError",
    "StateDictReport",
    "TensorInfo",
    "TensorReport",
    "Tokenizer",
    "UnsupportedCheckpointError",
    "add_tokens",
    "convert_checkpoint",
    "find_checkpoint",
    "gguf_tokenizer",
    "load_state",
    "load_state_dict",
    "load_tokenizer",
    "load_variables",
    "open_checkpoint",
    "optimizer_state_from_bitsandbytes",
    "optimizer_state_to_bitsandbytes",
    "plan_conversion",
    "report_table",
    "save_state",
    "save_tokenizer",
]
