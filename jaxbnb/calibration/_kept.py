"""Finished parts of a calibration, kept in files for the call that resumes it."""

import hashlib
import importlib.metadata
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.core.files import atomic_write


def open_folder(resume_dir: str | os.PathLike[str], determining: Any) -> Path:
    """Returns the folder for the parts of one calibration.

    Its name is a hash of everything that determines the parts. So a call with other
    weights, text or options does not find them.

    Args:
        resume_dir: parent of the folder; created if it is missing.
        determining: pytree of arrays and other values.

    Example:
        >>> import tempfile
        >>> parent = tempfile.mkdtemp()
        >>> open_folder(parent, {"seed": 0}) == open_folder(parent, {"seed": 0})
        True
        >>> open_folder(parent, {"seed": 0}) == open_folder(parent, {"seed": 1})
        False
    """
    # Another version, or another kind of device, may round differently.
    version = importlib.metadata.version("jaxbnb"), jax.__version__
    total = hashlib.sha256(repr((version, jax.default_backend())).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(determining):
        total.update(jax.tree_util.keystr(path).encode())
        if not hasattr(leaf, "dtype"):
            total.update(repr(leaf).encode())
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    folder = Path(resume_dir) / total.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recall(
    folder: Path | None, name: str, compute: Callable[[], Sequence[np.ndarray]]
) -> Sequence[np.ndarray]:
    """Returns the arrays of a part from its file; if there is none, computes them.

    A file appears only when it is complete. One that is damaged is replaced.

    Args:
        folder: folder of the files; None to compute without keeping anything.
        name: name of the part.
        compute: function that computes it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> def compute():
        ...     print("computed")
        ...     return [np.arange(2)]
        >>> for _ in range(2):
        ...     print(recall(folder, "part", compute))
        computed
        [array([0, 1])]
        [array([0, 1])]
    """
    if folder is None:
        return compute()
    path = folder / f"{name}.npz"
    try:
        # NumPy would leave a damaged file open.
        with path.open("rb") as file:
            arrays = np.load(file)
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        arrays = compute()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays)
    return arrays
