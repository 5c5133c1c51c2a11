"""Models by name: a folder or file here, or else one of Hugging Face's hub."""

import os
import re
from pathlib import Path
from typing import Any, Final

from jaxbnb.core.extras import import_extra

# A file in a repository may be a GGUF. A revision is a branch, a tag or a commit.
_NAME: Final = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>\w[\w./-]*\.gguf))?"
    r"(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
# Config, tokenizer and chat templates.
_DESCRIPTION: Final = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
# Safetensors first: a repository that has both has the same weights twice.
_WEIGHTS: Final = ("*.safetensors", "*.bin")
# The same weights for other programs.
_IGNORED: Final = ("original/*", "consolidated*", "onnx/*", "metal/*", "runs/*")


def find_checkpoint(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    has_weights: bool = True,
) -> Path:
    """Returns the path of a checkpoint; downloads it if it is not here.

    A path that exists is returned as it is, and nothing is looked up. Only if there is
    nothing at ``path``, and it can be the name of a model on Hugging Face's hub, the
    library huggingface_hub downloads what a model needs to its cache, or finds it
    there. With ``HF_HUB_OFFLINE=1`` it only looks in the cache.

    Args:
        path: path of a folder or file, or the name of a model: "org/name",
            "org/name@revision", or "org/name/model-Q4_K_M.gguf" for a GGUF file.
        revision: branch, tag or commit of a model on the hub; None for the main branch.
        has_weights: whether to download the weights, too, besides the config and the
            tokenizer. A GGUF file is always downloaded.

    Returns:
        The path, or the path of the model in huggingface_hub's cache.

    Raises:
        FileNotFoundError: there is nothing at ``path``, and it cannot be a name; or the
            model could not be downloaded. The message has the reason.
        ImportError: a model must be downloaded, and huggingface_hub is not installed.
        ValueError: a revision is given for a path that exists, or given twice.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> find_checkpoint(folder) == Path(folder)
        True
        >>> find_checkpoint(
        ...     "HuggingFaceTB/SmolLM2-135M", revision="main")  # doctest: +SKIP
    """
    local, text = Path(path), os.fspath(path)
    if local.exists():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for a model on Hugging Face's hub, and "
                f"{text} is a path that exists; leave revision out"
            )
        return local
    found = _NAME.fullmatch(text)
    if found is None:
        raise FileNotFoundError(
            f"{text}: no such file or folder, and not the name of a model on Hugging "
            "Face's hub, such as org/name"
        )
    repo, file, named = found.groups()
    if named is not None and revision is not None:
        raise ValueError(f"{text} has a revision; leave out revision={revision!r}")
    library = import_extra(
        "huggingface_hub",
        needed_by=f"{text} is not a file or folder here, and downloading it",
        extra="hub",
    )
    if file is not None:
        # Either the file itself, or all files that it was split into.
        pattern = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", file)
        return _download(library, repo, revision or named, (pattern,)) / file
    folder = _download(library, repo, revision or named, _DESCRIPTION)
    for pattern in _WEIGHTS if has_weights else ():
        _download(library, repo, revision or named, (pattern,))
        if any(folder.glob(pattern)):
            break
    return folder


def _download(
    library: Any, repo: str, revision: str | None, patterns: tuple[str, ...]
) -> Path:
    """Returns the folder in the cache that now has all files that match a pattern."""
    try:
        return Path(
            library.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_IGNORED),
            )
        )
    except OSError as error:
        # Errors of a disk have a number. They are not about the name.
        if error.errno is not None:
            raise
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"{repo}{at}: no such file or folder here, and Hugging Face's hub did not "
            f"give it: {error}"
        ) from error
