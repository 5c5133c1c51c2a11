"""show_example: what people see."""

import numpy as np
import pytest

from jaxbnb.data import Batches, Encoder, Example, load_dataset, show_example

ROWS = [
    {"prompt": "the answer", "completion": " is yes"},
    {"text": "our fathers"},
]


def test_an_example_and_a_batch(load, capsys):
    tokenizer = load()
    encoder = Encoder(tokenizer)
    show_example(encoder.encode(ROWS[0]), tokenizer)
    example = "the answer⟦ is yes<|im_end|>⟧\n"
    assert (
        capsys.readouterr().out == "--- document 1: 5 tokens, 3 targets ---\n" + example
    )
    batches = Batches(
        load_dataset(ROWS), encoder, batch_size=2, seq_length=12, shuffle=False
    )
    batch = next(batches)
    show_example(batch, tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "--- document 1: 5 tokens, 3 targets ---",
        example.strip(),
        "--- document 2: 3 tokens, 2 targets ---",
        "our⟦ fathers<|im_end|>⟧",
        "--- 4 tokens of padding ---",
        "",
    ]
    show_example(batch, tokenizer, titles=["row 0", "row 1"])
    again = capsys.readouterr().out.splitlines()
    assert again == [
        x.replace("document 1", "row 0").replace("document 2", "row 1") for x in lines
    ]
    show_example(batch, tokenizer, max_rows=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- row 1, document 1: 5 tokens, 3 targets ---"
    assert lines[-2] == "--- row 2, 12 tokens of padding ---"


def test_no_targets_and_no_tokens(load, capsys):
    tokenizer = load()
    show_example(Example(np.zeros(0, np.int32), np.zeros(0, bool)), tokenizer)
    assert capsys.readouterr().out == "--- document 1: 0 tokens, 0 targets ---\n\n"


def test_colours_in_a_terminal(load, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokenizer = load()
    show_example(Encoder(tokenizer).encode(ROWS[0]), tokenizer)
    out = capsys.readouterr().out
    assert "\x1b[1;32m is yes<|im_end|>\x1b[0m" in out
    assert "\x1b[2mthe answer\x1b[0m" in out
    assert "⟦" not in out
