"""Records of kernels that were checked on a GPU: where they are, and which one counts.

Records ship with the package, in ``_verified.json``, and `verification` writes the
user's own. Reading them is all that lowering a program does with files.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterable
from typing import Any, Final

import jax
from jaxlib.version import __version__ as jaxlib_version

_PACKAGE: Final = pathlib.Path(__file__).parent
SHIPPED: Final = _PACKAGE / "_verified.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome of an op's checks on a kind of GPU.

    Attributes:
        op: name of the op's folder.
        device_kind: what JAX calls the GPU, e.g. "NVIDIA H200".
        cuda: versions of CUDA, as JAX's client of the GPU reports them.
        jax: versions of jax and jaxlib.
        digest: `digest` of the kernels that were checked.
        reason: why the kernels must not run; None if they passed.
    """

    op: str
    device_kind: str
    cuda: str
    jax: str
    digest: str
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What is known of a GPU that a program is compiled for.

    Attributes:
        kind: what JAX calls it.
        capability: compute capability, e.g. "9.0"; None if unknown.
        cuda: versions of CUDA; None for a GPU that is only described.
        cores: number of multiprocessors; None if unknown.
        driver: the newest CUDA that the driver supports, and the one that assembles
            kernels, as 1000 times the major version plus ten times the minor one. None
            for a GPU that is not here.
    """

    kind: str
    capability: str | None
    cuda: str | None
    cores: int | None = None
    driver: tuple[int, int] | None = None


def find(records: Iterable[Record], op: str, gpu: Gpu) -> Record | None:
    """The last record of an op that holds for a GPU and the installed versions."""
    found = None
    for record in records:
        if (
            (record.op, record.device_kind) == (op, gpu.kind)
            and gpu.cuda in (None, record.cuda)
            and (record.jax, record.digest) == (jax_versions(), digest())
        ):
            found = record
    return found


def jax_versions() -> str:
    """The versions of jax and jaxlib, which decide what a kernel compiles to."""
    return f"{jax.__version__} {jaxlib_version}"


@functools.cache
def digest() -> str:
    """A hash of this package's code: a record does not hold for other kernels."""
    sources = (path.read_bytes() for path in sorted(_PACKAGE.rglob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


@functools.cache
def shipped() -> tuple[Record, ...]:
    """The records that come with the package."""
    return tuple(Record(**entry) for entry in json.loads(SHIPPED.read_text()))


@functools.cache
def of_user() -> tuple[Record, ...]:
    """The user's own records; none where the file cannot be trusted or read."""
    path = user_file()
    try:
        if path is None or not is_trusted(path):
            return ()
        return tuple(Record(**entry) for entry in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        # The file does not exist, or is not one of ours.
        return ()


def user_file() -> pathlib.Path | None:
    """The file of the user's records; None without a home directory."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    # Without a home, expanduser leaves "~".
    path = pathlib.Path(data) / "jaxbnb" / "verified.json"
    return path if path.is_absolute() else None


def is_trusted(path: pathlib.Path) -> bool:
    """Whether the user owns a file and its folder, and nobody else can write to them.

    A record decides which machine code runs.
    """
    return all(_is_private(place) for place in (path.parent, path))


def _is_private(place: pathlib.Path) -> bool:
    status = place.lstat()
    if stat.S_ISLNK(status.st_mode):
        return False
    # Windows has no owners in this sense, and keeps a profile to its user.
    own_id: Any = getattr(os, "getuid", lambda: status.st_uid)()
    others = stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid == own_id and not status.st_mode & others


def write(record: Record) -> pathlib.Path:
    """Adds a record to the user's file, in the place of an older one of the same key.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be created, or others can write to it.
    """
    path = user_file()
    if path is None:
        raise FileNotFoundError("there is no home directory to keep records in")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(path.parent):
        raise PermissionError(
            f"{path.parent} must belong to you, and others must not be able to write "
            "to it: records there decide which kernels run"
        )
    of_user.cache_clear()
    write_to(path, (*of_user(), record))
    of_user.cache_clear()
    return path


def write_to(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Writes records to a file; of several with the same key, the last."""
    latest = {dataclasses.replace(r, reason=None): r for r in records}
    entries = [dataclasses.asdict(r) for r in latest.values()]
    # Under its own name only when it is complete: other processes may read it.
    part = path.with_suffix(f".{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(entries, file, indent=1)
        file.write("\n")
    part.replace(path)
