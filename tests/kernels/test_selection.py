"""Which implementation runs, and why."""

import dataclasses
import functools
import os
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest

from jaxbnb_kernels import (
    _architecture,
    _records,
    _selection,
    _tiles,
    codebooks,
    config,
)
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise

H100 = _records.Gpu("NVIDIA H100 80GB HBM3", "9.0", "cuda 13000")
A100 = _records.Gpu("NVIDIA A100-SXM4-80GB", "8.0", "cuda 13000", 108)
V100 = _records.Gpu("Tesla V100-SXM2-16GB", "7.0", "cuda 13000")
KERNEL = _selection.Kernel("update_8bit", "update")


def cannot(x):
    raise NotImplementedError(f"no {x}")


def double(x):
    return 2 * x


def test_the_first_that_can_runs():
    assert _selection.run("op", {"a": cannot, "b": double}, None, 2) == 4
    assert _selection.run("op", {"a": double, "b": cannot}, None, 2) == 4


def test_one_that_is_asked_for_is_the_only_one_tried():
    assert _selection.run("op", {"a": cannot, "b": double}, "b", 2) == 4
    with pytest.raises(NotImplementedError, match="no 2"):
        _selection.run("op", {"a": cannot, "b": double}, "a", 2)


def test_when_none_can_every_reason_is_shown():
    with pytest.raises(ExceptionGroup, match="no implementation of op") as caught:
        _selection.run("op", {"a": cannot, "b": cannot}, None, 2)
    assert [str(error) for error in caught.value.exceptions] == ["no 2", "no 2"]


def test_an_unknown_name():
    message = r"op has no implementation 'c'; choose one of \['a', 'b'\], or None"
    with pytest.raises(ValueError, match=message):
        _selection.run("op", {"a": cannot, "b": double}, "c", 2)


def test_other_errors_are_not_swallowed():
    def broken(x):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        _selection.run("op", {"a": broken, "b": double}, None, 2)


@pytest.mark.parametrize("setting", ["verified", "always", "never"])
def test_a_gpu_kernel_comes_first_unless_switched_off(setting):
    def kernel(x, *, kinds, is_required):
        return kinds, is_required

    implementations = {"mosaic_gpu": kernel, "xla": double}
    by_default = 4 if setting == "never" else (("mosaic_gpu",), False)
    with config.override(mosaic_gpu=setting):
        assert _selection.run("op", implementations, None, 2) == by_default
        asked_for = _selection.run("op", implementations, "mosaic_gpu", 2)
    assert asked_for == (("mosaic_gpu",), True)


def test_kernels_of_both_kinds_are_offered_together():
    def kernel(x, *, kinds, is_required):
        return kinds, is_required

    implementations = {"mosaic_gpu": kernel, "cpu": kernel, "xla": double}
    assert _selection.run("op", implementations, None, 2) == (
        ("mosaic_gpu", "cpu"),
        False,
    )
    with config.override(cpu="never", mosaic_gpu="never"):
        assert _selection.run("op", implementations, None, 2) == 4
    assert _selection.run("op", implementations, "cpu", 2) == (("cpu",), True)


def test_kernels_that_do_not_serve_a_call_are_left_out():
    native = _selection.Kernel.for_cpu("op", "function")

    def refuse():
        raise NotImplementedError("blocks of 48")

    kinds = "mosaic_gpu", "cpu"
    served = _selection.serving(kinds, mosaic_gpu=refuse, cpu=lambda: native)
    assert served == (native,)
    with pytest.raises(NotImplementedError, match="blocks of 48"):
        _selection.serving(kinds, mosaic_gpu=refuse, cpu=refuse)


def record(reason=None, **fields):
    fields = {
        "op": "update_8bit",
        "device_kind": H100.kind,
        "cuda": H100.cuda,
        "jax": _records.jax_versions(),
        "digest": _records.digest(),
    } | fields
    return _records.Record(**fields, reason=reason)


def why_not(*records, option="verified", gpus=(H100,)):
    return _selection.why_not(KERNEL, gpus, option, records)


def test_a_record_lets_a_kernel_run_on_its_kind_of_gpu():
    assert why_not(record()) is None
    # A GPU that is only described does not have a CUDA version.
    assert why_not(record(), gpus=[dataclasses.replace(H100, cuda=None)]) is None
    missing = "not verified on NVIDIA H100 80GB HBM3: run `jaxbnb verify-kernels`"
    assert why_not() == missing
    for other in (
        {"op": "matmul_int8"},
        {"device_kind": "NVIDIA H200"},
        {"cuda": "cuda 13010"},
        {"jax": "0.1 0.1"},
        {"digest": "0"},
    ):
        assert why_not(record(**other)) == missing


def test_the_last_record_decides():
    failed = record("wrong numbers")
    reason = "its checks failed on NVIDIA H100 80GB HBM3: wrong numbers"
    assert why_not(record(), failed) == reason
    assert why_not(failed, record()) is None


def test_all_gpus_of_a_program_need_a_record():
    h200 = dataclasses.replace(H100, kind="NVIDIA H200")
    assert "not verified on NVIDIA H200" in why_not(record(), gpus=[H100, h200])
    both = record(), record(device_kind="NVIDIA H200")
    assert why_not(*both, gpus=[H100, h200]) is None


def test_the_setting_replaces_records():
    assert why_not(option="always") is None
    assert why_not(record(), option="never").startswith("off: ")
    for option in ("always", "verified"):
        reason = why_not(record(), option=option, gpus=[V100])
        assert reason == (
            "mosaic_gpu needs compute capability 7.5, 8.0, ... 12.0; this one's is 7.0"
        )


def test_a_driver_may_be_too_old():
    def why_not_with(supported, built_with):
        gpu = dataclasses.replace(H100, driver=(supported, built_with))
        return why_not(record(), gpus=[gpu])

    assert why_not_with(12020, 13000) == (
        "mosaic_gpu assembles kernels with CUDA 13.0; this driver supports CUDA up to "
        "12.2: update it"
    )
    # A driver runs what is compiled with a newer release of its major version.
    assert why_not_with(13000, 13020) is None
    assert why_not_with(13010, 12080) is None


def test_the_driver_of_a_gpu(monkeypatch):
    versions = types.SimpleNamespace(
        cuda_driver_get_version=lambda: 12020,
        cuda_runtime_build_version=lambda: 13000,
    )
    client = types.SimpleNamespace(platform_version=H100.cuda)
    device = types.SimpleNamespace(platform="gpu", device_kind=H100.kind, client=client)

    def driver_with(versions, device=device):
        monkeypatch.setattr(_architecture.jax_lib, "cuda_versions", versions)
        return _architecture.describe(device).driver

    assert driver_with(versions) == (12020, 13000)
    # Nothing is known of the driver where the plugin, the driver or the GPU is absent.
    assert driver_with(None) is None
    absent = jax.sharding.AbstractDevice(H100.kind, 132, "cuda")
    assert driver_with(versions, absent) is None
    versions.cuda_driver_get_version = lambda: 0
    assert driver_with(versions) is None


def test_what_other_gpus_than_hopper_need(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    assert why_not(option="always", gpus=[A100]) is None
    assert "not verified on NVIDIA A100" in why_not(record(), gpus=[A100])
    # The kernels of one are not those of the other.
    reason = why_not(option="always", gpus=[A100, H100])
    assert reason == (
        "mosaic_gpu needs GPUs of one compute capability; here are "
        "NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3"
    )
    int8 = _selection.Kernel("matmul_int8", "matmul")
    assert _selection.why_not(int8, [H100], "always", ()) is None
    reason = _selection.why_not(int8, [A100], "always", ())
    assert reason == "mosaic_gpu needs compute capability 9.0; this one's is 8.0"
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert why_not(option="always") is None
    reason = why_not(option="always", gpus=[A100])
    assert reason == (
        "mosaic_gpu needs jax 0.11.1 or newer for a GPU of compute capability 8.0; "
        f"this is jax {jax.__version__}"
    )


def test_several_processes_use_shipped_records_only(monkeypatch):
    """Hosts have different files, but must compile the same program."""
    monkeypatch.setattr(_records, "of_user", lambda: (record(),))
    monkeypatch.setattr(_records, "shipped", lambda: ())
    assert _selection.records() == (record(),)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert _selection.records() == ()


def test_the_setting_is_part_of_the_key_of_jits_cache():
    seen = []

    @jax.jit
    def traced(x):
        seen.append(config.mosaic_gpu)
        return x

    for setting in ("always", "never", "always"):
        with config.override(mosaic_gpu=setting):
            traced(jnp.ones(3))
    assert seen == ["always", "never"]


def test_an_override_is_of_its_thread():
    found = []
    with config.override(mosaic_gpu="never"):
        thread = threading.Thread(target=lambda: found.append(config.mosaic_gpu))
        thread.start()
        thread.join()
        assert config.mosaic_gpu == "never"
    assert found == ["verified"]


def test_a_setting_that_does_not_exist(monkeypatch):
    message = r"mosaic_gpu must be one of \('verified', .*'never'\); got 'yes'"
    with pytest.raises(ValueError, match=message):
        config.mosaic_gpu = "yes"
    with pytest.raises(ValueError, match=message), config.override(mosaic_gpu="yes"):
        pass
    with pytest.raises(ValueError, match=r"cpu must be one of \('always', 'never'\)"):
        config.cpu = "verified"


@pytest.mark.parametrize(
    ("name", "variable", "printed"),
    [
        ("mosaic_gpu", "", "verified always"),
        ("mosaic_gpu", "1", "always always"),
        ("mosaic_gpu", "0", "never always"),
        ("mosaic_gpu", "yes", "JAXBNB_MOSAIC_GPU must be 0, 1 or unset; got 'yes'"),
        ("cpu", "", "always always"),
        ("cpu", "1", "always always"),
        ("cpu", "0", "never always"),
        ("cpu", "yes", "JAXBNB_CPU must be 0, 1 or unset; got 'yes'"),
    ],
)
def test_the_environment_gives_the_initial_value(name, variable, printed):
    """It is read when the setting is first used, not when it is imported."""
    code = """
import os, sys
name = sys.argv[1]
variable = os.environ.pop(f"JAXBNB_{name.upper()}")
import jaxbnb_kernels
from jaxbnb_kernels import update_8bit
os.environ[f"JAXBNB_{name.upper()}"] = variable
try:
    before = getattr(jaxbnb_kernels.config, name)
except ValueError as error:
    sys.exit(str(error))
setattr(jaxbnb_kernels.config, name, "always")
sys.exit(f"{before} {getattr(jaxbnb_kernels.config, name)}")
"""
    process = subprocess.run(
        [sys.executable, "-c", code, name],
        env=os.environ | {f"JAXBNB_{name.upper()}": variable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr.strip() == printed


def test_pallas_is_imported_only_where_a_kernel_is_lowered():
    code = """
import sys
import jax, jax.numpy as jnp
from jaxbnb_kernels import embed_blockwise, matmul_int8, quantize_blockwise, update_8bit
from jaxbnb_kernels.codebooks import NF4
jax.jit(lambda x: quantize_blockwise.quantize_blockwise(x, NF4, block_size=64))(
    jnp.ones(64)
)
sys.exit(any(m.startswith("jax.experimental.pallas") for m in sys.modules))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_more_blocks_than_a_kernel_can_number():
    """JAX holds such shapes without their numbers."""
    levels = codebooks.NF4
    most, size = _tiles.MOST_BLOCKS, 64

    def decode(blocks, implementation=None):
        codes = jax.ShapeDtypeStruct((blocks, size // 2), jnp.uint8)
        absmax = jax.ShapeDtypeStruct((blocks, 1), jnp.float32)
        options = {"block_size": size, "size": size, "implementation": implementation}
        fn = functools.partial(dequantize_blockwise, codebook=levels, **options)
        return jax.eval_shape(lambda c, a: fn(c, a), codes, absmax)

    assert decode(most, "mosaic_gpu").shape == (most, size)
    message = "numbers up to 2,147,418,112 blocks; these are 2,147,418,113"
    with pytest.raises(NotImplementedError, match=message):
        decode(most + 1, "mosaic_gpu")
    # XLA's code takes any number.
    assert decode(most + 1).shape == (most + 1, size)
