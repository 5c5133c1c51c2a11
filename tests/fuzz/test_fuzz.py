"""A few damaged files for every reader; `make fuzz` tries thousands."""

import json
import os
import random
import types

import fuzzing
import mutators
import numpy as np
import pytest

from jaxbnb import QuantConfig
from jaxbnb.convert import CheckpointError

CASES = 20
SEED = fuzzing.commit_seed()


def check(readers):
    cases = {reader.name: round(CASES * reader.share) for reader in readers}
    counts, findings = fuzzing.fuzz(readers, SEED, cases)
    assert not findings, "\n\n".join(map(str, findings))
    assert {name: count.total() for name, count in counts.items()} == cases


def load_readers():
    from fuzz_readers import READERS

    return READERS


def test_no_damaged_file_ends_in_anything_but_a_typed_error():
    check([reader for reader in load_readers() if not reader.needs])


@pytest.mark.peers
def test_nor_one_that_other_libraries_read():
    readers = [reader for reader in load_readers() if reader.needs]
    for module in {module for reader in readers for module in reader.needs}:
        pytest.importorskip(module)
    check(readers)


# The harness itself.

TABLE = """
import json, os, random, sys
import fuzzing

def make(rng, damaged):
    return {"a.txt": b"whole"}

def read(folder):
    print("a library that is loud")
    {
        "3": os.abort,
        "4": lambda: {}["missing"],
        "5": lambda: sys.exit("panic"),
        "6": lambda: json.loads("{"),
        "7": lambda: open(folder / "nothing"),
    }.get((folder / "a.txt").read_text(), int)()

READERS = [fuzzing.Reader(name, make, read) for name in ("one", "two")]

def damage(name, data, rng):
    return str(next(numbers)).encode()

if __name__ == "__main__":
    seed, todo = json.load(sys.stdin)
    numbers = iter([case for _, case in todo if case != fuzzing.VALID])
    fuzzing.mutators.damage = damage
    fuzzing.serve(READERS, seed, todo)
"""


def test_what_is_wrong_is_found_and_the_rest_goes_on(tmp_path):
    script = tmp_path / "table.py"
    script.write_text(TABLE)
    table = types.ModuleType("table")
    exec(TABLE, table.__dict__)
    counts, findings = fuzzing.fuzz(table.READERS, 1, 10, script=script)
    want = {"read": 5, "refused": 1, "outside": 3, "ended": 1}
    assert {name: dict(count) for name, count in counts.items()} == {
        "one": want,
        "two": want,
    }
    assert [(f.reader, f.case, f.outcome) for f in findings] == [
        (name, case, "ended" if case == 3 else "outside")
        for name in ("one", "two")
        for case in (3, 4, 5, 6)
    ]
    assert "status -6" in findings[0].detail
    command = "python tests/fuzz --reader 'one' --seed 1 --case 4"
    assert "KeyError: 'missing'" in str(findings[1])
    assert command in str(findings[1])
    *_, last = fuzzing.table(counts).splitlines()
    assert last.split() == ["all", "20", "10", "2", "6", "2"]


def test_a_child_that_says_nothing_is_waited_for_no_longer(monkeypatch):
    monkeypatch.setattr(fuzzing, "_HANG_SECONDS", 0.01)
    reading, writing = os.pipe()
    with open(reading, "rb") as stdout, open(writing, "wb", buffering=0) as child:
        child.write(b"[1]\n[2]\n[")
        lines = list(fuzzing._lines(types.SimpleNamespace(stdout=stdout)))
    assert lines == [b"[1]", b"[2]", None]


def test_a_case_is_the_same_damage_everywhere():
    document = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    results = [
        mutators.damage("x.json", document, random.Random(f"7/{case}"))
        for case in [*range(200), *range(200)]
    ]
    assert results[:200] == results[200:]
    assert len({*results}) > 150
    assert results.count(document) < 40


def test_damage_changes_nothing_in_place():
    value = {"a": [np.arange(6.0).reshape(2, 3), {"b": [1]}]}
    before = repr(value)
    for seed in range(300):
        mutators.damage_value(value, random.Random(seed))
    assert repr(value) == before


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (CheckpointError("x"), True),
        (FileNotFoundError("x"), True),
        (ValueError("of a library"), False),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_are_typed(error, want):
    with pytest.raises(type(error)) as raised:
        raise error
    assert fuzzing.is_typed(raised.value) == want


def test_our_own_value_errors_are_typed():
    with pytest.raises(ValueError, match="nf5") as raised:
        QuantConfig("nf5")
    assert fuzzing.is_typed(raised.value)
