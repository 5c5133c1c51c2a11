import os
import subprocess
import sys

import pytest

from jaxbnb_kernels import _dispatch, _hopper


def cannot(x):
    raise NotImplementedError(f"no {x}")


def double(x):
    return 2 * x


def test_the_first_that_can_runs():
    assert _dispatch.run("op", {"a": cannot, "b": double}, None, 2) == 4
    assert _dispatch.run("op", {"a": double, "b": cannot}, None, 2) == 4


def test_one_that_is_asked_for_is_the_only_one_tried():
    assert _dispatch.run("op", {"a": cannot, "b": double}, "b", 2) == 4
    with pytest.raises(NotImplementedError, match="no 2"):
        _dispatch.run("op", {"a": cannot, "b": double}, "a", 2)


def test_when_none_can_every_reason_is_shown():
    with pytest.raises(ExceptionGroup, match="no implementation of op") as caught:
        _dispatch.run("op", {"a": cannot, "b": cannot}, None, 2)
    assert [str(error) for error in caught.value.exceptions] == ["no 2", "no 2"]


def test_an_unknown_name():
    message = r"op has no implementation 'c'; choose one of \['a', 'b'\], or None"
    with pytest.raises(ValueError, match=message):
        _dispatch.run("op", {"a": cannot, "b": double}, "c", 2)


def test_other_errors_are_not_swallowed():
    def broken(x):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        _dispatch.run("op", {"a": broken, "b": double}, None, 2)


@pytest.mark.parametrize("setting", ["", "1", "0"])
def test_a_gpu_kernel_comes_first_unless_switched_off(setting, monkeypatch):
    def kernel(x, *, required=True):
        return "kernel", required

    monkeypatch.setattr(_hopper, "SETTING", setting)
    implementations = {"mosaic_gpu": kernel, "xla": double}
    by_default = 4 if setting == "0" else ("kernel", False)
    assert _dispatch.run("op", implementations, None, 2) == by_default
    assert _dispatch.run("op", implementations, "mosaic_gpu", 2) == ("kernel", True)


def test_a_setting_that_is_none():
    command = [sys.executable, "-c", "import jaxbnb_kernels._hopper"]
    environment = os.environ | {"JAXBNB_MOSAIC_GPU": "yes"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "JAXBNB_MOSAIC_GPU is 0, 1, or not set; got 'yes'" in process.stderr
