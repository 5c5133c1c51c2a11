"""The loggers that a config names: a run that resumes goes on where it was."""

import sys
import types

import pytest

from jaxbnb.finetune import ConfigError, TrainConfig
from jaxbnb.finetune._metrics import make_logger


@pytest.fixture
def calls(monkeypatch):
    """Stands for the three packages, and keeps the arguments of their runs."""
    calls = []
    run = types.SimpleNamespace(
        id="new",
        info=types.SimpleNamespace(run_id="new"),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
        add_scalar=lambda name, value, step: calls.append((step, {name: value})),
        close=lambda: calls.append("finish"),
    )

    def begin(*_, **arguments):
        calls.append(arguments)
        return run

    packages = {
        "wandb": {"init": begin},
        "tensorboardX": {"SummaryWriter": begin},
        "mlflow": {
            "start_run": begin,
            "log_params": lambda params: calls.append(params["lr"]),
            "log_metrics": run.log,
            "end_run": run.finish,
        },
    }
    for name, functions in packages.items():
        package = types.ModuleType(name)
        vars(package).update(functions)
        monkeypatch.setitem(sys.modules, name, package)
    return calls


@pytest.mark.parametrize(
    ("name", "argument", "first", "resumed"),
    [
        ("wandb", "id", None, "new"),
        ("mlflow", "run_id", None, "new"),
        # Steps from the next one on are hidden, because they come again.
        ("tensorboard", "purge_step", 1, 5),
    ],
)
def test_a_resumed_run_is_the_same(tmp_path, calls, name, argument, first, resumed):
    config = TrainConfig(
        model="m", data="d", out=str(tmp_path), lr=0.5, report_to=(name,)
    )
    for last_step, want in ((0, first), (4, resumed)):
        calls.clear()
        logger = make_logger(name, config, last_step)
        logger.log(last_step + 1, {"loss": 2.0})
        logger.close()
        assert calls[0][argument] == want
        # MLflow refuses parameters that change.
        assert (0.5 in calls) == (name == "mlflow" and last_step == 0)
        assert calls[-2:] == [(last_step + 1, {"loss": 2.0}), "finish"]


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainConfig(model="m", data="d", out=str(tmp_path), report_to=("wandb",))
    with pytest.raises(ImportError, match=r"needs wandb: .*\[wandb\]"):
        make_logger("wandb", config, 0)


def test_a_service_that_refuses(tmp_path, calls, monkeypatch):
    def refuse(**_):
        raise KeyError("no login")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    config = TrainConfig(model="m", data="d", out=str(tmp_path), report_to=("wandb",))
    with pytest.raises(ConfigError, match=r"report_to='wandb' cannot .* 'no login'"):
        make_logger("wandb", config, 0)
