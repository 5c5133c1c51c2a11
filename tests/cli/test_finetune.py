"""jaxbnb finetune: its options, its files, and how it ends."""

import functools
import json
import signal
from pathlib import Path

import pytest

from jaxbnb.cli import _finetune, main
from jaxbnb.cli._arguments import parse
from jaxbnb.finetune import TrainConfig
from tests.finetune import toy

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")


def read_config(text):
    return _finetune._read_config(parse(["finetune", *text.split()]))


def test_the_names_of_options(tmp_path):
    """Scripts have them, so they may not change."""
    config = read_config(
        "MODEL --data FILE --out DIR --eval HELD --steps 7 --batch 1 --accumulate 2 "
        "--seq 64 --lr 1e-4 --rank 8 --quant int8 --optimizer lion8bit --save-every 3 "
        "--eval-every 2 --seed 5 --resume"
    )
    assert config == TrainConfig(
        model="MODEL",
        data="FILE",
        out="DIR",
        eval="HELD",
        steps=7,
        batch=1,
        accumulate=2,
        seq=64,
        lr=1e-4,
        rank=8,
        quant="int8",
        optimizer="lion8bit",
        save_every=3,
        eval_every=2,
        seed=5,
        resume=True,
    )
    config.save(tmp_path / "run.yaml")
    # Arguments win over the file, and --epochs over its steps.
    again = read_config(f"--config {tmp_path / 'run.yaml'} --epochs 2 --rank 4")
    assert (again.steps, again.epochs, again.rank, again.seq) == (None, 2, 4, 64)


def test_the_defaults_are_qlora():
    config = read_config("MODEL --data FILE --out DIR")
    assert (config.quant, config.double_quant, config.dtype) == (
        "nf4",
        True,
        "bfloat16",
    )
    assert (config.rank, config.target_modules) == (16, "all-linear")
    assert (config.optimizer, config.schedule) == ("paged_adamw8bit", "cosine")
    assert (config.warmup, config.max_grad_norm) == (0.03, 1.0)


def test_every_option_of_the_adapters():
    config = read_config(
        "MODEL --data FILE --out DIR --rank 8 --alpha 4 --dropout 0.1 --dora "
        "--target-modules q_proj v_proj --modules-to-save lm_head --bias lora_only "
        "--layers-to-transform 0 1 --trainable-tokens 5 17 --quant none"
    )
    lora = config.lora_config()
    assert config.quant is None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora) == (8, 4, 0.1, 1)
    assert tuple(lora.target_modules) == ("q_proj", "v_proj")
    assert tuple(lora.modules_to_save) == ("lm_head",)
    assert lora.bias == "lora_only"
    assert tuple(lora.layers_to_transform) == (0, 1)
    assert tuple(lora.trainable_token_indices) == (5, 17)


class _Signal:
    """A logger that sends this process a signal after the second step."""

    def __init__(self, number):
        self.number = number

    def log(self, step, metrics):
        if step == 2 and "loss" in metrics:
            signal.raise_signal(self.number)

    def close(self):
        pass


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)]
)
def test_a_signal_and_resume(tmp_path, monkeypatch, capsys, number, status):
    """The run ends with a checkpoint; with --resume, each step is there once."""
    toy.write_folder(tmp_path)
    rows = [{"prompt": f"{a}+{a}=", "completion": str(2 * a)} for a in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    command = [
        *("finetune", str(tmp_path), "--data", str(tmp_path / "a.jsonl"), "--quant"),
        *("int8", "--out", str(out), "--batch", "2", "--accumulate", "1", "--seq"),
        *("32", "--rank", "4", "--steps", "4", "--dtype", "float32", "--prompts"),
    ]
    with monkeypatch.context() as patch:
        interrupted = functools.partial(_finetune.train, loggers=[_Signal(number)])
        patch.setattr(_finetune, "train", interrupted)
        assert main(command) == status
    assert "stopped after step 2 of 4; the same command" in capsys.readouterr().err
    assert main(command) == 1
    assert "Give resume (--resume)" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    err = capsys.readouterr().err
    assert "goes on after step 2" in err
    # In plain lines, as nobody sits at a terminal.
    assert "step 4/4  loss " in err
    assert " tokens/s" in err
    assert "% full" in err
    assert f"jaxbnb generate {tmp_path} --adapter {out}/adapter --quant int8" in err
    assert f'PeftModel.from_pretrained(model, "{out}/adapter")' in err
    lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
