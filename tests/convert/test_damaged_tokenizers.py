"""Tokenizers with something wrong in them: our error, before or after the library's."""

import json
import struct
import threading

import numpy as np
import pytest
from charsmaps import charsmap, encode

from jaxbnb import convert
from jaxbnb.convert import CheckpointError
from jaxbnb.convert._tokenizers_library import find_fault

tokenizers = pytest.importorskip("tokenizers")

CHARSMAP = charsmap({"\ufb01": "fi", "\u3000": " ", "é": "e\u0301"})
TABLE = struct.unpack("<I", CHARSMAP[:4])[0]
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def unit(position, value, at=4):
    """The map with another unit at a position."""
    at += 4 * position
    return CHARSMAP[:at] + struct.pack("<I", value) + CHARSMAP[at + 4 :]


def units():
    return np.frombuffer(CHARSMAP, "<u4", TABLE // 4, offset=4)


# The map of characters.


def test_a_sound_map_is_read():
    assert find_fault(encode(CHARSMAP)) is None
    normalizer = tokenizers.normalizers.Precompiled(CHARSMAP)
    assert normalizer.normalize_str("\ufb01n\u3000é") == "fin e\u0301"


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "not base64"),
        ("é", "not base64"),
        ("abc", "not base64"),
        ("", "a table of 0 bytes"),
        (encode(CHARSMAP[: TABLE // 2]), f"a table of {TABLE:,} bytes"),
        (encode(b"\xff" * 2000), "a table of 4,294,967,295 bytes"),
        (encode(struct.pack("<I", 4) + bytes(8)), "a table of 4 bytes"),
        (encode(CHARSMAP[:-2] + b"\xff\0"), "not UTF-8"),
        (encode(unit(0, 2**21 - 1 << 10)), "leads to unit 2,097,151"),
        # Whatever a node or a leaf is told to be, it is found.
        *(
            (encode(unit(place, units()[place] ^ 1 << 30)), "leads to unit")
            for place in np.flatnonzero((units() & 255 > 0) & (units() < 2**31))
        ),
        *(
            (encode(unit(place, 2**31 + len(CHARSMAP))), "has no text at byte")
            for place in np.flatnonzero(units() >= 2**31)
        ),
    ],
)
def test_a_damaged_map_is_found(value, fault):
    assert fault in find_fault(value)


def test_a_text_starts_with_a_character():
    middle = CHARSMAP[4 + TABLE :].index("\u0301".encode()) + 1
    place = np.flatnonzero(units() >= 2**31)[0]
    fault = find_fault(encode(unit(place, 2**31 | middle)))
    assert f"has no text at byte {middle}" in fault


# tokenizer.json.


def words(**fields):
    """A tokenizer of three words."""
    library = tokenizers
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "": 2}, "a"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return json.loads(made.to_str()) | fields


def load(folder, fields):
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return convert.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (
            "padding",
            {
                "strategy": {"Fixed": 2**63},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            },
        ),
        (
            "truncation",
            {
                "direction": "Right",
                "max_length": 2,
                "strategy": "LongestFirst",
                "stride": 5,
            },
        ),
        ("padding", "x"),
        ("truncation", [1]),
    ],
)
def test_how_it_was_saved_to_cut_and_pad_is_nothing(tmp_path, field, value):
    tokenizer = load(tmp_path, words(**{field: value}))
    assert tokenizer.encode("b b b") == [1, 1, 1]


@pytest.mark.parametrize("kind", [{"type": "Precompiled"}, {}])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_damaged_map_is_refused_wherever_it_lies(tmp_path, depth, kind):
    normalizer = kind | {"precompiled_charsmap": encode(b"\xff" * 9)}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the precompiled_ch"):
        load(tmp_path, words(normalizer=normalizer))


def test_a_token_that_would_overflow_the_stack(tmp_path):
    """Of 300,000 characters it ends the process; what is let through must not."""
    vocabulary = [["<unk>", 0.0], ["a" * 1001, -1.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}
    with pytest.raises(CheckpointError, match="a token has 1,001 characters"):
        load(tmp_path, words(model=model))
    # The widest characters, in a thread with little stack.
    vocabulary[1][0] = "🙂" * 1000
    ids = []
    size = threading.stack_size(2**18)
    try:
        thread = threading.Thread(
            target=lambda: ids.extend(load(tmp_path, words(model=model)).encode("🙂"))
        )
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert ids == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 5}, "is not a tokenizer"),
        ({"model": None}, "is not a tokenizer"),
        ({"added_tokens": [{"id": -1}]}, "is not a tokenizer"),
        ({"normalizer": {"type": "Precompiled"}}, "the precompiled_charsmap"),
        # The library panics: of a prefix that no token is as long as.
        (
            {
                "model": {
                    "type": "BPE",
                    "vocab": {"a": 0, "b": 1, "ab": 2},
                    "merges": [["a", "b"]],
                    "continuing_subword_prefix": "####",
                }
            },
            "is not a tokenizer: range",
        ),
    ],
)
def test_what_the_library_refuses(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, words(**fields))


def test_what_shows_only_in_use(tmp_path):
    special = [{"SpecialToken": {"id": "b", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": [*special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": special,
        "special_tokens": {},
    }
    tokenizer = load(tmp_path, words(post_processor=template))
    with pytest.raises(
        CheckpointError, match="cannot encode, because its file is damaged"
    ):
        tokenizer.encode("a")
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    tokenizer = load(tmp_path, words(decoder=strip))
    assert tokenizer.encode("b") == [1]
    with pytest.raises(
        CheckpointError, match="cannot decode, because its file is damaged"
    ):
        tokenizer.decode([2])


def test_mistakes_of_the_caller_stay_theirs(tmp_path):
    tokenizer = load(tmp_path, words())
    with pytest.raises(TypeError):
        tokenizer.encode(5)
    with pytest.raises(OverflowError):
        tokenizer.decode([-1])


# GGUF.


def gguf(tmp_path, build, kind="gpt2", **changes):
    """A tokenizer of a few tokens; a change that is None takes a field away."""
    fields = {
        "model": (STRING, kind),
        "tokens": (ARRAY, (STRING, ["a", "b", "ab", "<end>", "<turn>", "<call>"])),
        "token_type": (ARRAY, (INT32, [1, 1, 1, 3, 3, 3])),
        "merges": (ARRAY, (STRING, ["a b"])),
        "scores": (ARRAY, (FLOAT32, [-1.0, -2.0, -3.0, 0.0, 0.0, 0.0])),
        "eos_token_id": (UINT32, 3),
    }
    fields = {
        key if "." in key else f"tokenizer.ggml.{key}": value
        for key, value in (fields | changes).items()
    }
    path = tmp_path / "x.gguf"
    path.write_bytes(build.gguf(build.metadata(**fields), build.tensors()))
    return path


INTS = (ARRAY, (INT32, [1, 2, 3, 4, 5, 6]))
STRINGS = (ARRAY, (STRING, ["a b", "c", "d", "e", "f", "g"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": INTS},
        {"model": STRINGS},
        {"pre": INTS},
        {"pre": STRINGS},
        {"tokens": INTS},
        {"tokens": (STRING, "abcdef")},
        {"token_type": STRINGS},
        {"token_type": (STRING, "abcdef")},
        {"token_type": (UINT32, 1)},
        {"merges": INTS},
        {"merges": (STRING, "a b")},
        {"kind": "llama", "scores": STRINGS},
        {"kind": "llama", "scores": (FLOAT32, 1.0)},
        {"eos_token_id": INTS},
        {"eos_token_id": STRINGS},
        {"eot_token_id": (INT32, -1)},
        {"eom_token_id": (UINT32, 6)},
        {"bos_token_id": (BOOL, True)},
    ],
)
def test_metadata_of_another_type(tmp_path, build, changes):
    path = gguf(tmp_path, build, **changes)
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        convert.load_tokenizer(path)


def test_a_token_that_a_template_takes_for_a_piece(tmp_path, build):
    """The library reads "$A" as the text, so no such token can be put around it."""
    tokens = (ARRAY, (STRING, ["$B:x", "b", "ab", "<end>", "<turn>", "<call>"]))
    none = (ARRAY, (STRING, []))
    bos = {"bos_token_id": (UINT32, 0), "add_bos_token": (BOOL, True)}
    path = gguf(tmp_path, build, tokens=tokens, merges=none, **bos)
    with pytest.raises(CheckpointError, match=r"cannot put .* around"):
        convert.load_tokenizer(path)


def test_all_stop_tokens_and_templates_of_a_gguf(tmp_path, build):
    changes = {
        "eot_token_id": (UINT32, 4),
        "eom_token_id": (UINT32, 5),
        "seperator_token_id": (UINT32, 1),
        "tokenizer.chat_template": (STRING, "{{ eos_token }}"),
        "tokenizer.chat_templates": (ARRAY, (STRING, ["tool_use", "rag"])),
        "tokenizer.chat_template.tool_use": (STRING, "{{ tools[0] }}"),
        "general.architecture": (STRING, "llama"),
    }
    path = gguf(tmp_path, build, **changes)
    tokenizer = convert.load_tokenizer(path)
    assert tokenizer.stop_token_ids == (3, 4, 5)
    templates = {"default": "{{ eos_token }}", "tool_use": "{{ tools[0] }}"}
    assert tokenizer.chat_template == templates
    assert convert.gguf_tokenizer(path)[1] == "{{ eos_token }}"
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.encode_chat(messages) == [3]
    assert tokenizer.encode_chat(messages, tools=["ab"]) == [2]
    # A folder that is made of it is the same tokenizer.
    convert.convert_checkpoint(path, tmp_path / "out")
    folder = convert.load_tokenizer(tmp_path / "out")
    assert folder.stop_token_ids == (3, 4, 5)
    assert folder.chat_template == templates
    assert folder.special_tokens == tokenizer.special_tokens
    assert folder.special_tokens["sep_token"] == "b"
