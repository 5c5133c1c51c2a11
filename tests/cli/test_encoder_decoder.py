"""Verbs of the command line on an encoder-decoder with a Unigram tokenizer."""

import json
import pathlib
import runpy
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbnb.cli import main
from jaxbnb.models import load_pretrained
from jaxbnb.nnx import QuantLinear

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("orbax.checkpoint")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_encoder_decoder.py")))
# As in T5: padding, the end and unknown pieces come first.
PIECES = ["<pad>", "</s>", "<unk>", *map(chr, range(97, 123)), *map(str, range(10))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("t5"), "encoder_decoder", "flan")


def write(folder, goldens, family):
    about = np.load(GOLDENS / f"{goldens}.npz")[f"{family}_json"].tobytes()
    about = json.loads(about)
    (folder / "config.json").write_text(json.dumps(about["config"]))
    tensors = {
        name: made.seeded_tensor(family, name, shape)
        for name, shape in about["shapes"].items()
    }
    save_file(tensors, folder / "model.safetensors")
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=2)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_verbs(folder, tmp_path, capsys):
    assert main(["inspect", str(folder), "--summary"]) == 0
    assert capsys.readouterr().out.endswith("jaxbnb.load_pretrained loads it\n")
    out = str(tmp_path / "flax")
    assert main(["convert", str(folder), out, "--to", "flax", "--quant", "int8"]) == 0
    assert "mT" not in capsys.readouterr().err
    texts = []
    for path in (str(folder), out):
        command = ["generate", path, "--prompt", "abc", "--max-new-tokens", "6"]
        assert main([*command, "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out.strip())
    # 8 bits leave the likeliest tokens of this model as they are.
    assert texts[0] == texts[1] != ""


def test_verbs_for_decoders_say_so(folder, tmp_path, capsys):
    assert main(["plan", str(folder), "--gpu", "H100"]) == 1
    assert "'t5' is an encoder-decoder" in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_text('{"text": "abc"}\n')
    command = ["finetune", str(folder), "--data", str(tmp_path / "data.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "an encoder-decoder, and a run trains decoders" in capsys.readouterr().err
    command = ["calibrate", str(folder), str(tmp_path / "out")]
    assert main([*command, "--data", str(tmp_path / "data.jsonl")]) == 1
    assert "text alone calibrates decoders" in capsys.readouterr().err
    options = "--method", "mse", "--to", "flax", "--block-size", "32"
    assert main([*command, *options]) == 0
    model = load_pretrained(tmp_path / "out")
    assert type(model.model.decoder.layers.layer.cross_attn.q_proj) is QuantLinear


def test_a_model_of_audio_takes_no_prompt(tmp_path, capsys):
    folder = write(tmp_path, "encoder_decoder", "whisper")
    assert main(["generate", str(folder), "--prompt", "abc"]) == 1
    assert "whisper, which reads audio, not prompts" in capsys.readouterr().err


def test_an_encoder_does_not_write(tmp_path, capsys):
    folder = write(tmp_path, "encoders", "bert")
    assert main(["inspect", str(folder), "--summary"]) == 0
    assert capsys.readouterr().out.endswith("jaxbnb.load_pretrained loads it\n")
    assert main(["generate", str(folder), "--prompt", "abc"]) == 1
    assert "bert, an encoder, which does not write" in capsys.readouterr().err
