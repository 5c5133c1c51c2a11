"""Where the figures of a run go: metrics.jsonl, and the loggers that people have."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.finetune._config import ConfigError, TrainConfig

FILE = "metrics.jsonl"


class Logger(Protocol):
    """What takes the figures of a run; `train` accepts any object with these methods.

    Example:
        >>> class Printer:
        ...     def log(self, step, metrics):
        ...         print(step, metrics)
        ...     def close(self):
        ...         pass
        >>> isinstance(Printer().log, object)
        True
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the figures of a step, or of an evaluation after it."""
        ...

    def close(self) -> None:
        """Called once, when the run ends in any way."""
        ...


class MetricsFile:
    """metrics.jsonl: a JSON object a line, of each step and each evaluation.

    Args:
        folder: folder of the run.
        last_step: step that the run goes on after; later lines are removed.
    """

    def __init__(self, folder: Path, last_step: int):
        self._path = folder / FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= last_step]
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(map(_to_line, kept)))
        # Unbuffered, so that closing it does not fail again where writing has.
        self._file = self._path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; a reader sees it at once.

        Raises:
            OSError: it cannot be written, e.g. because the disk is full.
        """
        line = _to_line({"step": step, **metrics}).encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a run's metrics.jsonl; none without a file."""
    path = folder / FILE
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                # A run that was killed while it wrote this line.
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def import_package(service: str) -> Any:
    """Imports the package of a service that `TrainConfig.report_to` names.

    Raises:
        ImportError: it is not installed.
    """
    needed_by = f"report_to={service!r}"
    return import_extra(_PACKAGES[service], needed_by=needed_by, extra=service)


def _to_line(metrics: Mapping[str, Any]) -> str:
    # JSON has no NaN.
    values = {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in metrics.items()
    }
    return json.dumps(values) + "\n"


class _TensorBoard:
    def __init__(self, config: TrainConfig, last_step: int):
        tensorboard = import_package("tensorboard")
        # Hides the steps after the last checkpoint, which come again.
        self._writer = tensorboard.SummaryWriter(
            str(Path(config.out) / "tensorboard"), purge_step=last_step + 1
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: TrainConfig, last_step: int):
        wandb = import_package("wandb")
        self._run = wandb.init(
            dir=config.out,
            name=Path(config.out).name,
            config=config.to_dict(),
            id=_read_run_id(config, "wandb"),
            resume="allow",
        )
        _write_run_id(config, "wandb", self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: TrainConfig, last_step: int):
        self._mlflow = import_package("mlflow")
        known = _read_run_id(config, "mlflow")
        run = self._mlflow.start_run(run_id=known, run_name=Path(config.out).name)
        if known is None:
            _write_run_id(config, "mlflow", run.info.run_id)
            # MLflow refuses to change a parameter, as `resume` would.
            self._mlflow.log_params(config.to_dict())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _read_run_id(config: TrainConfig, service: str) -> str | None:
    """Returns the id that the service gave to this run before it was interrupted."""
    path = Path(config.out) / f"{service}_run_id"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write_run_id(config: TrainConfig, service: str, run_id: str) -> None:
    with atomic_write(Path(config.out) / f"{service}_run_id") as temporary:
        temporary.write_text(run_id, encoding="utf-8")


_LOGGERS = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def make_logger(name: str, config: TrainConfig, last_step: int) -> Logger:
    """Opens a logger.

    Args:
        name: name of the service, one of those in `TrainConfig.report_to`.
        config: the run's config.
        last_step: step that the run goes on after; 0 at its beginning.

    Raises:
        ConfigError: the service refuses, for example without a login.
        ImportError: its package is not installed.
    """
    try:
        return _LOGGERS[name](config, last_step)
    except ImportError:
        raise
    # The services raise errors of their own, or of the network.
    except Exception as error:
        raise ConfigError(
            f"report_to={name!r} cannot be opened: {type(error).__name__}: {error}"
        ) from error
