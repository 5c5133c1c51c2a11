"""`jaxbnb env`: the report, and that its self-test can fail."""

import importlib.metadata

import jax.numpy as jnp
import pytest

from jaxbnb import cli
from jaxbnb.cli import _choices, _env
from jaxbnb_kernels import checks, config, native, verification


@pytest.fixture
def one_op(monkeypatch):
    """All of them are checked in tests/kernels; here one is enough."""
    monkeypatch.setattr(checks, "CHECKS", {"update_8bit": checks.CHECKS["update_8bit"]})


def test_report(one_op, capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"  jaxbnb              {importlib.metadata.version('jaxbnb')}" in lines
    assert "  cpu:0               cpu" in lines
    start = lines.index("implementations, the first that can serve a call") + 1
    operations = lines[start : lines.index("", start)]
    by_name = dict(line.split(maxsplit=1) for line in operations)
    native_first = "xla, reference" if native.why_not() else "cpu, xla, reference"
    assert by_name["quantize_blockwise"] == native_first
    # Its name is longer than the other tables' column.
    assert by_name["grouped_matmul_blockwise"] == "xla, reference"
    # It has no kernels.
    assert by_name["matmul_fp8"] == "xla, reference"
    assert "None" not in out
    assert lines[lines.index("GPU kernels") + 1] == "  setting             verified"
    reason = "12.0; this is a CPU"
    assert any(x.startswith("  mosaic_gpu") and x.endswith(reason) for x in lines)
    at = lines.index("CPU kernels")
    assert lines[at + 1] == "  setting             always"
    used = native.instruction_set()
    assert lines[at + 2] == f"  instructions        {used}" or native.why_not()
    at = lines.index("attention to long texts")
    assert lines[at + 1] == "  16 bits             blocks; no GPU"
    assert lines[-1] == "all 3 checks ok"
    assert sum(line.endswith("  ok") for line in lines) == 3
    assert "FAILED" not in out


def test_without_the_library_it_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    assert dict(_env._implementations())["quantize_blockwise"] == "xla, reference"
    row = dict(_env._cpu_kernels())["cpu"]
    assert row.endswith("python -m jaxbnb_kernels._cpu.build makes it now")


def test_on_a_gpu_it_says_which_kernels_run_and_why_others_do_not(monkeypatch):
    reasons = {"matmul_int8": "its checks failed on NVIDIA H200: wrong numbers"}
    monkeypatch.setattr(native, "why_not", lambda: "cpu needs a compiler")
    monkeypatch.setattr(verification, "why_no_kernels", lambda device: None)
    monkeypatch.setattr(verification, "why_off", lambda op, device: reasons.get(op))
    rows = dict(_env._implementations())
    assert rows["quantize_blockwise"] == "mosaic_gpu, xla, reference"
    assert rows["matmul_int8"] == "xla, reference"
    # It has no kernels.
    assert rows["matmul_fp8"] == "xla, reference"
    rows = dict(_env._kernels())
    assert rows["quantize_blockwise"] == "on"
    assert rows["matmul_int8"] == reasons["matmul_int8"]
    assert rows["records"].endswith("verified.json")
    with config.override(mosaic_gpu="never"):
        assert dict(_env._kernels())["setting"] == "never"


@pytest.mark.parametrize("wrong", [1.001, jnp.nan])
def test_a_wrong_step_fails(wrong, one_op, monkeypatch, capsys):
    update = checks.update_8bit

    def spoiled(rule, scalars, *args, **kwargs):
        return update(rule, scalars * jnp.float32(wrong), *args, **kwargs)

    monkeypatch.setattr(checks, "update_8bit", spoiled)
    assert cli.main(["env"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 of 3 checks FAILED"
    assert sum(line.endswith("  FAILED") for line in lines) == 1


def test_the_command_line_knows_the_ops_that_have_kernels():
    assert list(_choices.OPS) == list(checks.CHECKS)


def test_verify_kernels(monkeypatch, capsys):
    assert cli.main(["verify-kernels"]) == 1
    assert "error: mosaic_gpu needs compute" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["verify-kernels", "matmul_fp8"])
    assert "choose from quantize_blockwise" in capsys.readouterr().err

    def verify(ops, report, out):
        verdicts = {
            "matmul_int8": verification.Verdict(None, True),
            "update_8bit": verification.Verdict("wrong numbers", True),
        }
        for op in ops:
            report("NVIDIA H200", op, verdicts[op])
        return {op: verdicts[op] for op in ops}

    monkeypatch.setattr(verification, "verify", verify)
    assert cli.main(["verify-kernels", "matmul_int8"]) == 0
    assert capsys.readouterr().out == (
        "NVIDIA H200  matmul_int8         ok\n"
        "these kernels now run by themselves on this GPU\n"
    )
    assert cli.main(["verify-kernels", "matmul_int8", "update_8bit"]) == 1
    out = capsys.readouterr().out
    assert "NVIDIA H200  update_8bit         FAILED: wrong numbers\n" in out
    assert out.endswith("XLA's code runs instead of the kernels of update_8bit\n")
