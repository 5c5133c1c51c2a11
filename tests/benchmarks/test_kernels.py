"""The benchmark of the kernels, tried with what runs on any machine."""

import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jaxbnb import cli
from jaxbnb.benchmarks import _kernel_run, _kernels, _train
from jaxbnb.benchmarks._kernels import TINY, host_seconds
from jaxbnb_kernels import checks, child, verification

REFERENCE = _kernels.Setting(TINY, host_seconds, "reference", copy=1e-9)


def measure(setting):
    with jax.numpy_dtype_promotion("standard"):
        return [f for task in _kernels.tasks(TINY) for f in task.measure(setting)]


@pytest.fixture(scope="module")
def figures():
    return measure(REFERENCE)


def test_every_kernel_is_measured(figures):
    """What decides most comes first."""
    assert [figure.name for figure in figures] == [
        "NF4 x W, 64 rows, tiny",
        "AdamW in 8 bits, bfloat16, 0 M parameters",
        "NF4 quantise, tiny",
        "NF4 dequantise, tiny",
        "NF4 x W, 1 rows, tiny",
        "NF4 dy W.T, 64 rows, tiny",
        "LLM.int8 x W, 1 rows, tiny",
        "LLM.int8 x W, 64 rows, tiny",
    ]
    assert all(figure.value > 0 for figure in figures)
    assert not any("WRONG" in figure.unit for figure in figures)


def test_the_order_on_a_gpu():
    tasks = _kernels.tasks(_kernels.FULL)
    decisive = [task for task in tasks if task.is_decisive]
    assert tasks[: len(decisive)] == decisive
    # Five numbers of rows on two matrices, the step, and the codecs of both.
    ops = [task.op for task in decisive]
    expected = 10 * ["matmul_blockwise"] + ["update_8bit"] + 2 * ["quantize_blockwise"]
    assert ops == expected
    assert decisive[0].title.startswith("NF4 x W, 1 rows, Llama 3")
    assert len({task.title for task in tasks}) == len(tasks)


def test_a_figure_names_what_was_fastest(figures):
    for figure in figures:
        seconds = figure.data["seconds"]
        assert figure.data["fastest"] == min(seconds, key=seconds.get)
        assert figure.detail.endswith(f"fastest: {figure.data['fastest']}")
    assert set(figures[0].data["seconds"]) == {"reference", "xla", "dense"}
    assert set(figures[1].data["seconds"]) == {"reference", "xla", "optax"}


def test_the_limits_are_those_of_large_matrices_and_few_rows():
    def limit(what, tokens, size):
        return _kernels._product_limit(what, tokens, (size, size))

    assert limit("x W", 16, 4096) is None
    assert limit("x W", 16, 8192) == pytest.approx(1 / 2.6)
    assert limit("x W", 64, 8192) == 0.5
    assert limit("x W", 512, 4096) == 1.0
    assert limit("x W", 4096, 4096) == pytest.approx(1 / 0.95)
    assert limit("dy W.T", 1024, 4096) is None
    assert limit("dy W.T", 4096, 4096) == pytest.approx(1 / 0.9)


def test_wrong_numbers_are_not_timed(monkeypatch):
    """Kernels that are off in one of many elements, each."""

    def spoil(name, wrong):
        function = getattr(_kernels, name)

        def spoiled(*args, implementation=None, **options):
            results = function(*args, implementation=implementation, **options)
            return wrong(results) if implementation == "reference" else results

        monkeypatch.setattr(_kernels, name, spoiled)

    def add(y, amount):
        return y.at[0, 0].add(jnp.asarray(amount, y.dtype))

    spoil("matmul", lambda y: add(y, 100))
    spoil("dequantize_blockwise", lambda y: add(y, 100))
    spoil("quantize_blockwise", lambda results: (add(results[0], 1), results[1]))
    spoil("update_8bit", lambda results: (add(results[0], 1), results[1]))
    figures = measure(REFERENCE)
    limits = {f.name: f.limit for f in figures if "WRONG" in f.unit}
    assert len(limits) == len(figures) == 8
    assert all(f.value > (limits[f.name] or math.inf) for f in figures)


def test_without_such_a_gpu_it_says_so(capsys):
    assert cli.main(["bench", "kernels"]) == 0
    assert "skipped: mosaic_gpu needs compute capability" in capsys.readouterr().out


def says(reason, error):
    """A command that stands for the checks of an op."""
    lines = [
        {"check": "a, b", "error": error},
        {"reason": reason, "is_final": True},
    ]
    code = f"print({json.dumps(lines[0])!r}); print({json.dumps(lines[1])!r})"
    return [sys.executable, "-c", code]


def hangs(line="{}"):
    code = f"import time; print({line!r}, flush=True); time.sleep(300)"
    return [sys.executable, "-c", code]


@pytest.fixture
def commands(monkeypatch):
    """The commands that check each op; those of products are wrong or never return."""
    found = dict.fromkeys(checks.CHECKS, says(None, 0.5))
    found["matmul_int8"] = says("wrong numbers (a, b)", math.nan)
    found["matmul_blockwise"] = hangs(json.dumps({"check": "x W", "error": 0.0}))
    monkeypatch.setattr(verification, "command", lambda op, *others: found[op])
    return found


def test_a_rehearsal(commands, tmp_path, monkeypatch, capsys):
    """All of it, in processes: a failed check, a hang, times, training, the table."""
    monkeypatch.setattr(verification, "TIME_LIMIT", 5.0)
    monkeypatch.setattr(_kernel_run, "STEPS_SHARE", 0.001)
    out = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--rehearse", "--out", str(out)]) == 1
    figures = {f["name"]: f for f in json.loads(out.read_text())["figures"]["kernels"]}
    hung = figures["matmul_blockwise, checks that failed"]
    assert hung["value"] == 1
    assert hung["detail"] == "they had not returned after 5 s; the last that did is x W"
    wrong = figures["matmul_int8, checks that failed"]
    assert (wrong["value"], wrong["data"]) == (1, {"errors": {"a, b": "nan"}})
    assert figures["update_8bit, errors"]["value"] == 0.5
    assert figures["device copy"]["value"] > 0
    step = figures["AdamW in 8 bits, bfloat16, 0 M parameters"]
    assert set(step["data"]["seconds"]) == {"reference", "xla", "optax"}
    assert figures["NF4 dequantise, tiny"]["value"] > 0
    # Products have no kernel to trust: their times, and training with it.
    assert "NF4 x W, 64 rows, tiny" not in figures
    left_out = figures["left out: their checks failed"]
    assert (left_out["value"], left_out["detail"].split("; ")[0]) == (
        5,
        "NF4 x W, 64 rows, tiny",
    )
    trained = figures["QLoRA, without kernels"]
    assert trained["value"] > 0
    assert trained["data"]["losses"][1] < trained["data"]["losses"][0]
    table = capsys.readouterr().out.split("measured  target\n")[1].splitlines()
    outcomes = {row.split(", ")[0]: row.split()[-1] for row in table}
    assert (outcomes["update_8bit"], outcomes["matmul_int8"]) == ("ok", "MISSED")


def test_a_budget_that_ends_early(monkeypatch, capsys):
    fine = [(op, verification.Verdict(None, True)) for op in checks.CHECKS]
    monkeypatch.setattr(verification, "run_all", lambda *args: iter(fine))
    monkeypatch.setattr(child, "command", lambda *args, **options: hangs())
    args = ["bench", "kernels", "--rehearse", "--seconds", "2"]
    assert cli.main(args) == 1
    out = capsys.readouterr().out
    assert out.count("ended from outside") == 2
    assert "QLoRA, with kernels, failure " in out
    left_out = out[out.index("left out: no time was left") :]
    assert left_out.split()[6:8] == ["7.000", "measurements"]


def test_a_gpu_without_some_kernels(monkeypatch, tmp_path):
    """What it has is checked, recorded, timed, and trained with and without."""
    gpu = types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA L4",
        local_hardware_id=1,
        client=types.SimpleNamespace(platform_version="cuda 13000"),
    )
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [gpu])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    fine = verification.Verdict(None, True, {"a": 0.25})
    monkeypatch.setattr(verification, "run", lambda *args: fine)
    figure = dataclasses.asdict(_kernels.Figure("f", 1, "u"))
    started = []

    def read_lines(command, environment, end, silence):
        module, _, implementation, argument, *_ = command[command.index("main") - 1 :]
        started.append((module.split(".")[-1], environment["JAXBNB_MOSAIC_GPU"]))
        assert implementation == "mosaic_gpu"
        assert environment["JAX_PLATFORMS"] == "cuda"
        assert environment["JAX_CUDA_VISIBLE_DEVICES"] == "1"
        if module == _train.__name__:
            speed = 200.0 if environment["JAXBNB_MOSAIC_GPU"] == "1" else 100.0
            yield {
                "model": "m",
                "tokens_per_second": speed,
                "steps": 2,
                "losses": [2.0, 1.0],
                "peak_bytes": 0,
            }
            return
        for number in [None, *map(int, argument.split(","))]:
            yield {"task": number, "figures": [figure]}

    monkeypatch.setattr(_kernel_run, "read_lines", read_lines)
    records = tmp_path / "verified.json"
    figures = list(_kernel_run.bench_kernels(records=records))
    assert started == [
        ("_kernels", "1"),
        ("_train", "1"),
        ("_train", "0"),
        ("_kernels", "1"),
    ]
    served = [op for op in checks.CHECKS if op != "matmul_int8"]
    checked = {f.name for f in figures[: len(served)]}
    assert checked == {f"{op}, errors" for op in served}
    assert {r["op"] for r in json.loads(records.read_text())} == {*served}
    # The copy counts once.
    tasks = [t for t in _kernels.tasks(_kernels.FULL) if t.op in served]
    assert sum(f.name == "f" for f in figures) == len(tasks) + 1
    (ratio,) = [f for f in figures if f.unit == "x the time without"]
    assert ratio.value == 0.5


def test_a_task_that_hangs_costs_only_itself(monkeypatch):
    """The next process goes on after it, unless too many in a row have failed."""
    given = []
    figure = _kernels.Figure("f", 1, "u")

    def command(module, function, implementation, numbers, packages):
        given.append(numbers)
        if len(given) > 1:
            return [sys.executable, "-c", "raise ValueError('no GPU')"]
        return hangs(json.dumps({"task": 0, "figures": [dataclasses.asdict(figure)]}))

    def times():
        left_over.extend((yield from run.times(tasks, range(6), math.inf)))

    monkeypatch.setattr(child, "command", command)
    monkeypatch.setattr(_kernel_run, "SILENCE", 2.0)
    run, tasks = _kernel_run._Run("reference", {}), _kernels.tasks(TINY)
    left_over: list[int] = []
    figures = list(times())
    assert figures[0] == figure
    assert [f.name for f in figures[1:]] == [task.title for task in tasks[1:4]]
    silent, *crashed = [f.detail for f in figures[1:]]
    assert silent == "ended from outside: silent for 2 s"
    assert crashed == ["ended with status 1: ValueError: no GPU"] * 2
    assert given == ["0,1,2,3,4,5", "2,3,4,5", "3,4,5"]
    assert left_over == [4, 5]


def test_an_exception_ends_a_process_of_times(monkeypatch, capsys):
    """Its line has the reason. Without CUPTI, the host's clock is used."""

    def broken(setting):
        raise ValueError("bad launch")

    def no_cupti(functions, sets):
        raise RuntimeError("no CUPTI")

    task = _kernels.Task("broken", "update_8bit", True, broken)
    monkeypatch.setattr(_kernels, "tasks", lambda sizes: [task, task])
    monkeypatch.setitem(_kernels.SETTINGS, "reference", (TINY, no_cupti))
    _kernels.main("reference", "0,1")
    copy, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert copy["task"] is None
    assert copy["figures"][0]["detail"] == "by the host's clock, since no CUPTI"
    (figure,) = failed["figures"]
    assert (failed["task"], figure["detail"]) == (0, "ValueError: bad launch")
    assert "Traceback" in figure["data"]["output"]
