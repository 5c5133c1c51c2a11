"""A verb in several processes: `--coordinator`, and how they begin and end together."""

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

import jax

from jaxbnb.core.processes import ProcessError, describe_loss, is_loss

# Errors of another process, or of the connection to it.
ERRORS: Final = (ProcessError, jax.errors.JaxRuntimeError)
# Types of errors that JAX raises itself; those of others have a message of their own.
_BARE: Final = (ValueError, jax.errors.JaxRuntimeError)
# The arguments that this module reads.
NAMES: Final = ("coordinator", "num_processes", "process_id")
# A process that ends, or a host that fails, ends the others within a minute.
_HEARTBEAT_SECONDS: Final = 40
# How long a process that ends waits for the others to end too. JAX aborts one that
# waits in vain, so ours gives up before.
_SHUTDOWN_SECONDS: Final = 20
_PATIENCE_SECONDS: Final = 10


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of a run, if ``--coordinator`` is given.

    Raises:
        ValueError: the arguments lack something that JAX cannot detect.
    """
    coordinator = getattr(args, "coordinator", None)
    if coordinator is None:
        return
    # It takes SIGTERM for itself. Before and after its steps, a run has nothing to save
    # and ends at once.
    jax.config.update("jax_enable_preemption_service", False)
    sys.excepthook = _end_at_once
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            getattr(args, "num_processes", None),
            getattr(args, "process_id", None),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes cannot find each other ({error}). Give --coordinator "
            "HOST:PORT of process 0, --num-processes and --process-id, or run where "
            "JAX detects them: under SLURM, Open MPI or Kubernetes"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def report(error: Exception, describe: Callable[[str], str] = str) -> None:
    """Prints an error, with the number of the process if there are several.

    Args:
        error: the error.
        describe: changes its message.
    """
    place = ""
    if jax.distributed.is_initialized():
        place = f"[process {jax.process_index()}] "
    if type(error) in _BARE and is_loss(error):
        error = ProcessError(describe_loss(error))
    # It is a bug of ours, or a lack of memory.
    if isinstance(error, jax.errors.JaxRuntimeError):
        raise error
    print(f"{place}error: {describe(str(error))}", file=sys.stderr, flush=True)


def leave(status: int) -> int:
    """Ends the connection with the other processes; returns the exit status.

    Does not return unless it is 0: what is left of the connection could wait for
    processes that do not answer.
    """
    if not jax.distributed.is_initialized():
        return status
    closing = threading.Thread(target=_shut_down, daemon=True)
    closing.start()
    closing.join(_PATIENCE_SECONDS)
    if status != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints an error that nothing has caught; does not wait for other processes."""
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _shut_down() -> None:
    # An error means that another process has ended already.
    with contextlib.suppress(RuntimeError, jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
