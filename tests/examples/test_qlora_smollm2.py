"""The demo's arguments: errors come before minutes of work, not after."""

import importlib
import sys

import pytest

import jaxbnb


@pytest.fixture
def demo():
    # Its folder is on the path: conftest.py.
    return importlib.import_module("qlora_smollm2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--windows", "0"], "must be at least 1, got 0"),
        (["--rank", "-1"], "must be at least 1, got -1"),
        (["--quant-type", "nf5"], "invalid choice: 'nf5'"),
    ],
)
def test_wrong_arguments(demo, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit, match="2"):
        demo.parse_args()
    assert message in capsys.readouterr().err


def test_every_format_is_one(demo):
    for quant_type in demo.QUANT_TYPES:
        config = jaxbnb.QuantConfig(quant_type, double_quant=True)
        assert config.quant_type == quant_type
