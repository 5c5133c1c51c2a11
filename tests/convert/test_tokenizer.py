import dataclasses
import json

import numpy as np
import pytest

from jaxbnb import convert
from jaxbnb.convert import CheckpointError, Tokenizer, UnsupportedCheckpointError

tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% if loop.index == 3 %}{% break %}{% endif %}\n"
    "{% endfor %}{{ {'é': [1, messages | length]} | tojson }}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "<b>Où?</b>"},
    {"role": "assistant", "content": "Là."},
    {"role": "user", "content": "Merci"},
]


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer without merges: a token a byte, and two special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path / "tokenizer_config.json",
        bos_token={"__type": "AddedToken", "content": "<s>"},
        eos_token="</s>",
        chat_template=CHATML,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return tmp_path


def write(path, **fields):
    path.write_text(json.dumps(fields))


def test_text_there_and_back(folder):
    tokenizer = convert.load_tokenizer(folder)
    ids = tokenizer.encode("naïve 日本")
    assert ids[0] == 0
    assert len(ids) == 1 + len("naïve 日本".encode())
    assert tokenizer.decode([*ids, 1]) == "naïve 日本"
    assert tokenizer.stop_token_ids == (1,)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_one_text_at_a_time(folder):
    tokenizer = convert.load_tokenizer(folder)
    with pytest.raises(TypeError, match=r"one text at a time, a str; got list"):
        tokenizer.encode(["a", "b"])
    for batch in (np.ones((2, 3), int), [[1], [2]]):
        with pytest.raises(TypeError, match=r"one row; got rows, the first of shape"):
            tokenizer.decode(batch)
    assert tokenizer.decode(np.array(tokenizer.encode("ab"))) == "ab"


def test_a_short_repr(folder):
    tokenizer = convert.load_tokenizer(folder)
    want = "Tokenizer(258 tokens, stop_token_ids=(1,), a chat template)"
    assert repr(tokenizer) == want
    several = dataclasses.replace(tokenizer, chat_template={"b": "x", "a": "y"})
    assert repr(several) == want.replace("a chat template", "chat templates ['a', 'b']")


def test_a_stream_yields_whole_characters(folder):
    tokenizer = convert.load_tokenizer(folder)
    text = "naïve 日本 🙂."
    assert list(tokenizer.decode_stream(tokenizer.encode(text))) == list(text)
    # What never becomes a character is there in the end, as it is in decode.
    cut = tokenizer.encode("a日")[:-1]
    assert list(tokenizer.decode_stream(cut)) == ["a", "\ufffd"]
    assert list(tokenizer.decode_stream([])) == []


def test_a_stream_keeps_the_spaces_between_words():
    # As of SentencePiece: a space is part of a word, and not shown before the first.
    words = ["▁the", "▁sea", "s", "▁rise"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "s")
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    stream = Tokenizer(tokenizer, (), None, {}).decode_stream(range(4))
    assert list(stream) == ["the", " sea", "s", " rise"]


def test_a_chat_follows_its_template(folder):
    tokenizer = convert.load_tokenizer(folder)
    ids = tokenizer.encode_chat(MESSAGES)
    want = (
        "<s><|system|>Be brief.</s>\n<|user|><b>Où?</b></s>\n<|assistant|>Là.</s>\n"
        '{"é": [1, 4]}\n<|assistant|>'
    )
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == want


@pytest.mark.peers
def test_a_chat_is_that_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    want = theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert convert.load_tokenizer(folder).encode_chat(MESSAGES) == want


def test_templates_have_three_homes(folder):
    config = folder / "tokenizer_config.json"
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    write(config, chat_template=named)
    assert convert.load_tokenizer(folder).chat_template == {"tool": "x", "default": "y"}
    (folder / "chat_template.jinja").write_text("z")
    assert convert.load_tokenizer(folder).chat_template == "z"


def test_stops_of_the_generation_config_come_first(folder):
    write(folder / "config.json", eos_token_id=7)
    assert convert.load_tokenizer(folder).stop_token_ids == (7,)
    write(folder / "generation_config.json", eos_token_id=[8, 9])
    assert convert.load_tokenizer(folder).stop_token_ids == (8, 9)
    write(folder / "generation_config.json", eos_token_id="x")
    with pytest.raises(CheckpointError, match="a token or a list of them"):
        convert.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, "refuses the messages: no tools"),
        ("{% if %}", "syntax error in line 1, .*: Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ 1 // 0 }}", "division"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_cannot_be_used(folder, template, message):
    write(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = convert.load_tokenizer(folder)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_chat([{"role": "tool", "content": "1"}])


def test_files_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert.load_tokenizer(tmp_path / "nowhere")
    write(folder / "tokenizer_config.json", chat_template=5)
    with pytest.raises(CheckpointError, match=r"must be a string, or a list .* got 5"):
        convert.load_tokenizer(folder)
    with pytest.raises(CheckpointError, match=f"give its folder: {folder}$"):
        convert.load_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        convert.load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"has no tokenizer\.json"):
        convert.load_tokenizer(folder)
