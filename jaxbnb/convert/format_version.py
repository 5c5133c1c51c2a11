"""Versions of the formats that are jaxbnb's own."""

from pathlib import Path
from typing import Any

from jaxbnb.convert._errors import CheckpointError, UnsupportedCheckpointError


def check_version(path: Path, found: Any, newest: int) -> int:
    """Returns the version of a file's format; 0 if it is older than versions are.

    Raises:
        UnsupportedCheckpointError: it is newer than this jaxbnb.
        CheckpointError: it is not a number.
    """
    try:
        version = 0 if found is None else int(found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: its format version is {found!r}"
        ) from error
    if version > newest:
        raise UnsupportedCheckpointError(
            f"{path} has format version {version}, and this jaxbnb reads versions up "
            f"to {newest}: a newer one wrote it. Upgrade jaxbnb"
        )
    return version
