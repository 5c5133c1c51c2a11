"""Verbs that take many steps start anew with huge pages, once."""

import os
import subprocess
import sys

import pytest

from jaxbnb.cli import _huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has huge pages")
PRINT = (
    "import os, sys; from jaxbnb.cli import main; "
    "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), flush=True); sys.exit(main())"
)


def run(*args, **variables):
    environment = {k: v for k, v in os.environ.items() if k != _huge_pages.VARIABLE}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PRINT, *args],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_verb_of_many_steps_starts_anew(tmp_path):
    args = "finetune", "missing", "--data", "none.jsonl", "--out", str(tmp_path / "run")
    done = run(*args)
    first, second = (line.split() for line in done.stdout.splitlines())
    assert first == [second[0], "None"]
    assert second[1] == _huge_pages.SETTING
    assert done.returncode == 1
    assert "error" in done.stderr


@pytest.mark.parametrize("value", ["", "glibc.malloc.check=0"])
def test_a_variable_that_is_set_stays(value, tmp_path):
    args = "finetune", "missing", "--data", "none.jsonl", "--out", str(tmp_path / "run")
    done = run(*args, GLIBC_TUNABLES=value)
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 1


@pytest.mark.parametrize("args", [["inspect", "missing"], ["finetune", "--help"]])
def test_other_commands_do_not(args):
    out = run(*args).stdout
    assert sum("None" in line.split() for line in out.splitlines()) == 1
    assert _huge_pages.SETTING not in out
