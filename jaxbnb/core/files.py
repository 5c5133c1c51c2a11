"""Files and folders that appear under their names only when they are complete."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

# Errors of write() when a disk, a quota or a file is full. They do not name the file.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A file in a resumable folder that says what the folder will become.
_MARK: Final = ".mark"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file under a temporary name and renames it once it is complete.

    The temporary file lies next to ``path``, so that the rename stays on one file
    system. It is flushed to the disk before the rename, which replaces any file at
    ``path``. After an exception, the temporary file is removed and ``path`` is
    untouched.

    Args:
        path: path of the file; its folder must exist.

    Yields:
        The temporary path, which the body creates.

    Raises:
        OSError: writing failed, e.g. because the disk is full; it names ``path``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("complete")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _name_final(error, temporary, path)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fills a folder under a temporary name and renames it once it is complete.

    Works like `atomic_write`, and creates missing parents. A process that is killed
    leaves at most the temporary sibling, ``.<name>.<random>.partial``.

    Args:
        path: path of the folder, where there is nothing or an empty folder.

    Yields:
        The temporary folder, which exists.

    Raises:
        FileExistsError: there is something at ``path`` already.
        OSError: writing failed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "model"
        >>> with atomic_folder(folder) as temporary:
        ...     _ = (temporary / "config.json").write_text("{}")
        >>> [file.name for file in folder.iterdir()]
        ['config.json']
    """
    path = Path(path)
    _check_vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    _make(temporary, path)
    with _published(temporary, path, keep=()):
        yield temporary


@contextlib.contextmanager
def resumable_folder(
    path: str | os.PathLike[str], *, mark: str, resumes: Collection[str]
) -> Iterator[Path]:
    """Fills a folder like `atomic_folder`, but can resume after an interrupt or a kill.

    The temporary folder is always called ``.<name>.resume.partial``. Only the same work
    finds files in it: files from work with another ``mark`` are removed before the body
    starts. Exceptions other than an interrupt remove all of it.

    Args:
        path: path of the folder, where there is nothing or an empty folder.
        mark: identifies the work: everything that decides what the folder will hold,
            such as a hash of the sources, the options and the program's version.
        resumes: names of the files that the body continues, after it has checked their
            contents. All other files are removed.

    Yields:
        The temporary folder, which holds at most the files in ``resumes``.

    Raises:
        FileExistsError: there is something at ``path`` already.
        BlockingIOError: another process is filling it.
        OSError: writing failed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "model"
        >>> def begin(mark):
        ...     with resumable_folder(folder, mark=mark, resumes=["part"]) as temporary:
        ...         print([file.name for file in temporary.glob("[!.]*")])
        ...         _ = (temporary / "part").write_text("half")
        ...         _ = (temporary / "other").write_text("")
        ...         raise KeyboardInterrupt
        >>> for mark in ("first", "first", "second"):
        ...     with contextlib.suppress(KeyboardInterrupt):
        ...         begin(mark)
        []
        ['part']
        []
        >>> with resumable_folder(folder, mark="second", resumes=["part"]):
        ...     pass
        >>> [file.name for file in folder.iterdir()]
        ['part']
    """
    path = Path(path)
    _check_vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.resume.partial")
    _make(temporary, path, exist_ok=True)
    with _alone(temporary, path):
        interrupts = (KeyboardInterrupt, SystemExit)
        with _published(temporary, path, keep=interrupts):
            _claim(temporary, mark, resumes)
            yield temporary
            (temporary / _MARK).unlink()


def _make(temporary: Path, path: Path, *, exist_ok: bool = False) -> None:
    try:
        temporary.mkdir(exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        _name_final(error, temporary, path)
        raise


def _claim(folder: Path, mark: str, resumes: Collection[str]) -> None:
    """Removes everything from a folder, except files to resume that have this mark.

    A kill at any moment leaves a mark only next to files that belong to it.
    """
    file = folder / _MARK
    is_same = file.is_file() and file.read_bytes() == mark.encode()
    if not is_same:
        # The mark goes first, so a half-emptied folder belongs to no work.
        _remove(file)
    kept = {_MARK, *resumes} if is_same else set()
    for entry in folder.iterdir():
        if entry.name not in kept or entry.is_symlink() or not entry.is_file():
            _remove(entry)
    if not is_same:
        with atomic_write(file) as temporary:
            temporary.write_bytes(mark.encode())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _published(
    temporary: Path, path: Path, *, keep: tuple[type[BaseException], ...]
) -> Iterator[None]:
    """Renames a folder once the body has filled it; removes it if that fails."""
    try:
        yield
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        _check_vacant(path)
        # On POSIX this also replaces an empty folder, and refuses one just filled.
        os.replace(temporary, path)
    except BaseException as error:
        if not isinstance(error, keep):
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            _name_final(error, temporary, path)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def _alone(folder: Path, path: Path) -> Iterator[None]:
    """Locks a folder against other processes; a kill releases the lock."""
    if os.name != "posix":
        yield
        return
    import fcntl  # Does not exist on Windows.

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "another process is writing it", os.fspath(path)
            ) from None
        yield
    finally:
        os.close(descriptor)


def _check_vacant(path: Path) -> None:
    is_empty_folder = (
        path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    )
    if os.path.lexists(path) and not is_empty_folder:
        what = "a folder that is not empty" if path.is_dir() else "a file"
        raise FileExistsError(
            f"{path} is {what}; choose another name, or remove it first"
        )


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename is atomic anyway.
        if not path.is_dir():
            error.filename = os.fspath(path)
            raise
    finally:
        os.close(descriptor)


def _name_final(error: OSError, temporary: Path, path: Path) -> None:
    """Makes an error name ``path``, not the temporary file, which is removed by now."""
    if error.filename is None and error.errno in _FULL:
        error.filename = os.fspath(path)
    if isinstance(error.filename, (str, os.PathLike)):
        name = os.fspath(error.filename)
        error.filename = name.replace(os.fspath(temporary), os.fspath(path))


def check_outside(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Raises ValueError if ``dst`` is inside the folder ``src``, which is only read."""
    source = Path(os.path.realpath(src))
    if source in Path(os.path.realpath(dst)).parents:
        raise ValueError(
            f"{os.fspath(dst)} is inside the source, {os.fspath(src)}, which stays as "
            "it is; choose a folder next to it"
        )
