"""open_checkpoint: which kind of checkpoint lies at a path."""

import os
from pathlib import Path

from jaxbnb.convert import _gguf_model, huggingface_folder
from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Hugging Face folder, a safetensors or a GGUF file; reads no weights yet.

    All are presented in Hugging Face's names and fields. Of a GGUF file the quantised
    tensors are decoded to float32 as they are read: what they stand for, not the
    weights they were made from. Its ``general.architecture`` is one of gemma2, gemma3,
    gpt2, gptneox, llama (with experts a Mixtral), phi3, qwen2, qwen3 and smollm3. What
    bitsandbytes quantised, to 4 or 8 bits, can be had as it is stored, see
    `Checkpoint.read_quantized`.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors`` or
            ``pytorch_model.bin`` (or an index of shards; the latter needs torch, and
            runs no code that it may hold); a ``.safetensors`` or ``.bin`` file, whose
            config is then empty; or a file of GGUF version 2 or 3. Nothing is
            downloaded.

    Returns:
        The checkpoint. It holds no file open.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: what is there is incomplete, damaged or contradicts itself.
        UnsupportedCheckpointError: a form that jaxbnb does not read, e.g. float8.

    Example:
        >>> import json, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
        >>> weight = np.ones((4, 2), np.float32)
        >>> save_file({"lm_head.weight": weight}, folder / "model.safetensors")
        >>> checkpoint = open_checkpoint(folder)
        >>> checkpoint.config, checkpoint.tensors["lm_head.weight"].shape
        ({'model_type': 'toy'}, (4, 2))
        >>> checkpoint.read("lm_head.weight").sum().item()
        8.0
    """
    path = Path(path)
    if path.is_dir():
        return huggingface_folder.open_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. jaxbnb downloads nothing; get a model's "
            "folder first, e.g. with `hf download <model> --local-dir <folder>`"
        )
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return huggingface_folder.open_file(path)
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path} is one file of a checkpoint; open its folder: {path.parent}"
        )
    return _gguf_model.open_gguf(path)
