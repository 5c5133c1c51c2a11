"""`jaxbnb bench`: its options and its file."""

import json

import pytest

import jaxbnb.benchmarks
from jaxbnb import cli


@pytest.fixture
def given(monkeypatch):
    """The options that the benchmark `parity` is given; it measures nothing."""
    seen = []

    def bench(**options):
        seen.append(options)
        return iter([jaxbnb.benchmarks.Figure("a", 0.5, "m", 1.0, data={"b": [1]})])

    monkeypatch.setitem(jaxbnb.benchmarks.BENCHMARKS, "parity", bench)
    return seen


def test_parity_gets_its_options(given, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    args = ["--only", "lion8bit,muon8bit", "--plot", str(plot), "--out", str(out)]
    assert cli.main(["bench", "parity", *args]) == 0
    assert given == [{"only": ["lion8bit", "muon8bit"], "plot": plot}]
    assert "ok: at most 1" in capsys.readouterr().out
    (figure,) = json.loads(out.read_text())["figures"]["parity"]
    assert (figure["value"], figure["data"]) == (0.5, {"b": [1]})


def test_parity_needs_no_options(given):
    assert cli.main(["bench", "parity"]) == 0
    assert given == [{}]


def test_options_of_a_benchmark_that_does_not_run(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "optim", "--plot", "plot.svg"])
    assert "--plot: name one benchmark that has a plot" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "optim", "--only", "adamw8bit"])
    assert "--only: only for the benchmark parity" in capsys.readouterr().err
    assert not given


def test_an_unknown_optimizer(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "parity", "--only", "adam9bit"])
    assert "no optimizer 'adam9bit'; choose from adamw8bit, " in capsys.readouterr().err


def test_an_unknown_benchmark(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "fly"])
    assert "no benchmark 'fly'" in capsys.readouterr().err
