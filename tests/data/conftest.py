"""A small tokenizer, as a folder that transformers reads too."""

import json

import pytest

CHATML = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what the assistant thought in all turns but the last, as reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}(hm){% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "forgetful": FORGETFUL}
CORPUS = [
    "Four score and seven years ago our fathers brought forth",
    "the answer is yes",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Byte-level BPE with a few merges and the tokens of ChatML."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def load(folder):
    """A function that loads the tokenizer with a template, by its name."""
    from jaxbnb.convert import load_tokenizer

    def load(template="chatml"):
        fields = {"eos_token": "<|im_end|>", "chat_template": TEMPLATES[template]}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        return load_tokenizer(folder)

    return load


@pytest.fixture(scope="session")
def split():
    """A function that returns the texts of an example's runs: (text, is_target)."""
    import itertools

    def split(tokenizer, example):
        pairs = zip(example.is_target.tolist(), example.tokens.tolist(), strict=True)
        return [
            (tokenizer.tokenizer.decode([token for _, token in run], False), is_target)
            for is_target, run in itertools.groupby(pairs, lambda pair: pair[0])
        ]

    return split
