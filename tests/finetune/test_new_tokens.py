"""New tokens: in the tokenizer, in the model, trained, saved and found again."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxbnb.cli import main
from jaxbnb.convert import add_tokens, load_tokenizer, save_tokenizer
from jaxbnb.finetune import ConfigError, TrainConfig, train
from tests.finetune import toy

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

# The model has 260 rows, and its tokenizer 258 tokens.
NEW = ("<|sum|>", "<|is|>", "<|end|>")
PROMPT = "<|sum|>1+1<|is|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy.write_folder(folder)
    rows = [
        {"prompt": f"<|sum|>{a}+{b}<|is|>", "completion": f"{a + b}<|end|>"}
        for a in range(4)
        for b in range(4)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    return folder


def make_config(folder, out, **changes):
    fields = {
        "model": str(folder),
        "data": str(folder / "train.jsonl"),
        "out": str(out),
        "steps": 2,
        "batch": 2,
        "accumulate": 1,
        "seq": 32,
        "quant": "int8",
        "dtype": "float32",
        "rank": 4,
        "lr": 1e-2,
        "prompts": (PROMPT,),
        "new_tokens": NEW,
    }
    return TrainConfig(**{**fields, **changes})


def test_a_run(folder, tmp_path, capsys):
    result = train(make_config(folder, tmp_path / "run", trainable_tokens=(65,)))
    adapter = tmp_path / "run/adapter"
    ids = load_tokenizer(adapter).encode(PROMPT)
    assert (ids[0], ids[-1], len(ids)) == (258, 259, 5)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == [65, 258, 259, 260]
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.token_adapter"
    rows, table = (
        tensors[f"{name}.{kind}"]
        for kind in ("trainable_tokens_delta", "base_layer.weight")
    )
    assert table.shape == (261, 32)
    # The last row was added, as the mean of the others. All four have moved: as the
    # head's, they count in every loss.
    np.testing.assert_allclose(table[260], table[:260].mean(0), rtol=0, atol=1e-6)
    assert np.abs(rows - table[[65, 258, 259, 260]]).max(1).min() > 1e-4

    err = capsys.readouterr().err
    assert "new tokens: <|sum|> (258), <|is|> (259), <|end|> (260)\n" in err
    assert "PEFT: model.resize_token_embeddings(261); PeftModel" in err
    # The command that the run has printed.
    (line,) = (x for x in err.splitlines() if x.startswith("  jaxbnb generate"))
    arguments = line.split()[1:-1]
    assert (
        main([*arguments, PROMPT, "--temperature", "0", "--max-new-tokens", "8"]) == 0
    )
    ((_, _, after),) = result.samples
    assert after.startswith(capsys.readouterr().out.rstrip("\n"))


def test_show_example(folder, capsys):
    data = ["--data", str(folder / "train.jsonl"), "--seq", "16"]
    command = ["finetune", str(folder), *data, "--new-tokens", *NEW, "--show-example"]
    assert main(command) == 0
    first = capsys.readouterr().out
    # 7 tokens: three that are new, two numbers, the sign, and the end of the text.
    assert first.count(f"{folder}/train.jsonl, line ") == 2
    assert first.count(": 8 tokens, 3 targets ---") == 2
    assert main([*command, "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- window 3, ") == 2
    assert out.startswith(first.replace("--- ", "--- window 1, ", 1).split("\n---")[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("<|a|>", "<|a|>"), r"'<\|a\|>' occurs twice"),
        (("</s>",), "'</s>' is in the vocabulary already, with the id 257; trainable_"),
        ((" ",), "has no characters"),
    ],
)
def test_wrong_tokens(folder, tmp_path, tokens, message):
    with pytest.raises(ConfigError, match=f"new_tokens: the new token .*{message}"):
        train(make_config(folder, tmp_path / "run", new_tokens=tokens))


def test_a_saved_tokenizer_is_the_same(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    new = add_tokens(tokenizer, NEW)
    assert tokenizer.tokenizer.get_vocab_size() == 258
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}')
    save_tokenizer(new, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.stop_token_ids == tokenizer.stop_token_ids
    assert again.special_tokens == tokenizer.special_tokens
    assert again.chat_template == toy.TEMPLATE
    text = f"<pad>{PROMPT} </s>"
    assert again.encode(text) == new.encode(text)
    # A new token is not special, so that it can be read in an answer.
    assert again.decode(again.encode(text)) == f"{PROMPT} "
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings == {"top_k": 5, "eos_token_id": [257]}
