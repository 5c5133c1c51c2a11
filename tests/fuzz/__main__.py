"""``python tests/fuzz``: every reader against thousands of damaged files."""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import fuzzing
from fuzz_readers import READERS


def main():
    """Prints a table; the status is 1 where it has findings."""
    if sys.argv[1:] == ["--serve"]:
        fuzzing.serve(READERS, *json.load(sys.stdin))
        return 0
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser("python tests/fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=12_000, help="of all readers")
    parser.add_argument("--seed", type=int, help="by default that of this commit")
    parser.add_argument("--reader", action="append", choices=names, metavar="NAME")
    parser.add_argument("--case", type=int, help="this one alone, in this process")
    parser.add_argument(
        "--keep", type=Path, help="with --case: where to write its files"
    )
    args = parser.parse_args()
    seed = fuzzing.commit_seed() if args.seed is None else args.seed
    chosen = [r for r in READERS if r.name in (args.reader or names)]
    if args.case is not None:
        return one(chosen, seed, args.case, args.keep)
    readers = [r for r in chosen if all(map(importlib.util.find_spec, r.needs))]
    for reader in chosen:
        if reader not in readers:
            print(f"left out: {reader.name}, which needs {' and '.join(reader.needs)}")
    shares = sum(reader.share for reader in readers)
    cases = {r.name: -int(-args.cases * r.share // shares) for r in readers}
    counts, findings = fuzzing.fuzz(readers, seed, cases)
    # One of each kind, by where it was raised.
    for finding in {f.detail[-200:]: f for f in reversed(findings)}.values():
        print(f"{finding.reader}: {finding}\n")
    print(f"seed {seed}")
    print(fuzzing.table(counts))
    return int(bool(findings))


def one(readers, seed, case, keep):
    """Runs one case of each reader here, and prints what comes of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch) / "case"
        for reader in readers:
            outcome, detail = fuzzing.run_case(reader, seed, case, folder)
            print(f"{reader.name}: {outcome} {detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
