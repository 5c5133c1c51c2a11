"""`jaxbnb env`: the report, and that its self-test can fail."""

import importlib.metadata

import jax.numpy as jnp
import pytest

import jaxbnb
from jaxbnb import cli
from jaxbnb.cli import _env
from jaxbnb.core import formats
from jaxbnb_kernels import _hopper, _trial


@pytest.fixture
def one_format(monkeypatch):
    """All of them are checked in tests/kernels; here one is enough."""
    name = "dynamic8_unsigned"
    monkeypatch.setattr(formats, "CODEBOOKS", {name: formats.CODEBOOKS[name]})
    return name


def test_report(one_format, capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"  jaxbnb              {importlib.metadata.version('jaxbnb')}" in lines
    assert "  cpu:0               cpu" in lines
    start = lines.index("implementations, the first that can serve a call") + 1
    operations = lines[start : lines.index("", start) - 1]
    assert "  quantize_blockwise  xla, reference" in operations
    # One has no kernel on any device, and needs no reason.
    assert {line.split(maxsplit=1)[1] for line in operations} == {"xla, reference"}
    assert "None" not in out
    capability = "a GPU of compute capability 9.0"
    assert f"  mosaic_gpu          needs {capability}; this is a CPU" in lines
    assert lines[-1] == "all 6 checks ok"
    assert sum(line.endswith("  ok") for line in lines) == 6
    assert sum(line.startswith(f"  {one_format} ") for line in lines) == 5
    assert "FAILED" not in out


def test_on_hopper_the_kernels_are_listed_that_were_found_right(monkeypatch):
    monkeypatch.setattr(_hopper, "SETTING", "")
    monkeypatch.setattr(_hopper, "why_not_on", lambda device: None)
    monkeypatch.setattr(_hopper, "_is_here", lambda device: True)
    verdicts = {"matmul_int8": "wrong numbers"}
    monkeypatch.setattr(_trial, "why_not", lambda op, device: verdicts.get(op))
    rows = dict(_env._implementations())
    assert rows["quantize_blockwise"] == "mosaic_gpu, xla, reference"
    assert rows["matmul_int8"] == "xla, reference; no kernel: wrong numbers"
    # Which has none.
    assert rows["matmul_fp8"] == "xla, reference"
    assert "mosaic_gpu" not in rows
    monkeypatch.setattr(_hopper, "SETTING", "1")
    rows = dict(_env._implementations())
    assert rows["matmul_int8"] == "mosaic_gpu, xla, reference"
    monkeypatch.setattr(_hopper, "SETTING", "0")
    rows = dict(_env._implementations())
    assert rows["quantize_blockwise"] == "xla, reference"
    assert rows["mosaic_gpu"] == "off: JAXBNB_MOSAIC_GPU=0 is set"


def test_switched_on_elsewhere_they_are_not_listed(monkeypatch):
    monkeypatch.setattr(_hopper, "SETTING", "1")
    rows = dict(_env._implementations())
    assert rows["quantize_blockwise"] == "xla, reference"
    assert rows["mosaic_gpu"].endswith("this is a CPU")


@pytest.mark.parametrize("wrong", [0.0, jnp.nan])
def test_a_wrong_product_fails(wrong, one_format, monkeypatch, capsys):
    matmul = jaxbnb.matmul
    monkeypatch.setattr(
        jaxbnb, "matmul", lambda x, q: matmul(x, q) * jnp.bfloat16(wrong)
    )
    # Not the compiled one, which may be the right one already.
    monkeypatch.setattr(_env, "_product", _env._product.__wrapped__)
    assert cli.main(["env"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "4 of 6 checks FAILED"
    assert sum(line.endswith("  FAILED") for line in lines) == 4


def test_llm_int8(monkeypatch, capsys):
    """Its product is not that with the decoded matrix, so its check is another."""
    monkeypatch.setattr(formats, "CODEBOOKS", {"llm_int8": None})
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.endswith("all 2 checks ok\n")
    matmul = jaxbnb.matmul
    # Its outliers treated as all else.
    monkeypatch.setattr(
        jaxbnb,
        "matmul",
        lambda *args, **kwargs: matmul(
            *args, **kwargs, outlier_threshold=None if kwargs else 0
        ),
    )
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 checks FAILED\n")


def test_a_worse_encoder_fails(one_format, monkeypatch, capsys):
    quantize = jaxbnb.quantize

    def worse(x, *args, **kwargs):
        return quantize(x + jnp.asarray(0.01, x.dtype), *args, **kwargs)

    monkeypatch.setattr(jaxbnb, "quantize", worse)
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().out.endswith("1 of 6 checks FAILED\n")


def test_a_wrong_update_fails(one_format, monkeypatch, capsys):
    adamw8bit = jaxbnb.adamw8bit

    def worse(rate, min_quantized_size):
        # Steps longer by a tenth, where the state is quantised.
        rate = rate if min_quantized_size else 1.1 * rate
        return adamw8bit(rate, min_quantized_size=min_quantized_size)

    monkeypatch.setattr(jaxbnb, "adamw8bit", worse)
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().out.endswith("1 of 6 checks FAILED\n")
