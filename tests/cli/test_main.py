"""The command line: its verbs, and what each costs."""

import importlib
import subprocess
import sys

import pytest

from jaxbnb import cli


def run(*args):
    command = [sys.executable, "-W", "error", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_lists_the_verbs(args, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(args)
    out = capsys.readouterr().out
    for verb, summary in cli._VERBS.items():
        assert f"    {verb} " in out
        assert summary.split()[0] in out
    assert max(map(len, out.splitlines())) <= 80


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxbnb {importlib.metadata.version('jaxbnb')}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: <verb>"),
        (["fly"], "invalid choice: 'fly'"),
        (["env", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli._VERBS)
def test_every_verb_has_its_module(verb, capsys):
    module = importlib.import_module(f"jaxbnb.cli._{verb}")
    assert callable(module.run)
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: jaxbnb {verb} ")
    assert max(map(len, out.splitlines())) <= 80


def test_a_verb_gets_its_arguments_and_gives_the_status(monkeypatch):
    module = importlib.import_module("jaxbnb.cli._env")
    monkeypatch.setattr(module, "add_arguments", lambda p: p.add_argument("--fast"))
    monkeypatch.setattr(module, "run", lambda args: int(args.fast))
    assert cli.main(["env", "--fast", "7"]) == 7


def test_help_imports_no_verb():
    code = """
import sys
from jaxbnb import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
assert not [name for name in sys.modules if name.startswith("jaxbnb.cli.")]
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_python_dash_m():
    done = run("-m", "jaxbnb", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: jaxbnb ")
    done = run("-m", "jaxbnb", "fly")
    assert done.returncode == 2
