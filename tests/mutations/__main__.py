"""Whether the tests find faults: `make mutations`.

    python tests/mutations [--code COMMIT] [--tests COMMIT] [--only TEXT]

Puts each fault of `table.py` into a copy of the repository, one at a time, and runs the
tests that are to find it, up to the first that fails. Ends in an error if one was not
found, and before anything runs if the text of one is not in its file any more.

To compare tests before and after a change of theirs, name two commits as ``--tests``
and the same one as ``--code``.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from table import MUTATIONS

ROOT = Path(__file__).parents[2]
# Exit statuses of pytest.
PASSED, FAILED = 0, 1
TIMEOUT = 900


def export(commit, folder, paths):
    """The files of a commit; of None those of the working tree that git knows."""
    if commit is None:
        command = ["git", "stash", "create"]
        commit = _git(command).decode().strip() or "HEAD"
    archive = _git(["git", "archive", commit, *paths])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def _git(command):
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout


def check(mutations, folder):
    """Names the faults with a text that does not occur exactly once in its file."""
    missing = []
    for mutation in mutations:
        path = folder / mutation.path
        count = path.read_text().count(mutation.old) if path.exists() else 0
        if count != 1:
            missing.append(f"  {mutation.name}: {mutation.path} has it {count} times")
    if missing:
        sys.exit("tests/mutations/table.py is out of date:\n" + "\n".join(missing))


def run(mutation, folder):
    """Whether a test fails, which one, and the seconds that it took."""
    path = folder / mutation.path
    whole = path.read_text()
    path.write_text(whole.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "--no-header"]
    # As `make test` does; older commits know fewer markers and options.
    known = (folder / "pyproject.toml").read_text()
    left_out = [x for x in ("peers", "slow", "exhaustive") if f'"{x}: ' in known]
    command += ["-p", "no:cacheprovider", "-m", f"not ({' or '.join(left_out)})"]
    if any("--quick-compile" in p.read_text() for p in folder.glob("tests/*.py")):
        command.append("--quick-compile")
    command += [*mutation.tests.split()]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return True, "it did not end", TIMEOUT
    finally:
        path.write_text(whole)
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    # A test that cannot even be collected has found nothing.
    if done.returncode not in (PASSED, FAILED):
        sys.exit(done.stdout + done.stderr)
    first = failed[0].split(" - ")[0] if failed else ""
    return done.returncode != PASSED, first, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(prog="python tests/mutations")
    parser.add_argument("--code", metavar="COMMIT", help="jaxbnb and jaxbnb_kernels")
    parser.add_argument("--tests", metavar="COMMIT", help="tests and pyproject.toml")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="those in which it occurs"
    )
    options = parser.parse_args()
    mutations = [m for m in MUTATIONS if options.only in " ".join(m)]
    not_found = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(options.code, folder, ["jaxbnb", "jaxbnb_kernels", "examples"])
        export(options.tests, folder, ["tests", "pyproject.toml"])
        check(mutations, folder)
        for mutation in mutations:
            is_found, first, seconds = run(mutation, folder)
            not_found += not is_found
            verdict = "found" if is_found else "NOT FOUND"
            print(f"{verdict:9} {seconds:4.0f} s  {mutation.name}  {first}", flush=True)
    print(f"{len(mutations) - not_found} of {len(mutations)} found")
    sys.exit(not_found > 0)


if __name__ == "__main__":
    main()
