"""Folders as people save them: what jaxbnb finds in each is what transformers finds."""

import json

import pytest

from jaxbnb import convert
from jaxbnb.convert import CheckpointError

tokenizers = pytest.importorskip("tokenizers")

CHAT = "\n".join(
    [
        "{% for message in messages %}",
        "{{ bos_token }}{{ message.role }}: {{ message.content }}",
        "{% if message.thinking %} ({{ message.reasoning_content }}){% endif %}",
        "{% endfor %}",
        "{{ [eos_token, pad_token, image_token, extra_special_tokens] | map('string')",
        "   | join('|') }}",
    ]
)
MESSAGES = [
    {"role": "user", "content": "the <img>", "name": None},
    {"role": "assistant", "content": "<b>é</b>", "reasoning": "hm"},
]
TEXTS = ["", "the sea", "<s>the</s><img><pad>x", " x  <tool>sea </s> the", "the" * 9]


def added(content, **flags):
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        **flags,
    }


# Changes to the files of a folder that has tokenizer.json alone. A dict is merged into
# that, another file is written: bytes as they are, the rest as JSON.
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
FOLDERS = {
    "nothing": {},
    "named": {"tokenizer_config.json": NAMED},
    "objects": {
        "tokenizer_config.json": NAMED
        | {"eos_token": added("</s>", __type="AddedToken", lstrip=True)}
    },
    "truncation": {
        "tokenizer.json": {
            "truncation": {
                "direction": "Right",
                "max_length": 3,
                "strategy": "LongestFirst",
                "stride": 1,
            }
        }
    },
    "padding": {
        "tokenizer.json": {
            "padding": {
                "strategy": {"Fixed": 12},
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            }
        },
        "tokenizer_config.json": NAMED,
    },
    "special_tokens_map": {
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": added("</s>")},
        "tokenizer_config.json": {"chat_template": CHAT},
    },
    "the map comes first": {
        "special_tokens_map.json": {"eos_token": "<pad>", "image_token": "<img>"},
        "tokenizer_config.json": NAMED,
    },
    "added_tokens_decoder hides the map": {
        "special_tokens_map.json": {"eos_token": "<pad>"},
        "tokenizer_config.json": NAMED
        | {
            "added_tokens_decoder": {
                "900": added("<tool>"),
                "20": added("sea", special=True, rstrip=True),
                "1": added("</s>", lstrip=True, special=False),
            }
        },
    },
    "added_tokens.json": {
        "added_tokens.json": {"<tool>": 258, "<pad>": 259},
        "special_tokens_map.json": {
            "pad_token": "<pad>",
            "additional_special_tokens": ["<img>"],
        },
        "tokenizer_config.json": {"chat_template": CHAT},
    },
    "extra list": {
        "tokenizer_config.json": NAMED | {"extra_special_tokens": ["<img>", "<tool>"]}
    },
    "additional list": {
        "tokenizer_config.json": NAMED | {"additional_special_tokens": ["<img>"]}
    },
    "extra of the map": {
        "special_tokens_map.json": {
            "extra_special_tokens": ["<tool>", added("<img>", rstrip=True)]
        },
        "tokenizer_config.json": NAMED | {"extra_special_tokens": ["<tool>"]},
    },
    "extra object": {
        "tokenizer_config.json": NAMED
        | {"extra_special_tokens": {"image_token": "<img>", "video_token": "<vid>"}}
    },
    "extra object of the map": {
        "special_tokens_map.json": {"extra_special_tokens": {"image_token": "<img>"}},
        "tokenizer_config.json": NAMED,
    },
    "a token of its own": {
        "tokenizer_config.json": NAMED
        | {"image_token": "<img>", "add_prefix_token": True, "pad_token": "<pad>"}
    },
    "add_bos_token": {
        "tokenizer_config.json": NAMED | {"add_bos_token": False, "add_eos_token": True}
    },
    "no post-processor": {
        "tokenizer.json": {"post_processor": None},
        "tokenizer_config.json": NAMED | {"add_bos_token": True},
    },
    "special tokens are split": {
        "tokenizer_config.json": NAMED | {"split_special_tokens": True}
    },
    "a template's file": {
        "tokenizer_config.json": NAMED,
        "chat_template.jinja": b"{{ bos_token }}\r\nthe\n",
    },
    "templates in a list": {
        "tokenizer_config.json": NAMED
        | {
            "chat_template": [
                {"name": "rag", "template": "x"},
                {"name": "tool_use", "template": "{{ tools }} {{ messages[0].role }}"},
                {"name": "default", "template": CHAT},
            ]
        }
    },
    "templates in files": {
        "tokenizer_config.json": NAMED,
        "chat_template.jinja": b"the {{ eos_token }}",
        "additional_chat_templates/tool_use.jinja": b"sea {{ tools[0].name }}",
    },
    "no default template": {
        "tokenizer_config.json": NAMED,
        "additional_chat_templates/tool_use.jinja": b"sea {{ tools[0].name }}",
    },
}
TOOLS = [{"name": "sea"}]


@pytest.fixture(scope="module")
def plain():
    """A byte-level tokenizer with special tokens from its vocabulary."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet, "th", "the"])}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return json.loads(made.to_str())


def write_folder(folder, plain, files):
    """Writes the files of a row of the table."""
    files = {"tokenizer.json": {}} | files
    for name, contents in files.items():
        if name == "tokenizer.json":
            contents = plain | contents
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        data = contents if type(contents) is bytes else json.dumps(contents).encode()
        path.write_bytes(data)
    return folder


@pytest.mark.peers
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_means_what_it_means_to_transformers(tmp_path, plain, name):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path, plain, FOLDERS[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = convert.load_tokenizer(folder)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.tokenizer.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens == theirs.special_tokens_map
    eos = () if theirs.eos_token is None else (theirs.eos_token_id,)
    assert ours.stop_token_ids == eos
    assert ours.chat_template == theirs.chat_template
    for tools in (None, TOOLS):
        try:
            want = theirs.apply_chat_template(
                MESSAGES, tools=tools, add_generation_prompt=True, return_dict=False
            )
        except ValueError:
            with pytest.raises(ValueError, match="chat template"):
                ours.encode_chat(MESSAGES, tools=tools)
        else:
            assert ours.encode_chat(MESSAGES, tools=tools) == want


def test_special_tokens_of_the_map_alone(tmp_path, plain):
    """What the table says, where transformers is not installed."""
    files = FOLDERS["special_tokens_map"]
    tokenizer = convert.load_tokenizer(write_folder(tmp_path, plain, files))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.stop_token_ids == (1,)
    assert tokenizer.encode("the</s>") == [0, tokenizer.tokenizer.token_to_id("the"), 1]
    assert tokenizer.decode([0, 1]) == ""


@pytest.mark.parametrize("name", ["truncation", "padding"])
def test_no_text_is_cut_or_padded(tmp_path, plain, name):
    tokenizer = convert.load_tokenizer(write_folder(tmp_path, plain, FOLDERS[name]))
    assert len(tokenizer.encode("the")) == 2
    assert len(tokenizer.encode("x" * 50)) == 51


# Stop tokens.

STOPS = {
    "the generation config": ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
    "the config": (None, {"eos_token_id": 9}, (9,)),
    "an empty list": ({"eos_token_id": []}, None, (1,)),
    "empty lists": ({"eos_token_id": []}, {"eos_token_id": []}, (1,)),
    "none": ({"eos_token_id": None}, {"eos_token_id": None}, (1,)),
    "less than 0": ({"eos_token_id": -1}, {"eos_token_id": [-1]}, (1,)),
    "0": (None, {"eos_token_id": 0}, (0,)),
    "a nested config": (None, {"text_config": {"eos_token_id": 5}}, (5,)),
    "the outer one is first": (
        None,
        {"eos_token_id": 4, "text_config": {"eos_token_id": 5}},
        (4,),
    ),
    "two nested ones": (
        None,
        {"text_config": {"eos_token_id": 5}, "decoder": {"eos_token_id": [6, 7]}},
        (6, 7),
    ),
    "no config": (None, None, (1,)),
}


def stops_folder(folder, plain, generation, config):
    files = {"tokenizer_config.json": {"eos_token": "</s>"}}
    if generation is not None:
        files["generation_config.json"] = generation
    if config is not None:
        files["config.json"] = {"model_type": "llama", **config}
    return write_folder(folder, plain, files)


@pytest.mark.parametrize("name", STOPS)
def test_where_the_stop_tokens_come_from(tmp_path, plain, name):
    generation, config, want = STOPS[name]
    folder = stops_folder(tmp_path, plain, generation, config)
    assert convert.load_tokenizer(folder).stop_token_ids == want


@pytest.mark.peers
@pytest.mark.parametrize("name", STOPS)
def test_the_stop_tokens_are_those_of_transformers(tmp_path, plain, name):
    """Where theirs are any: `generate` doesn't stop where they are none."""
    transformers = pytest.importorskip("transformers")
    generation, config, want = STOPS[name]
    stops_folder(tmp_path, plain, generation, config)
    # What from_pretrained of a model does.
    if generation is not None:
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    elif config is not None:
        theirs = transformers.GenerationConfig.from_pretrained(
            tmp_path, config_file_name="config.json", _from_model_config=True
        )
    else:
        return
    stops = theirs.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert want == (tuple(stops) if stops and stops[0] not in (None, -1) else (1,))


# Files in which something else is where a token should be.


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"bos_token": 5}}, "a token must be a string"),
        ({"special_tokens_map.json": {"bos_token": ["a"]}}, "a token must be a string"),
        (
            {"tokenizer_config.json": {"bos_token": added("a", lstrip="no")}},
            "true or false",
        ),
        ({"tokenizer_config.json": {"eos_token": "\ud800"}}, "is not text"),
        ({"tokenizer_config.json": {"extra_special_tokens": "a"}}, "a list or an obj"),
        ({"tokenizer_config.json": {"extra_special_tokens": [None]}}, "must be a str"),
        ({"tokenizer_config.json": {"added_tokens_decoder": ["a"]}}, "tokens by id"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"-1": "a"}}},
            "tokens by id",
        ),
        ({"added_tokens.json": {"a": "5"}}, "token ids must be ints"),
        ({"chat_template.jinja": b"\xff"}, "is not UTF-8"),
        ({"additional_chat_templates/a.jinja": b"\xe9t\xe9"}, "is not UTF-8"),
        ({"chat_template.json": {"chat_template": [1]}}, "chat_template must be"),
        ({"config.json": {"text_config": {"eos_token_id": True}}}, "eos_token_id must"),
    ],
)
def test_what_is_no_token(tmp_path, plain, files, message):
    write_folder(tmp_path, plain, files)
    with pytest.raises(CheckpointError, match=message):
        convert.load_tokenizer(tmp_path)


def test_a_processors_template_is_the_last_resort(tmp_path, plain):
    files = {"chat_template.json": {"chat_template": "x"}}
    write_folder(tmp_path, plain, files)
    assert convert.load_tokenizer(tmp_path).chat_template == "x"
    write_folder(tmp_path, plain, {"tokenizer_config.json": NAMED})
    assert convert.load_tokenizer(tmp_path).chat_template == CHAT


@pytest.mark.peers
@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Qwen2", "Llama", "Gemma"])
def test_what_a_class_of_transformers_saves(tmp_path, name):
    """Classes that build their tokenizer of a vocabulary, and not of the file."""
    transformers = pytest.importorskip("transformers")
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<bos>", "<eos>"]
    merges = [("t", "h"), ("th", "e")]
    if name in ("Llama", "Gemma"):
        tokens += [*(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghst", "th"]
        merges += [("▁", "the")]
        tokens += ["the", "▁the"]
    else:
        tokens += [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = getattr(transformers, f"{name}Tokenizer")(vocab=vocab, merges=merges)
    made.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == f"{name}Tokenizer"
    ours = convert.load_tokenizer(tmp_path)
    for text in (*TEXTS, "<bos>  the\n 12345 naïve 日本", *theirs.all_special_tokens):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.stop_token_ids == (theirs.eos_token_id,)
