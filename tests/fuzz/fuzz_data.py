"""Readers of data to train on."""

import json
import warnings

import tokenizers
from fuzzing import Reader

from jaxbnb import data
from jaxbnb.convert import Tokenizer

ROWS = (
    {"text": "the sea"},
    {"prompt": "the ", "completion": "sea"},
    {
        "messages": [
            {"role": "user", "content": "sea?"},
            {"role": "assistant", "content": "the", "tool_calls": []},
        ],
        "tools": '[{"name": "f"}]',
    },
)


def make_lines(rng, damaged):
    rows = [json.dumps(rng.choice(ROWS)) for _ in range(rng.randrange(1, 5))]
    return {"rows.jsonl": rng.choice(["\n", "\r\n", "\n\n"]).join(rows).encode()}


def make_list(rng, damaged):
    return {"rows.json": json.dumps(rng.choices(ROWS, k=3)).encode()}


def read_rows(folder):
    """Reads in both ways, and encodes what is left with the bad rows left out."""
    (path,) = folder.glob("rows.*")
    try:
        whole = data.load_dataset(path)
    except data.DataError as error:
        if str(path) not in str(error):
            raise AssertionError("it does not name the file") from error
    else:
        assert whole.num_errors == 0
    with warnings.catch_warnings(action="ignore"):
        dataset = data.load_dataset(path, on_error="skip")
    rows = [*dataset]
    assert all(isinstance(row, dict) for row in rows)
    for example in data.Encoder(_tokenizer()).encode_batch(rows):
        if not isinstance(example, data.DataError):
            assert example.tokens.shape == example.is_target.shape


def _tokenizer():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate(["</s>", *sorted(alphabet)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return Tokenizer(made, (0,), template, {"eos_token": "</s>"})


READERS = [
    Reader("JSON lines", make_lines, read_rows),
    Reader("JSON list", make_list, read_rows),
]
