"""Checking kernels on a GPU: how a process ends, what is recorded, and where."""

import json
import os
import signal
import sys
import types

import jax
import numpy as np
import pytest

from jaxbnb_kernels import _records, checks, config, verification
from jaxbnb_kernels.verification import Verdict, verdict_on

READY = f"print({verification._READY!r}, flush=True)"


GPU = types.SimpleNamespace(
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    local_hardware_id=1,
    client=types.SimpleNamespace(platform_version="cuda 13000"),
)
FINE, REFUTED = (
    Verdict(None, True),
    Verdict("wrong numbers", True),
)


ERRORS = {"a": 0.5, "b": 2.0, "c, 1 row": 0.0}


def run(*lines, time_limit=60.0):
    command = [sys.executable, "-c", "\n".join(lines)]
    return verification.run(command, dict(os.environ), time_limit)


def test_a_process_says_what_it_found():
    for verdict in (FINE, REFUTED, Verdict("no memory", False)):
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
    """The kernels are to blame only if the GPU was ready for them."""
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
    verdict = verification.run(["/nowhere/python"], {}, 1)
    assert "could not start" in verdict.reason
    assert not verdict.is_final


def test_the_first_check_that_fails_decides():
    def checks(*errors):
        for i, error in enumerate(errors):
            yield f"check {i}", error

    def broken(message):
        yield "check 0", 0.5
        raise ValueError(f"{message}\nmore")

    assert verdict_on(checks(0.0, 1.0)) == FINE
    reason = "wrong numbers (check 1: 1.5 x the allowed error)"
    assert verdict_on(checks(0.0, 1.5, 2.0)) == Verdict(reason, True)
    assert verdict_on(checks(float("nan"))).reason.startswith("wrong numbers")
    assert verdict_on(broken("bad")) == Verdict("ValueError: bad", True)
    assert not verdict_on(broken("RESOURCE_EXHAUSTED: of memory")).is_final


def test_the_checks_after_a_failed_one_run_too():
    lines = [json.dumps({"check": name, "error": e}) for name, e in ERRORS.items()]
    said = json.dumps({"reason": "wrong numbers", "is_final": True})
    printed = [f"print({line!r}, flush=True)" for line in lines]
    verdict = run(READY, *printed, f"print({said!r})")
    assert verdict == REFUTED
    assert verdict.errors == ERRORS
    hung = run(READY, *printed, "import time; time.sleep(60)", time_limit=2)
    assert hung.reason.endswith("after 2 s; the last that did is c, 1 row")
    assert hung.errors == ERRORS


def test_ops_that_are_checked_at_the_same_time():
    """One that hangs costs its own time limit; the others are there before it."""
    said = json.dumps({"reason": None, "is_final": True})
    commands = {
        "hangs": [sys.executable, "-c", "import time; time.sleep(60)"],
        "fine": [sys.executable, "-c", f"print({said!r})"],
    }
    (first, fine), (last, hung) = verification.run_all(
        commands, dict(os.environ), 5.0, at_once=2
    )
    assert (first, last) == ("fine", "hangs")
    assert fine == FINE
    assert hung.reason == "they had not returned after 5 s"


def test_the_process_itself(tmp_path, monkeypatch):
    """It checks on a CPU what runs there and what does not, in a misleading folder."""
    for name in ("json", "jax", "jaxbnb_kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the folder')")
    monkeypatch.chdir(tmp_path)
    on_cpu = verification.environment(0) | {"JAX_PLATFORMS": "cpu"}
    command = verification.command("embed_blockwise", "xla")
    assert verification.run(command, on_cpu, 300) == FINE
    verdict = verification.run(verification.command("embed_blockwise"), on_cpu, 300)
    assert verdict.reason.startswith("NotImplementedError: mosaic_gpu needs compute")


def test_its_environment(monkeypatch):
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    environment = verification.environment(1)
    assert "JAX_DEBUG_NANS" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["JAX_CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Pretends to have an H100. Checks return the yielded verdicts, the last first."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "local_devices", lambda: [GPU])
    verdicts = []
    monkeypatch.setattr(verification, "run", lambda *args: verdicts.pop())
    _records.of_user.cache_clear()
    yield verdicts
    _records.of_user.cache_clear()


def test_what_is_found_is_recorded(gpu, tmp_path):
    gpu += [REFUTED, FINE]
    reported = []
    found = verification.verify(
        ["update_8bit", "matmul_int8"], report=lambda *args: reported.append(args)
    )
    assert found == {"update_8bit": FINE, "matmul_int8": REFUTED}
    assert reported == [
        (GPU.device_kind, "update_8bit", FINE),
        (GPU.device_kind, "matmul_int8", REFUTED),
    ]
    assert verification.why_off("update_8bit", GPU) is None
    assert "wrong numbers" in verification.why_off("matmul_int8", GPU)
    assert "not verified" in verification.why_off("embed_blockwise", GPU)
    path = tmp_path / "jaxbnb" / "verified.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    # A later check replaces the record.
    gpu += [FINE]
    verification.verify(["matmul_int8"])
    assert verification.why_off("matmul_int8", GPU) is None
    assert len(json.loads(path.read_text())) == 2


def test_all_ops_that_have_kernels_are_checked(gpu):
    gpu += [FINE] * len(checks.CHECKS)
    assert verification.verify() == dict.fromkeys(checks.CHECKS, FINE)
    assert not gpu


def test_a_verdict_of_the_moment_is_not_recorded(gpu, tmp_path):
    gpu += [Verdict("no memory", False)]
    verification.verify(["update_8bit"])
    assert "not verified" in verification.why_off("update_8bit", GPU)
    assert not list(tmp_path.iterdir())


def test_an_op_without_kernels():
    with pytest.raises(ValueError, match="no kernels to check for matmul_fp8; choose"):
        verification.verify(["matmul_fp8"])


def test_a_machine_without_such_a_gpu():
    message = r"capability 7\.5, .* 12\.0; this is a CPU"
    with pytest.raises(NotImplementedError, match=message):
        verification.verify()


def test_ops_without_kernels_for_a_gpu_are_left_out(gpu, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    card = types.SimpleNamespace(**vars(GPU) | {"device_kind": "NVIDIA L4"})
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    served = [op for op in checks.CHECKS if op != "matmul_int8"]
    gpu += [FINE] * len(served)
    announced = []
    for _ in range(2):
        verification.verify_if_needed(announced.append)
    assert announced == ["NVIDIA L4"]
    assert not gpu
    assert {op: verification.why_off(op, card) for op in checks.CHECKS} == {
        **dict.fromkeys(served),
        "matmul_int8": "mosaic_gpu needs compute capability 9.0; this one's is 8.9",
    }
    with pytest.raises(
        NotImplementedError, match=r"matmul_int8: .* this one's is 8\.9"
    ):
        verification.verify(["matmul_int8"])


def test_a_frozen_program_cannot_check(gpu, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(NotImplementedError, match="this program cannot start"):
        verification.verify()


def test_a_command_checks_once(gpu):
    announced = []
    gpu += [FINE] * len(checks.CHECKS)
    for _ in range(2):
        verification.verify_if_needed(announced.append)
    assert announced == [GPU.device_kind]
    assert not gpu


def test_a_command_does_not_check(gpu, monkeypatch):
    """It does not if kernels are switched on or off, or among several processes."""
    for setting in ("always", "never"):
        with config.override(mosaic_gpu=setting):
            verification.verify_if_needed(pytest.fail)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    verification.verify_if_needed(pytest.fail)
    monkeypatch.undo()
    # This machine does not have a GPU.
    verification.verify_if_needed(pytest.fail)


def write_records(text="[]"):
    path = _records.user_file()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    _records.of_user.cache_clear()
    return path


def a_record():
    return verification._record("update_8bit", GPU, None)


@pytest.mark.parametrize("text", ["", "{", "1", "{}", "[1]", '[{"op": "update_8bit"}]'])
def test_a_file_that_is_not_ours_is_replaced(text, gpu):
    path = write_records(text)
    assert _records.of_user() == ()
    assert _records.write(a_record()) == path
    assert _records.of_user() == (a_record(),)


@pytest.mark.parametrize("mode", [0o620, 0o602])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_what_others_can_write_is_not_trusted(mode, place, gpu):
    path = _records.write(a_record())
    assert _records.of_user() == (a_record(),)
    (path if place == "file" else path.parent).chmod(mode | 0o100)
    _records.of_user.cache_clear()
    assert _records.of_user() == ()
    if place == "folder":
        with pytest.raises(PermissionError, match="must belong to you"):
            _records.write(a_record())


def test_what_another_user_owns_is_not_trusted(gpu, monkeypatch):
    _records.write(a_record())
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    _records.of_user.cache_clear()
    assert _records.of_user() == ()


def test_a_link_is_not_trusted(gpu, tmp_path):
    path = _records.write(a_record())
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    _records.of_user.cache_clear()
    assert _records.of_user() == ()


def test_without_a_home_nothing_is_kept(gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert _records.of_user() == ()
    with pytest.raises(FileNotFoundError, match="no home directory"):
        _records.write(a_record())
    assert not list(tmp_path.iterdir())


def test_a_command_runs_although_nothing_can_be_kept(
    gpu, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    gpu += [FINE]
    verification.verify_if_needed(lambda kind: None)
    assert "could not check its kernels, and runs without them" in caplog.text


@pytest.mark.parametrize("end", [TypeError("no Python"), ValueError("no JSON")])
def test_a_command_runs_whatever_the_checks_do(end, gpu, monkeypatch, caplog):
    def fail(*args):
        raise end

    monkeypatch.setattr(verification, "run", fail)
    verification.verify_if_needed(lambda kind: None)
    assert str(end) in caplog.text
    # Without an interpreter there is nothing to announce.
    monkeypatch.setattr(sys, "executable", None)
    verification.verify_if_needed(pytest.fail)


def test_records_for_the_package(gpu, tmp_path):
    gpu += [REFUTED, FINE]
    verification.verify(["update_8bit", "matmul_int8"], out=tmp_path / "records.json")
    assert _records.of_user() == ()
    entries = json.loads((tmp_path / "records.json").read_text())
    assert [(e["op"], e["reason"]) for e in entries] == [
        ("update_8bit", None),
        ("matmul_int8", "wrong numbers"),
    ]


def test_the_records_of_the_package_can_be_read():
    assert all(isinstance(r, _records.Record) for r in _records.shipped())


def test_lowering_starts_no_process_and_writes_no_file(gpu, tmp_path, monkeypatch):
    from jaxbnb_kernels.codebooks import NF4
    from jaxbnb_kernels.quantize_blockwise import quantize_blockwise

    monkeypatch.setattr(verification, "run", pytest.fail)
    described = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", 132, "cuda")
    )
    with jax.sharding.use_abstract_mesh(described):
        encode = jax.jit(lambda x: quantize_blockwise(x, NF4, block_size=64))
        jax.export.export(encode, platforms=["cuda"])(np.ones(64, np.float32))
    assert not list(tmp_path.iterdir())
