"""The processes of a run under `jax.distributed`: what they exchange and agree on.

Every function here is collective: all processes call it, in the same order. Without
`jax.distributed` there is one process, and nothing waits.
"""

import contextlib
import os
import pickle
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxbnb.core.files import atomic_folder

_T = TypeVar("_T")
# Sizes of messages are rounded up to powers of this, since each size is compiled.
_GROWTH: Final = 8
# Statuses of a collective whose other processes do not answer. Others, such as
# RESOURCE_EXHAUSTED, are faults of this process.
_LOST: Final = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    "|UNKNOWN): "
)


class ProcessError(RuntimeError):
    """Another process of the run has failed, or differs from this one."""


def fetch(x: Any) -> np.ndarray:
    """Returns a whole array, wherever its parts are.

    Args:
        x: array; its parts may be on the devices of several processes.

    Example:
        >>> import jax.numpy as jnp
        >>> fetch(jnp.arange(3))
        array([0, 1, 2], dtype=int32)
    """
    is_spread = isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    )
    return _all_gather(x) if is_spread else np.asarray(x)


def put(
    x: Any,
    sharding: jax.sharding.Sharding,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Puts an array, which every process has, on devices of all processes.

    `jax.device_put` would first compare the values of all processes. This uses only
    those parts of a NumPy array that go to devices of this process.

    Args:
        x: array with the same values in every process, or already on the devices.
        sharding: where to put it.
        dtype: dtype to cast a NumPy array to; None to leave it.
    """
    if isinstance(x, jax.Array):
        if sharding.is_fully_addressable or not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    array = np.asarray(x)
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if sharding.is_fully_addressable:
        return jax.device_put(array.astype(dtype, copy=False), sharding)
    # Several devices may hold the same part, and it may come from a file.
    parts: dict[str, np.ndarray] = {}

    def read(part: Any) -> np.ndarray:
        key = str(part)
        if key not in parts:
            parts[key] = np.array(array[part], dtype)
        return parts[key]

    return jax.make_array_from_callback(array.shape, sharding, read, dtype=dtype)


def put_like(x: Any, like: jax.Array) -> jax.Array:
    """Puts an array where another is, bound to its devices only if the other is.

    Args:
        x: see `put`.
        like: array on a device or a host.
    """
    if like.committed:
        return put(x, like.sharding)
    is_free = isinstance(x, jax.Array) and not x.committed
    free = x if is_free else jnp.asarray(np.asarray(x))
    is_on_host = jax.typeof(like).memory_space == jax.memory.Space.Host
    return jax.device_put(free, jax.memory.Space.Host) if is_on_host else free


def any_of(flag: int) -> int:
    """Returns the largest of the numbers that the processes give."""
    if jax.process_count() == 1:
        return flag
    return int(_all_gather(np.int32(flag)).max())


def gather(what: str, compute: Callable[[], _T]) -> list[_T]:
    """Returns what each process computes, in their order.

    Args:
        what: what is computed, for errors, e.g. "reading the data".
        compute: function without arguments and without collectives. Its result is
            pickled.

    Raises:
        ProcessError: it failed in another process. Where it failed, the error is that
            of ``compute``.

    Example:
        >>> gather("counting", lambda: 7)
        [7]
    """
    if jax.process_count() == 1:
        return [compute()]
    value, error = None, None
    try:
        value = compute()
    # Any error, even of a signal: the others wait for this process.
    except BaseException as caught:
        error = caught
    problem = None if error is None else f"{type(error).__name__}: {error}"
    found = [pickle.loads(part) for part in _exchange(pickle.dumps((value, problem)))]
    if error is not None:
        raise error
    for number, (_, problem) in enumerate(found):
        if problem is not None:
            raise ProcessError(f"process {number} failed in {what}: {problem}")
    return [value for value, _ in found]


def on_first(what: str, compute: Callable[[], _T]) -> _T:
    """Returns what process 0 computes, in all processes.

    Args:
        what: see `gather`, also for the errors.
        compute: see `gather`; the other processes do not call it.

    Example:
        >>> on_first("writing a file", lambda: "written")
        'written'
    """

    def compute_on_first() -> Any:
        return compute() if jax.process_index() == 0 else None

    return gather(what, compute_on_first)[0]


def raise_together(what: str, error: Exception | None) -> None:
    """Raises an error that this process has kept, and `ProcessError` in the others.

    Args:
        what: see `gather`.
        error: error of this process; None if it has none.
    """

    def raise_it() -> None:
        if error is not None:
            raise error

    gather(what, raise_it)


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """Raises ProcessError, in all processes, if any value differs between them.

    Args:
        what: what has the values, e.g. "the config".
        values: values that can be pickled, by name.
    """
    first, *others = gather(f"comparing {what}", lambda: dict(values))
    problems = [
        f"{name} is {other.get(name)!r} in process {number} and {first.get(name)!r} in "
        "process 0"
        for number, other in enumerate(others, 1)
        for name in {**first, **other}
        if other.get(name) != first.get(name)
    ]
    if problems:
        raise ProcessError(
            f"the processes of one run must have the same values: in {what}, "
            + "; ".join(problems)
        )


def check_shared(folder: str | os.PathLike[str]) -> None:
    """Raises ProcessError unless all processes see the same folder.

    Args:
        folder: folder that exists where process 0 runs.
    """
    if jax.process_count() == 1:
        return
    folder = Path(folder)
    name = f".shared.{secrets.token_hex(4)}"

    def write() -> str:
        (folder / name).touch()
        return name

    def sees() -> bool:
        return (folder / found).exists()

    found = on_first(f"writing to {folder}", write)
    try:
        seen = gather(f"looking into {folder}", sees)
    finally:
        if jax.process_index() == 0:
            (folder / name).unlink(missing_ok=True)
    if not all(seen):
        blind = [str(number) for number, is_seen in enumerate(seen) if not is_seen]
        raise ProcessError(
            f"{folder} is not shared: process {', '.join(blind)} of {len(seen)} does "
            "not see what process 0 writes there. Give a folder of a file system that "
            "all hosts mount, such as NFS, Lustre or Filestore"
        )


@contextlib.contextmanager
def shared_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fills a folder like `atomic_folder`, from all processes together.

    It gets its name once the body has ended in all of them.

    Args:
        path: path of the folder, which all processes see.

    Yields:
        The temporary folder. The body may use collectives, so it must not fail in one
        process alone: see `gather`.

    Raises:
        FileExistsError: there is something at ``path`` already.
        ProcessError: the folder is not shared, or another process failed.
    """
    what = f"writing {os.fspath(path)}"
    with contextlib.ExitStack() as stack:
        # An error leaves the stack, which then removes the folder.
        partial = on_first(what, lambda: stack.enter_context(atomic_folder(path)))
        check_shared(partial)
        yield partial
        gather(what, lambda: None)
        publish = stack.pop_all()
        on_first(what, publish.close)


def _exchange(message: bytes) -> list[bytes]:
    """Returns the messages of all processes, in their order."""
    sizes = _all_gather(np.int32(len(message)))
    size = _GROWTH**3
    while size < sizes.max():
        size *= _GROWTH
    padded = np.zeros(size, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    parts = _all_gather(padded)
    return [part[:length].tobytes() for part, length in zip(parts, sizes, strict=True)]


def _all_gather(x: Any) -> np.ndarray:
    """Returns a spread array as a whole, or what each process gives, stacked."""
    is_spread = isinstance(x, jax.Array) and not x.is_fully_addressable
    try:
        return np.asarray(multihost_utils.process_allgather(x, tiled=is_spread))
    except Exception as error:
        if not is_loss(error):
            raise
        raise ProcessError(describe_loss(error)) from error


def is_loss(error: Exception) -> bool:
    """Whether an error means that another process is gone.

    A collective then fails with a status such as "UNKNOWN: Gloo ...". It reaches us as
    a JaxRuntimeError, as a ValueError where NumPy waits for the result, or as the cause
    of an error of a library.

    Example:
        >>> is_loss(ValueError("UNKNOWN: Gloo AllGather failed"))
        False
    """
    return jax.process_count() > 1 and any(
        _LOST.match(str(cause)) for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def describe_loss(error: Exception) -> str:
    """Says that another process is gone, for an error of `is_loss`."""
    first = str(error).strip().splitlines()[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot reach the "
        "others: one of them has ended, or the network has failed. Its own output says "
        f"why. JAX reports: {first}"
    )
