"""Checkpoints of a run: its arrays and its position, written by Orbax."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax

from jaxbnb.convert.format_version import check_version
from jaxbnb.core.extras import import_extra
from jaxbnb.core.processes import describe_loss, is_loss, put_like
from jaxbnb.finetune._checksums import array_checksums, json_digest

_STATE: Final = "state"
_PROGRESS: Final = "progress"
_FORMAT: Final = "format_version"
# Checksums of the arrays, and a digest of all values. Early checkpoints have neither.
_CHECKSUMS: Final = "checksums"
_DIGEST: Final = "digest"
# Raised when an older jaxbnb could not go on from a checkpoint. Early ones have none.
VERSION: Final = 1


class RunCheckpointError(OSError):
    """A checkpoint that could not be written or read; names the last good one."""


class Checkpoints:
    """The checkpoints in a folder, each in a subfolder named after its step.

    Writing goes on in the background while the run continues. A checkpoint gets its
    name when it is complete. It holds checksums of its contents, because Orbax would
    not notice a byte of an array that changes on the disk.

    Args:
        folder: folder of the checkpoints.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, *, keep: int):
        self._orbax = import_extra(
            "orbax.checkpoint", needed_by="a checkpoint", extra="finetune"
        )
        # It reports each of its steps as a warning or a notice.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder = folder
        self._saving: int | None = None
        self._manager = self._orbax.CheckpointManager(
            folder.absolute(),
            options=self._orbax.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True
            ),
            item_names=(_STATE, _PROGRESS),
        )

    @property
    def last_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Saves a pytree of arrays, and plain values for JSON.

        Returns once the arrays are copied, so that the next step may donate them.

        Raises:
            RunCheckpointError: this checkpoint or the one before cannot be written.
        """
        # Otherwise the error of the one before would seem to be of this one.
        self.wait()
        self._saving = step
        arguments = self._orbax.args
        arrays = _flatten(state)
        values = {_FORMAT: VERSION, _CHECKSUMS: array_checksums(arrays), **progress}
        values[_DIGEST] = json_digest(values)
        with self._failures(f"the checkpoint of step {step} could not be written"):
            self._manager.save(
                step,
                args=arguments.Composite(
                    **{
                        _STATE: arguments.StandardSave(arrays),
                        _PROGRESS: arguments.JsonSave(values),
                    }
                ),
            )

    def wait(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
            RunCheckpointError: the last one could not be.
        """
        what = f"the checkpoint of step {self._saving} could not be written"
        with self._failures(what):
            self._manager.wait_until_finished()

    def restore_progress(self, step: int) -> dict[str, Any]:
        """Reads the plain values of a checkpoint.

        Raises:
            RunCheckpointError: it is damaged.
            UnsupportedCheckpointError: a newer jaxbnb wrote it.
        """
        progress = self._read_values(step)
        progress.pop(_CHECKSUMS, None)
        return progress

    def restore_state(self, step: int, like: Any) -> Any:
        """Reads the arrays of a checkpoint into the structure and places of ``like``.

        Raises:
            RunCheckpointError: it is damaged, or has other arrays.
        """
        arguments = self._orbax.args
        checksums = self._read_values(step).get(_CHECKSUMS)
        targets = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in _flatten(like).items()
        }
        with self._failures(f"the checkpoint of step {step} is damaged", step):
            found = self._manager.restore(
                step,
                args=arguments.Composite(
                    **{_STATE: arguments.StandardRestore(targets)}
                ),
            )[_STATE]
            if checksums is not None:
                _check_arrays(array_checksums(found), checksums)
        leaves, structure = jax.tree.flatten(like)
        return structure.unflatten(
            [put_like(found[name], x) for name, x in zip(targets, leaves, strict=True)]
        )

    def _read_values(self, step: int) -> dict[str, Any]:
        """Reads the plain values of a checkpoint, with the checksums of its arrays."""
        arguments = self._orbax.args
        with self._failures(f"the checkpoint of step {step} is damaged", step):
            found = self._manager.restore(
                step, args=arguments.Composite(**{_PROGRESS: arguments.JsonRestore()})
            )
            values = dict(found[_PROGRESS])
        version = values.get(_FORMAT)
        check_version(self._folder / str(step), version, VERSION)
        digest = values.pop(_DIGEST, None)
        with self._failures(f"the checkpoint of step {step} is damaged", step):
            if (digest or _CHECKSUMS in values) and digest != json_digest(values):
                raise ValueError("its values are not those that were saved")
        values.pop(_FORMAT, None)
        return values

    def close(self) -> None:
        """Stops the background work, after it has finished."""
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self, what: str, damaged: int | None = None) -> Iterator[None]:
        try:
            yield
        # Orbax may raise any error of the libraries that it uses.
        except Exception as error:
            if is_loss(error):
                reason = describe_loss(error)
            else:
                reason = f"{type(error).__name__}: {_shorten(str(error))}"
            good = [s for s in self._manager.all_steps(read=True) if s != damaged]
            if not good:
                hint = "There is no other"
            else:
                hint = f"The last good one is {self._folder / str(max(good))}"
                if damaged is not None:
                    hint += (
                        f": remove {self._folder / str(damaged)}, and resume from there"
                    )
            raise RunCheckpointError(f"{what}: {reason}. {hint}") from error


def _check_arrays(found: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Raises ValueError for arrays that are not those that were saved."""
    for name, checksum in found.items():
        if checksum != saved.get(name):
            raise ValueError(f"its array {name} is not the one that was saved")


def _shorten(text: str) -> str:
    """Leaves out the middle of a long message: what went wrong often comes last."""
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a pytree by their paths."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in paths}
