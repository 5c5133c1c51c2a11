"""The benchmark of the kernels, tried with what runs on any machine."""

import math
import time
import types

import jax
import jax.numpy as jnp
import pytest

from jaxbnb import cli
from jaxbnb.benchmarks import _kernels

TINY = _kernels.Sizes(
    matrices={"tiny": (128, 64)},
    tokens=(1, 64),
    parameters=(64, 256),
    cold_bytes=2**15,
)


def host_seconds(functions, sets):
    """A timer that needs no GPU."""
    seconds = {}
    for name, function in functions.items():
        start = time.perf_counter()
        jax.block_until_ready([jax.jit(function)(*args) for args in sets])
        seconds[name] = (time.perf_counter() - start) / len(sets)
    return seconds


@pytest.fixture(scope="module")
def figures():
    with jax.numpy_dtype_promotion("standard"):
        return list(_kernels.measure(TINY, host_seconds, "reference"))


def test_a_gpu_without_some_kernels_is_measured_without_them(monkeypatch):
    names = {"platform": "gpu", "device_kind": "NVIDIA L4"}
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**names)])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    served = _kernels.served_here({"update_8bit": max, "matmul_int8": max})
    assert served == {"update_8bit": max}


def test_every_kernel_is_measured(figures):
    assert [figure.name for figure in figures] == [
        "device copy",
        "NF4 quantise, tiny",
        "NF4 dequantise, tiny",
        "NF4 x W, 1 rows, tiny",
        "LLM.int8 x W, 1 rows, tiny",
        "NF4 x W, 64 rows, tiny",
        "NF4 dy W.T, 64 rows, tiny",
        "LLM.int8 x W, 64 rows, tiny",
        "AdamW in 8 bits, bfloat16, 0 M parameters",
    ]
    assert all(figure.value > 0 for figure in figures)
    assert not any("WRONG" in figure.unit for figure in figures)


def test_a_figure_names_what_was_fastest(figures):
    for figure in figures[1:]:
        seconds = figure.data["seconds"]
        assert figure.data["fastest"] == min(seconds, key=seconds.get)
        assert figure.detail.endswith(f"fastest: {figure.data['fastest']}")
    assert set(figures[3].data["seconds"]) == {"reference", "xla", "dense"}
    assert set(figures[-1].data["seconds"]) == {"reference", "xla", "optax"}


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


def test_the_worst_of_the_checks_is_shown():
    errors = {"a": 0.0, "b": 0.5, "c": 0.25}
    checks = {
        "right": lambda implementation: iter(errors.items()),
        "wrong": lambda implementation: iter([*errors.items(), ("d", math.nan)]),
    }
    right, wrong = _kernels.check(checks, "xla")
    assert (right.name, right.value, right.detail) == ("right, errors", 0.5, "b")
    assert math.isnan(wrong.value)
    assert wrong.detail == "d"


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
    with jax.numpy_dtype_promotion("standard"):
        figures = list(_kernels.measure(TINY, host_seconds, "reference"))
    is_wrong = {f.name: "WRONG" in f.unit and f.value > f.limit for f in figures}
    # All but the copy.
    assert list(is_wrong.values()) == [False] + 8 * [True], is_wrong


def test_without_such_a_gpu_it_says_so(capsys):
    assert cli.main(["bench", "kernels"]) == 0
    assert "skipped: mosaic_gpu needs compute capability" in capsys.readouterr().out
