"""save_state, load_state: any pytree of arrays as one safetensors file."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.convert import safetensors_files
from jaxbnb.convert._checkpoint import TensorInfo
from jaxbnb.convert._errors import CheckpointError
from jaxbnb.convert.format_version import check_version
from jaxbnb.core import QuantizedArray
from jaxbnb.core.files import atomic_write
from jaxbnb.core.processes import (
    check_shared,
    fetch,
    on_first,
    put,
    put_like,
    raise_together,
)

# Raised when an older jaxbnb could not read a file.
VERSION: Final = 1
_KIND: Final = "jaxbnb.state"
_KEY: Final = "key:"


def save_state(tree: Any, path: str | os.PathLike[str]) -> None:
    """Writes a pytree of arrays to a safetensors file, for `load_state`.

    It may hold anything that a run needs: quantised parameters, an `nnx.State`, the
    state of any optimizer, random keys, numbers of steps. Quantised arrays are written
    as they are. The names in the file are the paths in the tree, with dots. Host memory
    holds one array at a time, and the file appears only when it is complete.

    Under `jax.distributed`, all processes call this, on a folder that they share.
    Process 0 writes.

    Args:
        tree: pytree of JAX or NumPy arrays and numbers, on any devices.
        path: file to write; it is replaced.

    Raises:
        ValueError: two arrays have the same name, or a leaf is not an array.
        OSError: writing failed. The file is as it was.
        ProcessError: another process failed, or the folder is not shared.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> params = {"kernel": jaxbnb.quantize(jnp.ones((64, 64)), "nf4")}
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> save_state({"params": params, "step": 3}, path)
        >>> load_state(path, {"params": params, "step": 0})["step"]
        3

    References:
        https://huggingface.co/docs/safetensors
    """
    path = Path(path)
    check_shared(path.parent)
    leaves, formats = _list_leaves(tree)
    dtypes = {name: _name_dtype(name, leaf) for name, leaf in leaves.items()}
    infos = {name: _describe(leaf) for name, leaf in leaves.items()}
    metadata = {
        "format": _KIND,
        "version": str(VERSION),
        "dtypes": json.dumps(dtypes),
        "formats": json.dumps(formats),
    }
    header, starts = safetensors_files.layout(infos, metadata)
    arrays = (_encode(leaves[name]) for name in starts)
    what = f"writing {path}"
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            temporary = stack.enter_context(atomic_write(path))
            error = safetensors_files.write_file(temporary, header, arrays)
        # All processes help to gather the arrays, even if writing has failed.
        for _ in arrays:
            pass
        raise_together(what, error)
        publish = stack.pop_all()
        on_first(what, publish.close)


def load_state(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads what `save_state` wrote.

    Args:
        path: the file.
        like: pytree of the same structure. Its arrays say where the new ones go: on the
            same devices, divided in the same way, which may differ from where they were
            when they were saved. A ``jax.ShapeDtypeStruct`` may have a sharding.

    Returns:
        A tree like ``like``, with the values of the file.

    Raises:
        CheckpointError: the file is damaged, or has other arrays than ``like``; the
            message lists them.
        UnsupportedCheckpointError: a newer jaxbnb wrote the file.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    infos = safetensors_files.read_header(path)
    metadata = safetensors_files.read_metadata(path)
    if metadata.get("format") != _KIND:
        raise CheckpointError(
            f"{path} was not written by jaxbnb.convert.save_state; weights of a model "
            "are for jaxbnb.load_pretrained"
        )
    check_version(path, metadata.get("version"), VERSION)
    leaves, formats = _list_leaves(like)
    dtypes = json.loads(metadata["dtypes"])
    _check(path, infos, dtypes, leaves)
    found_formats = json.loads(metadata["formats"])
    if found_formats != formats:
        differing = sorted(
            name
            for name in {**formats, **found_formats}
            if formats.get(name) != found_formats.get(name)
        )
        raise CheckpointError(
            f"{path} holds other formats: {differing[0]} is "
            f"{found_formats.get(differing[0])}, not {formats.get(differing[0])}"
        )
    values = [
        _place(_decode(safetensors_files.read_tensor(path, name), dtypes[name]), leaf)
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _list_leaves(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the arrays of a tree, and the formats of quantised ones, by name."""
    # Flax has changed how it calls the value of a variable.
    tree = jax.tree.map(
        lambda x: x.get_value() if isinstance(x, nnx.Variable) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    paths = jax.tree_util.tree_leaves_with_path(tree)
    names = [_name(path) for path, _ in paths]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(
            f"several arrays would have the name {min(repeated)!r} in the file; rename "
            "keys that contain dots"
        )
    quantised = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    formats = {
        _name(path): f"{x.quant_type}, {x.shape}, blocks of {x.block_size} on {x.axis}"
        for path, x in quantised
        if isinstance(x, QuantizedArray)
    }
    return dict(zip(names, (leaf for _, leaf in paths), strict=True)), formats


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _name_dtype(name: str, leaf: Any) -> str:
    """Returns the dtype of an array; the file may not have it."""
    if _is_key(leaf):
        return f"{_KEY}{jax.random.key_impl(leaf)}"
    dtype = np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if dtype not in _STORED and dtype.itemsize != 1:
        raise ValueError(f"{name} has dtype {dtype}, which safetensors does not have")
    return dtype.name


_STORED: Final = frozenset(safetensors_files.DTYPES.values())


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> TensorInfo:
    """Returns the shape and dtype that an array has in the file."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return TensorInfo(data.shape, np.dtype(data.dtype))
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    dtype = np.dtype(leaf.dtype)
    return TensorInfo(leaf.shape, dtype if dtype in _STORED else np.dtype(np.uint8))


def _encode(leaf: Any) -> np.ndarray:
    array = fetch(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return array if array.dtype in _STORED else array.view(np.uint8)


def _decode(array: np.ndarray, dtype: str) -> Any:
    if dtype.startswith(_KEY):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=dtype[len(_KEY) :])
    # JAX's names include those that NumPy lacks.
    return array.view(jnp.dtype(dtype))


def _place(value: Any, leaf: Any) -> Any:
    """Returns a value as its place has it: on devices, in NumPy, or as a number."""
    if isinstance(leaf, jax.Array):
        return put_like(value, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        if leaf.sharding is None:
            return jnp.asarray(value)
        return put(value, leaf.sharding)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value)


def _check(
    path: Path,
    infos: Mapping[str, TensorInfo],
    dtypes: Mapping[str, str],
    leaves: Mapping[str, Any],
) -> None:
    """Raises CheckpointError unless a file has just these arrays."""
    problems = [f"missing: {name}" for name in leaves if name not in infos]
    problems += [f"unexpected: {name}" for name in infos if name not in leaves]
    for name, leaf in leaves.items():
        want, dtype = _describe(leaf).shape, _name_dtype(name, leaf)
        if name in infos and (infos[name].shape, dtypes.get(name)) != (want, dtype):
            problems.append(
                f"{name} is {dtypes.get(name)}{list(infos[name].shape)}, not "
                f"{dtype}{list(want)}"
            )
    if problems:
        raise CheckpointError(
            f"{path} holds another state:\n  " + "\n  ".join(problems[:20])
        )
