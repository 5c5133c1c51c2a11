"""The demo's arguments: errors come before minutes of work, not after."""

import importlib.util
import sys
from pathlib import Path

import pytest

import jaxbnb

PATH = Path(__file__).parents[2] / "examples" / "qlora_smollm2.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("qlora_smollm2", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("steps", [1, 2, 9, 24, 100])
def test_any_number_of_steps_has_a_schedule(demo, steps):
    schedule = demo.learning_rate(steps)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    # A single step has the peak rate; of several, the first has zero.
    assert rates[0] == pytest.approx(demo.LEARNING_RATE if steps == 1 else 0)
    assert max(rates) == pytest.approx(demo.LEARNING_RATE)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


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
