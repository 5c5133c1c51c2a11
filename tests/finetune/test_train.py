"""train: files to files, the same whether or not it was interrupted; bad inputs."""

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb import convert
from jaxbnb.finetune import (
    ConfigError,
    DataError,
    RunCheckpointError,
    TrainConfig,
    read_config,
    train,
)
from jaxbnb.finetune._loop import Loop
from jaxbnb.finetune._optimizer import make_schedule
from tests.finetune import toy

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b)}
    for a in range(6)
    for b in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes, as a Hugging Face folder, and its data."""
    folder = tmp_path_factory.mktemp("model")
    toy.write_folder(folder)
    for name, rows in (("train", ROWS[:20]), ("held_out", ROWS[20:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "copy.json").write_text(json.dumps(ROWS[:20]))
    (folder / "larger").mkdir()
    larger = convert.add_tokens(convert.load_tokenizer(folder), ["<a>", "<b>", "+1"])
    convert.save_tokenizer(larger, folder / "larger")
    return folder


@pytest.fixture
def make_config(folder, tmp_path):
    def make_config(**changes):
        fields = {
            "model": str(folder),
            "data": str(folder / "train.jsonl"),
            "out": str(tmp_path / "run"),
            "steps": 6,
            "accumulate": 2,
            "quant": "int8",
        }
        return TrainConfig(**{**toy.RUN, **fields, **changes})

    return make_config


def read_steps(config):
    return [line for line in toy.read_lines(config) if "loss" in line]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupts."""
    config = TrainConfig(
        model=str(folder),
        data=str(folder / "train.jsonl"),
        eval=str(folder / "held_out.jsonl"),
        out=str(tmp_path_factory.mktemp("whole") / "run"),
        steps=6,
        batch=1,
        accumulate=4,
        seq=32,
        quant="int8",
        dtype="float32",
        rank=4,
        dropout=0.1,
        save_every=2,
        lr=1e-2,
        neftune_alpha=1.0,
        report_to=(),
    )
    return config, train(config)


def test_a_run_from_files_to_files(whole, folder):
    config, result = whole
    steps = read_steps(config)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] == result.loss < steps[0]["loss"]
    assert result.is_complete
    assert result.steps == 6
    losses = [x["eval_loss"] for x in toy.read_lines(config) if "eval_loss" in x]
    assert len(losses) == 4  # Before the first step, and after steps 2, 4 and 6.
    assert min(losses) == result.best_eval_loss
    # The adapter is that of the last step, and its model gives the held-out loss.
    model = jaxbnb.load_pretrained(folder, quant=config.quant_config())
    jaxbnb.lora.load_adapter(model, f"{config.out}/adapter")
    tokenizer = jaxbnb.convert.load_tokenizer(folder)
    encoder = jaxbnb.finetune.Encoder(tokenizer)
    total = count = 0
    for row in ROWS[20:]:
        tokens, mask = encoder.encode(row)[:2]
        loss = jaxbnb.finetune.next_token_loss(
            model, jnp.asarray(tokens)[None], mask=jnp.asarray(mask)[None]
        )
        total, count = total + float(loss) * mask[1:].sum(), count + mask[1:].sum()
    np.testing.assert_allclose(total / count, losses[-1], rtol=1e-4)
    page = (Path(config.out) / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "5+0=" in page  # A prompt of the held-out rows.
    assert "src=" not in page
    assert read_config(f"{config.out}/config.yaml") == {
        **config.to_dict(),
        "resume": False,
    }
    assert TrainConfig.from_dict(read_config(f"{config.out}/config.yaml")) == config


@pytest.mark.parametrize("step", [1, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(whole, tmp_path, step):
    """With noise, dropout, accumulation and an 8-bit paged state."""
    whole_config, whole_result = whole
    config = dataclasses.replace(whole_config, out=str(tmp_path / "run"))
    with pytest.raises(toy.StopError):
        train(config, loggers=[toy.StopAfter(step)])
    with pytest.raises(FileExistsError, match="resume"):
        train(config)
    result = train(dataclasses.replace(config, resume=True))
    want, got = read_steps(whole_config), read_steps(config)
    timed = {"seconds", "tokens_per_second", "memory_bytes"}
    for line in (*want, *got):
        for name in timed:
            line.pop(name, None)
    assert got == want
    assert result.loss == whole_result.loss
    name = "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(f"{c.out}/{name}") for c in (config, whole_config))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


SCRIPT = """
import sys
from jaxbnb.finetune import TrainConfig, read_config, train

class Begun:
    def log(self, step, metrics):
        if "loss" in metrics:
            print(step, flush=True)

    def close(self):
        pass

config = TrainConfig.from_dict({**read_config(sys.argv[1]), "resume": True})
train(config, loggers=[Begun()])
"""


KINDS = {
    "adapters": ({"neftune_alpha": 1.0}, "adapter/adapter_model.safetensors"),
    "all parameters in 16 bits": (
        {"full": True, "quant": None, "dtype": "bfloat16", "dropout": 0.0, "lr": 1e-4},
        "model/model.safetensors",
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("changes", "name"), KINDS.values(), ids=KINDS)
def test_a_killed_run_goes_on(make_config, folder, tmp_path, request, changes, name):
    """SIGKILL at random moments, with a checkpoint being written after each step.

    Each third one may come before the first step: while the last checkpoint is read, or
    the remains of one are removed.
    """
    kills = request.config.getoption("--kills") or 2
    config = make_config(
        steps=4 * kills,
        save_every=1,
        eval=str(folder / "held_out.jsonl"),
        eval_every=4 * kills,
        **changes,
    )
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml")]
    generator = random.Random(0)
    checkpoints = tmp_path / "run/checkpoints"
    resumed, interrupted = set(), 0
    for number in range(kills):
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert process.stdout
        if number % 3:
            first = process.stdout.readline()
            assert first, (tmp_path / "stderr").read_text()
            resumed.add(int(first))
            time.sleep(generator.uniform(0, 1))
        else:
            time.sleep(generator.uniform(0, 8))
        process.kill()
        process.communicate()
        interrupted += any(checkpoints.glob("*.orbax-checkpoint-tmp*"))
    subprocess.run(command, check=True, capture_output=True)
    print(f"{kills} kills, {interrupted} in a checkpoint; began at {sorted(resumed)}")
    whole_config = dataclasses.replace(
        config, out=str(tmp_path / "whole"), save_every=4 * kills
    )
    with jax.numpy_dtype_promotion("standard"):  # As in the processes.
        train(whole_config)
    losses = [[line["loss"] for line in read_steps(c)] for c in (config, whole_config)]
    assert losses[0] == losses[1]
    ours, theirs = (Path(c.out, name).read_bytes() for c in (config, whole_config))
    assert ours == theirs


def test_other_prompts_are_answered_before_and_after(make_config):
    """Also by a run that goes on: its model is at first the one before training."""
    config = make_config(prompts=("1+1=",), steps=2, save_every=1)
    before = train(config).samples
    other = dataclasses.replace(config, prompts=("1+1=", "2+2="), resume=True)
    samples = train(other).samples
    assert [prompt for prompt, _, _ in samples] == ["1+1=", "2+2="]
    assert samples[0] == before[0]


def test_another_config_does_not_go_on(whole, folder, tmp_path):
    config = dataclasses.replace(whole[0], resume=True)
    for name, value in (("lr", 1e-3), ("seq", 16), ("rank", 8)):
        with pytest.raises(ConfigError, match=f"another config: {name} is"):
            train(dataclasses.replace(config, **{name: value}))
    # Nothing is left to do, and all files are written again.
    assert train(config).peak_bytes == whole[1].peak_bytes > 0


# Orbax reads all arrays at once, and some fail after it has given up on the first.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
def test_a_damaged_checkpoint_names_the_last_good_one(make_config, tmp_path):
    config = make_config()
    train(config)
    (damaged,) = (tmp_path / "run/checkpoints/6/state").glob("manifest.ocdbt")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(
        RunCheckpointError, match=r"step 6 is damaged: .*last good one is .*/4: remove"
    ):
        train(dataclasses.replace(config, resume=True))
    assert (tmp_path / "run/checkpoints/4/state").exists()


def test_steps_that_are_not_finite(make_config, folder):
    """The rate is so large that the model breaks; the run names the rows."""
    seen = []

    class Seen:
        def log(self, step, metrics):
            seen.append(metrics)

        def close(self):
            seen.append("closed")

    config = make_config(
        lr=1e30, schedule="constant", max_bad_steps=2, max_grad_norm=None, steps=9
    )
    with pytest.raises(
        FloatingPointError, match=r"not finite: 2\. .*train\.jsonl, line \d+"
    ):
        train(config, loggers=[Seen()])
    assert seen[-1] == "closed"
    bad = [metrics for metrics in seen[:-1] if metrics.get("skipped")]
    assert len(bad) == 2
    line = read_steps(config)[-1]
    assert line["skipped"]
    assert line["loss"] is None or math.isfinite(line["loss"])


def test_a_run_without_gain_ends_early(make_config, folder):
    result = train(
        make_config(eval=str(folder / "held_out.jsonl"), lr=1.0, patience=1, steps=50)
    )
    assert result.ended_early
    assert result.steps < 50


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, "adapter/adapter_model.safetensors"),
        ({"full": True, "quant": None, "dropout": 0.0}, "model/model.safetensors"),
    ],
    ids=["adapters", "all parameters"],
)
def test_the_best_is_kept(make_config, folder, tmp_path, monkeypatch, changes, last):
    """It is what a run that ends there writes last."""
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Loop, "evaluate", lambda *_: next(losses))
    config = make_config(
        eval=str(folder / "held_out.jsonl"),
        schedule="constant",
        warmup=0.0,
        steps=4,
        **changes,
    )
    result = train(config)
    assert (result.best_step, result.best_eval_loss, result.eval_loss) == (2, 1.0, 2.0)
    short = dataclasses.replace(config, eval=None, out=str(tmp_path / "short"), steps=2)
    train(short)
    best = load_file(tmp_path / "run/best" / Path(last).name)
    jax.tree.map(np.testing.assert_array_equal, best, load_file(f"{short.out}/{last}"))
    after = load_file(f"{config.out}/{last}")
    assert any((best[name] != after[name]).any() for name in best)


def test_all_parameters(make_config, tmp_path):
    """The written model is another, and loads."""
    config = make_config(quant=None, full=True, dropout=0.0, steps=2, lr=1e-2)
    train(config)
    before, after = (
        jaxbnb.load_pretrained(path) for path in (config.model, tmp_path / "run/model")
    )
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        *(nnx.state(model) for model in (before, after)),
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_all_parameters_in_16_bits_go_on_as_if_nothing_had_happened(
    make_config, tmp_path
):
    """A rate of 1e-5, which rounding to nearest would lose in most parameters."""
    config = make_config(
        quant=None, full=True, dtype="bfloat16", dropout=0.0, lr=1e-5, steps=4
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    with jax.numpy_dtype_promotion("standard"):  # For jax's own attention.
        with pytest.raises(toy.StopError):
            train(config, loggers=[toy.StopAfter(3)])
        train(dataclasses.replace(config, resume=True))
        train(whole)
    assert [x["loss"] for x in read_steps(config)] == [
        x["loss"] for x in read_steps(whole)
    ]
    ours, theirs, other = (
        jax.tree.map(
            np.asarray, nnx.state(jaxbnb.load_pretrained(path, dtype=jnp.bfloat16))
        )
        for path in (f"{config.out}/model", f"{whole.out}/model", config.model)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    moved = [
        np.mean(a != b)
        for a, b in zip(*map(jax.tree.leaves, (ours, other)), strict=True)
    ]
    # Four steps of at most 1e-5, from 0.25: a spacing of 2^-10, so a chance of 4 %.
    assert 0 < max(moved) < 0.5


def test_rows_in_memory_and_an_epoch(make_config):
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS
    ]
    config = make_config(data=None, steps=None, epochs=2, packing=False)
    result = train(config, data=chats)
    # 24 rows in batches of 4.
    assert result.steps == 12


def test_rows_that_are_cut_or_left_out_are_counted(make_config, capsys):
    long = {"prompt": "p", "completion": 40 * "c"}
    config = make_config(data=None, steps=None, epochs=2, on_error="skip")
    with pytest.warns(UserWarning, match="left out, as others|are cut at their end"):
        result = train(config, data=[*ROWS, long, {"words": 1}])
    assert (result.truncated_rows, result.skipped_rows) == (2, 2)
    assert "window: 2; rows left out: 2" in capsys.readouterr().err


WRONG = {
    "a file that is not there": ({"data": "no.jsonl"}, FileNotFoundError, "no.jsonl"),
    "no data": ({"data": None}, ConfigError, "nothing to train on"),
    "a file for a folder": (
        lambda folder: {"out": str(folder / "train.jsonl")},
        FileExistsError,
        "is a file, and a run writes a folder",
    ),
    "a long prompt": (
        {"prompts": (17 * "p",)},
        ConfigError,
        "has 17 tokens; the model takes 1 to 16",
    ),
    "a long window": ({"seq": 65}, ConfigError, "takes at most 64 tokens"),
    "a short window": (
        {"seq": 4, "truncation": "skip"},
        DataError,
        "none of the 20 rows has a target",
    ),
    "eval is data": (
        lambda folder: {"eval": str(folder / "train.jsonl")},
        ConfigError,
        "eval holds training data",
    ),
    "eval is a copy of data": (
        lambda folder: {"eval": str(folder / "copy.json")},
        ConfigError,
        "eval holds training data",
    ),
    "eval is a part of data": (
        lambda folder: {
            "data": [str(folder / f"{name}.jsonl") for name in ("train", "held_out")],
            "eval": str(folder / "held_out.jsonl"),
        },
        ConfigError,
        "eval holds training data",
    ),
    "a token that the model lacks": (
        lambda folder: {"tokenizer": str(folder / "larger")},
        DataError,
        r"train\.jsonl, line \d+: token 260, '\+1', is outside .* 0 to 259; give the",
    ),
    "an optimizer": ({"optimizer": "adamw9bit"}, ConfigError, "perhaps adamw"),
    "two lengths": ({"epochs": 1}, ConfigError, "steps and epochs"),
    "full and quantised": ({"full": True}, ConfigError, "--quant none"),
    "a mesh": ({"mesh": "rows=2"}, ConfigError, "list of axes from data, fsdp, tensor"),
    "another mesh": ({"mesh": "data=3,fsdp"}, ConfigError, "number of devices is 8"),
    "patience": ({"patience": 2}, ConfigError, "give eval"),
    "a rate": ({"lr": "fast"}, ConfigError, "lr must be a number"),
    "a type": ({"batch": 2.5}, ConfigError, "batch must be a whole number"),
    "a range": ({"warmup": 1.0}, ConfigError, "warmup must be at least 0 and below 1"),
}


@pytest.fixture
def unreadable(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("jaxbnb.finetune._train.load_pretrained", refuse)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("package", ["wandb", "matplotlib"])
def test_a_missing_package_is_found_first(make_config, monkeypatch, package):
    """Although the run would need matplotlib only in the end."""
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install"):
        train(make_config(report_to=("wandb",)))


@pytest.mark.usefixtures("unreadable")
def test_a_service_that_refuses_is_found_first(make_config, monkeypatch):
    """The logs that are open already are closed."""
    closed = []

    class Given:
        def log(self, step, metrics):
            pass

        def close(self):
            closed.append("given")

    class Board:
        def __init__(self, *_, **__):
            pass

        def close(self):
            closed.append("tensorboard")

    def refuse(**_):
        raise KeyError("no login")

    for name, package in {
        "tensorboardX": {"SummaryWriter": Board},
        "wandb": {"init": refuse},
    }.items():
        module = ModuleType(name)
        vars(module).update(package)
        monkeypatch.setitem(sys.modules, name, module)
    config = make_config(report_to=("tensorboard", "wandb"))
    with pytest.raises(ConfigError, match="report_to='wandb' cannot be opened: KeyErr"):
        train(config, loggers=[Given()])
    assert closed == ["given", "tensorboard"]


@pytest.mark.usefixtures("unreadable")
def test_a_batch_that_the_mesh_does_not_divide(make_config):
    """The warning comes before the model is loaded."""
    with (
        pytest.warns(UserWarning, match=r"is 3, .* 2 devices, .* 1\. Give a mult"),
        pytest.raises(AssertionError, match="the model was loaded"),
    ):
        train(make_config(batch=3, mesh="data=2,tensor=4"))


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(("changes", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_before_the_model_is_loaded(make_config, folder, changes, kind, message):
    changes = changes(folder) if callable(changes) else changes
    with pytest.raises(kind, match=message):
        train(make_config(**changes))


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 2e-4),
        ({"full": True, "quant": None}, 2e-5),
        ({"full": True, "quant": None, "lr": 2e-4}, 2e-4),
        ({"lr": 2e-5}, 2e-5),
    ],
)
def test_the_rate_depends_on_what_is_trained(changes, lr, tmp_path):
    config = TrainConfig(model="m", data="d", out="o", warmup=0.0, **changes)
    assert config.lr == lr
    assert float(make_schedule(config, 10)(0)) == pytest.approx(lr, rel=1e-6)
    config.save(tmp_path / "config.yaml")
    fields = read_config(tmp_path / "config.yaml")
    assert fields["lr"] == lr
    assert TrainConfig.from_dict(fields) == config
    del fields["lr"]
    assert (TrainConfig.from_dict(fields) == config) == ("lr" not in changes)


def test_config_files(make_config, tmp_path):
    config = make_config(report_to=("wandb",), target_modules=("q_proj", "v_proj"))
    for name in ("config.yaml", "config.json"):
        config.save(tmp_path / name)
        assert TrainConfig.from_dict(read_config(tmp_path / name)) == config
    # YAML reads a number without a dot as text.
    (tmp_path / "a.yaml").write_text("{model: a, data: b, out: c, lr: 2e-4}")
    assert TrainConfig.from_dict(read_config(tmp_path / "a.yaml")).lr == 2e-4
    with pytest.raises(ConfigError, match="no field 'learning_rate'"):
        TrainConfig.from_dict({"learning_rate": 1})
    with pytest.raises(ConfigError, match="needs out"):
        TrainConfig.from_dict({"model": "a"})
    (tmp_path / "b.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold names and values"):
        read_config(tmp_path / "b.yaml")


# What the files of an adapter decide, and a short run says otherwise.
UNSAID = {"rank": 16, "dropout": 0.0}


def test_goes_on_from_an_adapter(whole, make_config, folder):
    before, first = whole
    saved = f"{before.out}/adapter"
    config = make_config(
        adapter=saved,
        **UNSAID,
        dtype="float32",
        eval=str(folder / "held_out.jsonl"),
        steps=2,
        lr=1e-3,
    )
    result = train(config)
    lines = toy.read_lines(config)
    assert lines[0]["eval_loss"] == pytest.approx(first.eval_loss, rel=1e-5)
    assert result.eval_loss < first.eval_loss
    old, new = (
        json.loads(Path(path, "adapter_config.json").read_text())
        for path in (saved, f"{config.out}/adapter")
    )
    assert (new["r"], new["lora_dropout"]) == (4, 0.1)
    assert new["target_modules"] == old["target_modules"]


def test_an_adapter_that_does_not_fit(whole, make_config, tmp_path, monkeypatch):
    saved = f"{whole[0].out}/adapter"
    with pytest.raises(ConfigError, match="decide rank and dora: leave them out"):
        make_config(adapter=saved, dora=True, dropout=0.0)
    with pytest.raises(ConfigError, match="decide rank: leave it out"):
        make_config(adapter=saved, dropout=0.0)
    with pytest.raises(ConfigError, match="leave out one"):
        make_config(**UNSAID, adapter=saved, full=True, quant=None)
    # All of this is found before the weights are read.
    monkeypatch.setattr("jaxbnb.finetune._train.load_pretrained", None)
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        train(make_config(**UNSAID, adapter=str(tmp_path)))
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    description = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**description, "r": 8}))
    with pytest.raises(ConfigError, match="lora_A"):
        train(make_config(**UNSAID, adapter=str(other)))
