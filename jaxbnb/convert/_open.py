"""open_checkpoint: opens whichever kind of checkpoint is at a path."""

import os

from jaxbnb.convert import _gguf_model, huggingface_folder
from jaxbnb.convert._checkpoint import Checkpoint
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert.hub import find_checkpoint


def open_checkpoint(
    path: str | os.PathLike[str], *, revision: str | None = None
) -> Checkpoint:
    """Opens a Hugging Face folder, a safetensors or a GGUF file; reads no weights yet.

    The checkpoint always has Hugging Face's names and fields. Quantised tensors of a
    GGUF file are decoded to float32 when they are read; the result has the quantisation
    error. The ``general.architecture`` of a GGUF file must be bloom, gemma2, gemma3,
    gpt2, gptneox, llama (Mixtral if it has experts), phi3, qwen2, qwen3, smollm3 or
    starcoder. Weights that bitsandbytes, GPTQ, AWQ, compressed-tensors, torchao,
    DeepSeek's fp8 or MXFP4 quantised can also be read as they are stored; see
    `Checkpoint.read_quantized`.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors`` or
            ``pytorch_model.bin``, or an index of shards of either; a ``.safetensors``
            or ``.bin`` file, which gets an empty config; or a file of GGUF version 2 or
            3. A ``.bin`` file needs torch, and code in it is not run. Or the name of a
            model on Hugging Face's hub; see `find_checkpoint`.
        revision: branch, tag or commit of a model on the hub.

    Returns:
        The checkpoint. It keeps no file open.

    Raises:
        FileNotFoundError: ``path`` does not exist, or cannot be downloaded.
        CheckpointError: the checkpoint is incomplete, damaged or contradicts itself.
        UnsupportedCheckpointError: it is in a form that jaxbnb does not read, e.g.
            float8 without scales, or quantised by another method.

    Example:
        >>> import json, pathlib, tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
        >>> weight = np.ones((4, 2), np.float32)
        >>> save_file({"lm_head.weight": weight}, folder / "model.safetensors")
        >>> checkpoint = open_checkpoint(folder)
        >>> checkpoint.config, checkpoint.tensors["lm_head.weight"].shape
        ({'model_type': 'toy'}, (4, 2))
        >>> checkpoint.read("lm_head.weight").sum().item()
        8.0
    """
    path = find_checkpoint(path, revision=revision)
    if path.is_dir():
        return huggingface_folder.open_folder(path)
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return huggingface_folder.open_file(path)
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path} is one file of a checkpoint; open its folder: {path.parent}"
        )
    return _gguf_model.open_gguf(path)
