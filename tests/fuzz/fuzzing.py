"""Damaged files, thousands of them: each is read, or refused by a typed error.

A reader is an entry of the table in `fuzz_readers`. Cases are numbered: the same seed,
reader and number are the same damage everywhere. They run in child processes, which
say what they are at, so that one that dies is known and the next goes on after it.
"""

import collections
import dataclasses
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import mutators

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTCOMES = ("read", "refused", "outside", "ended")
# By their names: the harness' own tests need not wait for an import of JAX.
_TYPED = ("CheckpointError", "AdapterError", "DataError")
# The number of the files without damage, which have to be read.
VALID = -1
# No measure of speed: a case takes milliseconds, the first ones compile.
_HANG_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Reader:
    """Something that reads files of strangers.

    Attributes:
        name: the reader's name in tables and commands.
        make: ``make(rng, damaged)`` gives the files of an example by their names;
            `mutators.damage` then changes one of them. ``rng`` chooses among examples;
            only where ``damaged``, it may change what is easier to change before it is
            a file.
        read: reads them all from a folder, and asserts what is true of whatever is
            read.
        targets: the files to damage; all of them by default.
        share: number of cases, relative to other readers'.
        needs: modules without which it is left out.
    """

    name: str
    make: Callable[[random.Random, bool], dict[str, bytes]]
    read: Callable[[Path], object]
    targets: tuple[str, ...] = ()
    share: float = 1.0
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """A case that ended in anything but a typed error."""

    reader: str
    seed: int
    case: int
    outcome: str
    detail: str

    def __str__(self):
        options = f"--reader {self.reader!r} --seed {self.seed} --case {self.case}"
        return f"{self.detail}\n  reproduce: python tests/fuzz {options}"


def commit_seed():
    """Returns a number that changes with each commit; 0 without git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout[:8], 16)


def write_case(reader, seed, case, folder):
    """Fills an empty folder with the files of a case."""
    rng = random.Random(f"{seed}/{reader.name}/{case}")
    files = reader.make(rng, case != VALID)
    if case != VALID:
        name = rng.choice(reader.targets or sorted(files))
        files = files | {name: mutators.damage(name, files[name], rng)}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def run_case(reader, seed, case, folder):
    """The outcome of a case, and the error that it ended in, if any."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_case(reader, seed, case, folder)
    try:
        reader.read(folder)
    # The PanicException of a Rust library is not an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = "refused" if case != VALID and is_typed(error) else "outside"
        return outcome, f"{type(error).__name__}: {error}"[:300] + _where(error)
    return "read", ""


def is_typed(error):
    """Returns whether the docs promise this type of error for bad files.

    A plain ValueError must be one that we raise: one of a library, or of json or a
    codec, says nothing of the file.
    """
    kinds = [kind for kind in type(error).__mro__ if kind.__name__ in _TYPED]
    if isinstance(error, OSError) or any(_is_ours(kind) for kind in kinds):
        return True
    if type(error) not in (ValueError, NotImplementedError):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(innermost.filename).is_relative_to(ROOT / "jaxbnb")
    # C code that our line calls has no line of its own.
    return is_ours and (innermost.line or "").startswith("raise")


def _is_ours(kind):
    return kind.__module__.partition(".")[0] == "jaxbnb"


def _where(error):
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return "".join(f"\n    {f.filename}:{f.lineno} {f.name}" for f in frames)


# The child: one line for each case that begins, and one for its outcome.


def serve(readers, seed, todo):
    """Runs ``todo``, pairs of a reader's name and a number, for `fuzz`."""
    by_name = {reader.name: reader for reader in readers}
    # Libraries write to the standard output too.
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        with tempfile.TemporaryDirectory() as scratch:
            for name, case in todo:
                print(json.dumps(["start"]), file=out)
                result = run_case(by_name[name], seed, case, Path(scratch) / "case")
                print(json.dumps(["done", *result]), file=out)


def fuzz(readers, seed, cases, *, script=HERE):
    """Counts of the outcomes of each reader, and the findings.

    Args:
        readers: the table's entries to try.
        seed: seed of all cases.
        cases: how many of each reader, or a dict of how many by name.
        script: what to run as the child; it calls `serve` with its own table.
    """
    counts = {reader.name: collections.Counter() for reader in readers}
    findings = []
    todo = [
        (reader.name, case)
        for reader in readers
        for case in range(
            VALID, cases if isinstance(cases, int) else cases[reader.name]
        )
    ]
    while todo:
        done = 0
        for outcome, detail in _batch(seed, todo, script):
            name, case = todo[done]
            done += 1
            counts[name][outcome] += case != VALID
            if outcome in ("outside", "ended"):
                findings.append(Finding(name, seed, case, outcome, detail))
        todo = todo[done:]
    return counts, findings


def _batch(seed, todo, script):
    """Yields the outcome of each case until the child has done all, or is gone."""
    search = os.pathsep.join(map(str, (ROOT, HERE)))
    with (
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as given,
    ):
        given.write(json.dumps([seed, todo]).encode())
        given.seek(0)
        is_started, is_hung, done = False, False, 0
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), "--serve"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": search},
        ) as child:
            for line in _lines(child):
                if line is None:
                    child.kill()
                    is_hung = True
                    break
                kind, *result = json.loads(line)
                is_started = kind == "start"
                if kind == "done":
                    done += 1
                    yield result
        if done == len(todo):
            return
        errors.seek(0)
        said = errors.read()[-1000:].decode(errors="replace")
        if not is_started:
            raise RuntimeError(
                f"the child ended before a case, with {child.returncode}:\n{said}"
            )
        what = f"ended with status {child.returncode}"
        if is_hung:
            what = f"said nothing for {_HANG_SECONDS} seconds"
        yield "ended", f"the process {what}:\n{said}"


def _lines(child):
    """The lines of a child; None, the last, if it says nothing for long."""
    pending = b""
    while select.select([child.stdout], [], [], _HANG_SECONDS)[0]:
        data = os.read(child.stdout.fileno(), 2**16)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from lines
    yield None


def table(counts):
    """A table of what was tried and how it ended."""
    head = ("reader", "cases", "read", "refused", "outside typed errors")
    rows = [(*head, "ended the process")]
    total = collections.Counter()
    for name, count in counts.items():
        rows.append((name, count.total(), *(count[outcome] for outcome in OUTCOMES)))
        total += count
    rows.append(("all", total.total(), *(total[outcome] for outcome in OUTCOMES)))
    cells = [[f"{x:,}" if isinstance(x, int) else x for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
