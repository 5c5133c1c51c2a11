"""Copies the tokenizer of a checkpoint to the folder that it is converted to."""

import shutil
import warnings
from pathlib import Path
from typing import Final

from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.convert._gguf import read_gguf
from jaxbnb.convert._gguf_tokenizer import read_context_length
from jaxbnb.convert._tokenizer import load_tokenizer
from jaxbnb.convert._tokenizer_save import write_tokenizer

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Folder of chat templates other than the default one.
_TEMPLATES: Final = "additional_chat_templates"


def carry_tokenizer(source: Checkpoint, folder: Path) -> None:
    """Writes the tokenizer of the source, if it has one, to a folder."""
    if source.path.is_dir():
        for name in _TOKENIZER_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        for path in sorted((source.path / _TEMPLATES).glob("*.jinja")):
            (folder / _TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / _TEMPLATES / path.name)
        return
    if not source.config:
        return
    try:
        tokenizer = load_tokenizer(source.path)
    except (ImportError, UnsupportedCheckpointError) as error:
        warnings.warn(f"wrote no tokenizer: {error}", stacklevel=3)
        return
    length = read_context_length(read_gguf(source.path))
    fields = {} if length is None else {"model_max_length": length}
    write_tokenizer(tokenizer, folder, **fields)
