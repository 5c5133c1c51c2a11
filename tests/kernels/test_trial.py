"""Trials of kernels: what decides, what is kept, and what a process's end says."""

import json
import logging
import os
import signal
import sys
import types

import jax
import pytest

from jaxbnb_kernels import _hopper, _trial

REAL_RUN = _trial.run
READY = f"print({_trial._READY!r}, flush=True)"


class Gpu:
    local_hardware_id = 1

    def __init__(self, kind, version="cuda 13000"):
        self.device_kind = kind
        self.client = types.SimpleNamespace(platform_version=version)


GPU = Gpu("NVIDIA H100 80GB HBM3")
FINE, REFUTED = _trial.Verdict(None, True), _trial.Verdict("wrong numbers", True)


def run(*lines, time_limit=60.0):
    command = [sys.executable, "-c", "\n".join(lines)]
    return _trial.run(command, dict(os.environ), time_limit)


def test_a_process_says_what_it_found():
    for verdict in (FINE, REFUTED, _trial.Verdict("no memory", False)):
        said = json.dumps({"reason": verdict.reason, "is_final": verdict.is_final})
        printed = f"print('before'); print({said!r}); print('after')"
        assert run(READY, printed) == verdict


@pytest.mark.parametrize("is_ready", [True, False])
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("import os; os.abort()", f"was ended by signal 6 ({signal.strsignal(6)}): "),
        ("raise RuntimeError('no GPU')", "ended with status 1: RuntimeError: no GPU"),
        ("print('{}')", "ended with status 0: "),
        ("import time; time.sleep(60)", "they had not returned after 2 s"),
    ],
)
def test_a_process_that_ends_otherwise(end, reason, is_ready):
    """It is the kernels' doing only where the GPU was ready for them."""
    verdict = run(*[READY] * is_ready, end, time_limit=2)
    assert verdict.reason.endswith(reason)
    assert verdict.is_final == is_ready


@pytest.mark.parametrize(
    "end",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os; os.write(2, b'cuModuleLoadData: out of memory'); os.abort()",
    ],
)
def test_an_end_that_is_not_the_kernels_doing(end):
    verdict = run(READY, end)
    assert "was ended by signal" in verdict.reason
    assert not verdict.is_final


def test_a_process_that_cannot_be_started():
    verdict = _trial.run(["/nowhere/python"], {}, 1)
    assert "no process could be started" in verdict.reason
    assert not verdict.is_final


def test_the_first_check_that_fails_decides():
    def checks(*errors):
        for i, error in enumerate(errors):
            yield f"check {i}", error

    def broken(message):
        yield "check 0", 0.5
        raise ValueError(f"{message}\nmore")

    assert _trial.verdict_on(checks(0.0, 1.0)) == FINE
    reason = "wrong numbers (check 1: 1.5 x the allowed error)"
    assert _trial.verdict_on(checks(0.0, 1.5, 2.0)) == _trial.Verdict(reason, True)
    assert _trial.verdict_on(checks(float("nan"))).reason.startswith("wrong numbers")
    assert _trial.verdict_on(broken("bad")) == _trial.Verdict("ValueError: bad", True)
    assert not _trial.verdict_on(broken("RESOURCE_EXHAUSTED: of memory")).is_final


def test_the_process_itself(tmp_path, monkeypatch):
    """On a CPU, of what runs there and what does not, and in a folder that may lie."""
    for name in ("json", "jax", "jaxbnb_kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the folder')")
    monkeypatch.chdir(tmp_path)
    on_cpu = _trial.environment(0) | {"JAX_PLATFORMS": "cpu"}
    command = _trial.command("embed_blockwise", "xla")
    assert _trial.run(command, on_cpu, 300) == FINE
    verdict = _trial.run(_trial.command("embed_blockwise"), on_cpu, 300)
    assert verdict.reason.startswith("NotImplementedError: mosaic_gpu needs a GPU")


def test_its_environment(monkeypatch):
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    environment = _trial.environment(1)
    assert "JAX_DEBUG_NANS" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["JAX_CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """Verdicts to come, which are taken from the end; and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    to_come = []
    monkeypatch.setattr(_trial, "run", lambda *args: to_come.pop())
    _trial._verdict.cache_clear()
    yield to_come
    _trial._verdict.cache_clear()


def test_a_verdict_is_kept(trials, caplog):
    trials += [REFUTED, FINE]
    with caplog.at_level(logging.WARNING, "jaxbnb"):
        for _ in range(2):
            assert _trial.why_not("update_8bit", GPU) is None
            assert _trial.why_not("matmul_int8", GPU) == "wrong numbers"
            # As another process would see it.
            _trial._verdict.cache_clear()
    assert not trials
    said = [r.getMessage() for r in caplog.records]
    assert said[0].startswith("jaxbnb tries the kernels of update_8bit on this NVIDIA")
    assert said[2] == (
        "XLA compiles matmul_int8 here, not jaxbnb's kernels: wrong numbers"
    )
    assert len(said) == 3


def test_whatever_happens_a_program_is_compiled(trials, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", None)
    monkeypatch.setattr(_trial, "run", REAL_RUN)
    assert "could not be tried" in _trial.why_not("update_8bit", GPU)
    assert "could not try the kernels of update_8bit" in caplog.text
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "no Python to start" in _trial.why_not("matmul_int8", GPU)


def test_one_of_the_moment_is_not(trials):
    trials += [FINE, _trial.Verdict("no memory", False)]
    for _ in range(2):
        assert _trial.why_not("update_8bit", GPU) == "no memory"
    _trial._verdict.cache_clear()
    assert _trial.why_not("update_8bit", GPU) is None


def test_it_is_of_a_kind_of_gpu_and_of_these_versions(trials, monkeypatch):
    trials += [FINE, REFUTED, FINE, REFUTED]
    assert _trial.why_not("update_8bit", Gpu("NVIDIA H200")) == "wrong numbers"
    assert _trial.why_not("update_8bit", GPU) is None
    newer = Gpu(GPU.device_kind, "cuda 13010")
    assert _trial.why_not("update_8bit", newer) == "wrong numbers"
    _trial._verdict.cache_clear()
    monkeypatch.setattr(_trial, "_source", lambda: b"another")
    assert _trial.why_not("update_8bit", GPU) is None
    assert not trials


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1"])
def test_a_file_that_is_none_of_ours_is_replaced(text, trials):
    path = _trial.folder(GPU) / "update_8bit.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    trials.append(FINE)
    assert _trial.why_not("update_8bit", GPU) is None
    assert json.loads(path.read_text()) == {"reason": None}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written(trials, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    trials.append(FINE)
    assert _trial.why_not("update_8bit", GPU) is None
    assert "and will try again" in caplog.text


def test_without_a_home_nothing_is_kept(trials, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    trials.append(FINE)
    assert _trial.why_not("update_8bit", GPU) is None
    assert "no home directory" in caplog.text
    assert not list(tmp_path.iterdir())


def test_of_several_processes_none_tries(trials, monkeypatch):
    """And all of them know it, whichever has the first device."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    first = jax.devices()[0]
    for of_this_one in ([first], jax.devices()[1:2]):
        monkeypatch.setattr(jax, "local_devices", lambda d=of_this_one, **_: d)
        assert "several processes" in _hopper.why_not_tried("update_8bit", first)
