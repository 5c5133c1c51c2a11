"""`jaxbnb bench kernels`: checks, times and a training run, within a time budget.

A kernel may crash or never return, so this process runs none. It starts others with a
time limit, and what they have found until then is kept.
"""

import json
import math
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

import jax

from jaxbnb.benchmarks import _kernels, _train
from jaxbnb.benchmarks._figure import Figure
from jaxbnb_kernels import child, verification
from jaxbnb_kernels.checks import CHECKS

# Shares of the time budget: 120 and 150 of 600 s.
CHECKS_SHARE: Final = 0.2
TRAINING_SHARE: Final = 0.25
# A minute of 150 s. The rest is for starting and compiling, with kernels and without.
# A process that needs longer for these trains for a shorter time.
STEPS_SHARE: Final = 0.4
# Seconds of a process for its last step and its result.
LAST_STEP: Final = 5.0
# Seconds of training where there is no budget.
TRAINING_LIMIT: Final = 300.0
# A task compiles up to four programs. No task is silent for longer, except in a hang.
SILENCE: Final = 90.0
# A GPU that fails every task is not asked again.
MOST_FAILURES: Final = 3
_PACKAGES: Final = ("jaxbnb_kernels", "jaxbnb")


class ChildStoppedError(RuntimeError):
    """A child process that crashed, or that was ended because it took too long.

    Attributes:
        output: what the process wrote to stderr.
    """

    def __init__(self, reason: str, output: str = ""):
        super().__init__(reason)
        self.output = output


def bench_kernels(
    seconds: float = math.inf, records: Path | None = None, rehearse: bool = False
) -> Iterator[Figure]:
    """Checks, times and trains with every kernel on the GPU of this machine.

    Args:
        seconds: time budget; what does not fit is left out.
        records: file for the records of verified kernels, instead of the user's own.
        rehearse: whether to run all of it on the CPU, with tiny arrays and without
            kernels.

    Raises:
        NotImplementedError: this machine has no GPU that the kernels are written for.
    """
    start, device = time.monotonic(), jax.devices()[0]
    if not rehearse and (reason := verification.why_no_kernels(device)):
        raise NotImplementedError(reason)
    end = start + seconds
    environment = verification.environment(device.local_hardware_id or 0)
    if rehearse:
        environment |= {"JAX_PLATFORMS": "cpu"}
    run = _Run("reference" if rehearse else "mosaic_gpu", environment)
    failed = []
    limit = min(verification.TIME_LIMIT, CHECKS_SHARE * seconds)
    for op, verdict in _verdicts(records, rehearse, environment, limit):
        yield _checked(op, verdict)
        if verdict.reason is not None:
            failed.append(op)

    served = [op for op in CHECKS if rehearse or not verification.why_none(op, device)]
    tasks = _kernels.tasks(_kernels.SETTINGS[run.implementation][0])
    numbers = [i for i, task in enumerate(tasks) if task.op in served]
    wrong = [tasks[i].title for i in numbers if tasks[i].op in failed]
    numbers = [i for i in numbers if tasks[i].op not in failed]
    decisive = [i for i in numbers if tasks[i].is_decisive]
    others = [i for i in numbers if not tasks[i].is_decisive]

    reserved = min(TRAINING_LIMIT, TRAINING_SHARE * seconds)
    late = yield from run.times(tasks, decisive, end - reserved)
    yield from run.training(min(end, time.monotonic() + reserved), failed)
    late = yield from run.times(tasks, [*late, *others], end)
    yield from _left_out("their checks failed", wrong)
    yield from _left_out("no time was left", [tasks[i].title for i in late])


def _verdicts(
    records: Path | None, rehearse: bool, environment: dict[str, str], limit: float
) -> Iterator[tuple[str, verification.Verdict]]:
    """The verdicts on all ops, which are checked at the same time."""
    if not rehearse:
        found = verification.verify_each(
            out=records, time_limit=limit, at_once=len(CHECKS)
        )
        yield from ((op, verdict) for _, op, verdict in found)
        return
    commands = {op: verification.command(op, "reference", "brief") for op in CHECKS}
    yield from verification.run_all(commands, environment, limit, len(CHECKS))


def _checked(op: str, verdict: verification.Verdict) -> Figure:
    """The worst of an op's errors; or how many checks failed, and the first reason."""
    errors = verdict.errors
    # JSON has no infinity.
    data = {"errors": {k: e if math.isfinite(e) else str(e) for k, e in errors.items()}}
    if verdict.reason is None:
        worst = max(errors, key=lambda name: errors[name], default="")
        unit = "x the allowed error"
        return Figure(f"{op}, errors", errors.get(worst, 0.0), unit, 1, worst, data)
    count = sum(not error <= 1 for error in errors.values())
    unit = f"of {len(errors)} that returned"
    name = f"{op}, checks that failed"
    return Figure(name, max(1, count), unit, 0, verdict.reason, data)


def _left_out(why: str, titles: Sequence[str]) -> Iterator[Figure]:
    if titles:
        detail = "; ".join(titles)
        yield Figure(f"left out: {why}", len(titles), "measurements", None, detail)


class _Run:
    """The child processes of a run; an implementation, and their environment."""

    def __init__(self, implementation: str, environment: dict[str, str]):
        self.implementation = implementation
        self._environment = environment
        self._has_copied = False

    def times(
        self, tasks: Sequence[_kernels.Task], numbers: Sequence[int], end: float
    ) -> Iterator[Figure]:
        """Yields the figures of tasks, and returns the numbers that are left over.

        After a crash or a hang, a new process goes on with the next task.
        """
        todo, failures = list(numbers), 0
        while todo and failures < MOST_FAILURES and time.monotonic() < end:
            command = child.command(
                _kernels.__name__,
                _kernels.main.__name__,
                self.implementation,
                ",".join(map(str, todo)),
                packages=_PACKAGES,
            )
            try:
                for line in read_lines(command, self._environment, end, SILENCE):
                    figures = [Figure(**figure) for figure in line["figures"]]
                    if line["task"] is not None:
                        todo.remove(line["task"])
                        has_failed = any(f.unit == _kernels.FAILURE for f in figures)
                        failures = failures + 1 if has_failed else 0
                    elif self._has_copied:
                        continue
                    self._has_copied = True
                    yield from figures
            except ChildStoppedError as error:
                if time.monotonic() < end:
                    failures += 1
                    title = tasks[todo.pop(0)].title
                    yield _kernels.failure(title, str(error), error.output)
        return todo

    def training(self, end: float, failed: Sequence[str]) -> Iterator[Figure]:
        """Trains with kernels and without, for half of the time each."""
        share = (end - time.monotonic()) / 2
        speeds: dict[str, float] = {}
        for name, setting in (("with kernels", "1"), ("without kernels", "0")):
            title = f"QLoRA, {name}"
            if setting == "1" and set(failed) - {"matmul_int8"}:
                yield from _left_out("their checks failed", [title])
                continue
            until = min(end, time.monotonic() + share)
            command = child.command(
                _train.__name__,
                _train.main.__name__,
                self.implementation,
                str(STEPS_SHARE * share),
                str(until - LAST_STEP),
                packages=_PACKAGES,
            )
            environment = self._environment | {"JAXBNB_MOSAIC_GPU": setting}
            try:
                for line in read_lines(command, environment, until, share):
                    speeds[name] = line["tokens_per_second"]
                    first, last = line["losses"]
                    detail = (
                        f"{line['model']}; {line['steps']} steps, loss {first:.4f} to "
                        f"{last:.4f}; peak {line['peak_bytes'] / 2**20:.0f} MiB"
                    )
                    yield Figure(title, speeds[name], "tokens/s", None, detail, line)
            except ChildStoppedError as error:
                yield _kernels.failure(title, str(error), error.output)
        if len(speeds) == 2:
            ours, theirs = speeds.values()
            yield Figure("QLoRA, with kernels", theirs / ours, "x the time without")


def read_lines(
    command: list[str],
    environment: dict[str, str],
    end: float,
    silence: float,
) -> Iterator[dict[str, Any]]:
    """Runs a command, and yields each object that it prints as a line of JSON.

    Args:
        command: command to run.
        environment: environment of the process.
        end: time, by `time.monotonic`, at which the process is ended.
        silence: seconds without such a line after which it is ended.

    Raises:
        ChildStoppedError: the process was ended, or its exit status is not 0.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        reader = threading.Thread(
            target=_pass_on, args=(process.stdout, lines), daemon=True
        )
        reader.start()
        try:
            while (line := _next_line(lines, end, silence)) is not None:
                # Libraries may print lines of their own.
                if line.startswith('{"'):
                    yield json.loads(line)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            # What the process has started may still hold the pipe.
            reader.join(timeout=5)
        if status:
            stderr.seek(0)
            output = stderr.read()
            *_, complaint = ["", *output.splitlines()]
            raise ChildStoppedError(f"ended with status {status}: {complaint}", output)


def _pass_on(stdout: IO[str], lines: queue.SimpleQueue) -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _next_line(lines: queue.SimpleQueue, end: float, silence: float) -> str | None:
    left = end - time.monotonic()
    try:
        return lines.get(timeout=max(0.0, min(left, silence)))
    except queue.Empty:
        why = "the time was over" if left < silence else f"silent for {silence:g} s"
        raise ChildStoppedError(f"ended from outside: {why}") from None
