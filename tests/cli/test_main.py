"""The command line: its verbs, and what each costs."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from typing import get_args

import pytest

from jaxbnb import benchmarks, cli
from jaxbnb.calibration import _levels, _matrix
from jaxbnb.cli import _choices
from jaxbnb.convert import gguf_files, writers
from jaxbnb.core import formats
from jaxbnb.models import _stored

GENERATE = ["generate", "model", "--prompt", "x"]
# As the script that pip writes calls it.
SCRIPT = "import sys; from jaxbnb.cli import main; sys.exit(main())"


def run(*args, **options):
    command = [sys.executable, "-W", "error", *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_lists_the_verbs(args, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(args)
    out = capsys.readouterr().out
    for verb, summary in _choices.VERBS.items():
        assert re.search(rf"(?m)^    {verb}\s", out)
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
        (["convert", "a"], "the following arguments are required: dst"),
        (["convert", "a", "b", "--double-quant"], "give --quant as well"),
        (["convert", "a", "b", "--to", "bitsandbytes"], "needs a --quant"),
        (
            ["convert", "a", "b", "--quant", "nf4", "--to", "safetensors"],
            "--quant writes bitsandbytes' tensors: use --to bitsandbytes",
        ),
        (["convert", "a", "b", "--quant", "nf5"], "invalid choice: 'nf5'"),
        (["convert", "a", "b", "--coordinator", "auto"], "only --to flax converts in"),
        (["finetune", "a", "--process-id", "1"], "--process-id need --coordinator"),
        (["finetune", "a", "--coordinator", "b"], "HOST:PORT or auto, got b"),
        (
            ["finetune", "a", "--coordinator", "auto", "--num-processes", "2"],
            "--process-id are given together",
        ),
        ([*GENERATE, "--double-quant"], "give --quant as well"),
        ([*GENERATE, "--quant", "stored", "--double-quant"], "stay as they are"),
        (
            [*GENERATE, "--quant", "llm_int8", "--double-quant"],
            "leave out --double-quant",
        ),
        ([*GENERATE, "--max-new-tokens", "0"], "at least 1, got 0"),
        ([*GENERATE, "--temperature", "nan"], "0 or more, got nan"),
        ([*GENERATE, "--top-k", "0"], "at least 1, got 0"),
        ([*GENERATE, "--top-p", "1.5"], "above 0 and at most 1, got 1.5"),
        ([*GENERATE, "--top-p", "0.9"], "give a --temperature above 0 as well"),
    ],
)
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", _choices.VERBS)
def test_every_verb_has_its_module(verb, capsys):
    module = importlib.import_module(f"jaxbnb.cli._{verb.replace('-', '_')}")
    assert callable(module.run)
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: jaxbnb {verb} ")
    assert max(map(len, out.splitlines())) <= 80


def test_a_verb_gets_its_arguments_and_gives_the_status(monkeypatch):
    module = importlib.import_module("jaxbnb.cli._inspect")
    monkeypatch.setattr(module, "run", lambda args: int(args.path))
    assert cli.main(["inspect", "7"]) == 7


def test_choices_are_those_of_the_packages():
    """Which the command line does not import to know them."""
    assert list(_choices.BENCHMARKS) == list(benchmarks.BENCHMARKS)
    assert _choices.OPTIMIZERS == benchmarks.PARITY_OPTIMIZERS
    assert _choices.FORMATS == formats.WEIGHT_FORMATS
    assert _choices.STORED == _stored.STORED
    assert _choices.GGUF_TYPES == gguf_files.GGUF_TYPES
    assert _choices.COMPRESSED == writers.COMPRESSED_TENSORS_TYPES
    assert tuple(_levels.searchable()) == _choices.CALIBRATED
    assert get_args(_matrix.Method) == _choices.METHODS


@pytest.mark.parametrize("start", [["-m", "jaxbnb"], ["-c", SCRIPT]])
def test_help_and_wrong_arguments_need_no_jax(start, tmp_path):
    """Nothing but the standard library: whatever else is imported fails."""
    for name in ("jax", "flax", "optax", "numpy", "jaxtyping", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    version = f"jaxbnb {importlib.metadata.version('jaxbnb')}"
    for args, status, first in (
        (["--help"], 0, "usage: jaxbnb [-h] [--version] <verb> ..."),
        (["--version"], 0, version),
        (["bench", "--help"], 0, "usage: jaxbnb bench "),
        (["chat", "--help"], 0, "usage: jaxbnb chat "),
        (["convert", "--help"], 0, "usage: jaxbnb convert "),
        (["env", "--help"], 0, "usage: jaxbnb env "),
        (["generate", "--help"], 0, "usage: jaxbnb generate "),
        (["inspect", "--help"], 0, "usage: jaxbnb inspect "),
        (["fly"], 2, "usage: jaxbnb "),
        (["bench", "parity", "--only", "adam9bit"], 2, "usage: jaxbnb bench "),
        (["convert", "a", "b", "--quant", "nf5"], 2, "usage: jaxbnb convert "),
    ):
        done = run(*start, *args, env=environment)
        assert done.returncode == status, done.stderr
        assert (done.stdout or done.stderr).startswith(first)
    # That says something: a verb that runs imports them.
    done = run(*start, "inspect", "nowhere", env=environment)
    assert done.stderr.splitlines()[-1].startswith("ImportError: no ")


def test_ctrl_c_while_it_imports(tmp_path):
    # A shell starts its background jobs with this signal ignored.
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    paths = [str(tmp_path), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = run("-m", "jaxbnb", "env", env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_of_a_verb(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    for args, line in (
        (["env"], "interrupted\n"),
        (["convert", "a", "b", "--dry-run"], "interrupted\n"),
        (["convert", "a", "b"], "interrupted: the same command continues from here\n"),
        (
            ["calibrate", "a", "b", "--method", "mse"],
            "interrupted: the same command continues from here\n",
        ),
    ):
        module = importlib.import_module(f"jaxbnb.cli._{args[0]}")
        monkeypatch.setattr(module, "run", interrupted)
        assert cli.main(args) == 130
        assert capsys.readouterr() == ("", line)
