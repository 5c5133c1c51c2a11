"""Chat templates: what they may use, and what they render."""

import inspect
import json

import numpy as np
import pytest

from jaxbnb import convert

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

MESSAGES = [
    {"role": "user", "content": "Où? <b>"},
    {"role": "assistant", "content": "Là.", "reasoning": "hm", "tool_calls": None},
]
GENERATION = (
    "{% for m in messages %}\n"
    "  {% if m.role == 'assistant' %}\n"
    "    {% generation %}{{ m.content }}{% endgeneration %}\n"
    "  {% else %}{{ m.content }}{% endif %}\n"
    "{%- endfor %}|{{ seen }}"
)
# What a template says, what it is given, and what comes out.
TEMPLATES = {
    "generation": (GENERATION, {}, "Où? <b>Là.|"),
    "generation has variables of its own": (
        "{% set x = 1 %}{%- generation -%} {% set x = 2 %}{{ x }} {%- endgeneration %}"
        "{{ x }}",
        {},
        "21",
    ),
    "tojson": (
        "{{ {'é': [1, '<'], 'a': none} | tojson }}",
        {},
        '{"é": [1, "<"], "a": null}',
    ),
    "tojson's options": (
        "{{ {'é': 1, 'a': 2} | tojson(ensure_ascii=true, sort_keys=true, "
        "separators=(',', ':')) }}",
        {},
        '{"a":2,"\\u00e9":1}',
    ),
    "tojson's indent": ("{{ [1] | tojson(indent=2) }}", {}, "[\n  1\n]"),
    "tojson by position": ("{{ ['é'] | tojson(true, 1) }}", {}, '[\n "\\u00e9"\n]'),
    "loop controls": (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}",
        {},
        "x",
    ),
    "strftime_now": ("{{ strftime_now('%%') }}", {}, "%"),
    "a namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}",
        {},
        "2",
    ),
    "dict": (
        "{{ dict(a=1) }}{{ dict([('b', 2)]) }}{{ dict.fromkeys(['c']) }}",
        {},
        "{'a': 1}{'b': 2}{'c': None}",
    ),
    "a message": (
        "{{ messages[1] | tojson(sort_keys=true) }}",
        {},
        '{"content": "Là.", "reasoning": "hm", "reasoning_content": "hm", '
        '"role": "assistant", "thinking": "hm"}',
    ),
    "what is not given": (
        "{{ tools }} {{ documents }} {{ x is defined }} {{ add_generation_prompt }}",
        {},
        "None None False True",
    ),
    "variables": (
        "{{ tools[0].name }} {{ documents[0]['text'] }} {{ enable_thinking }} {{ n }}"
        "{% if add_generation_prompt %} more{% endif %}",
        {
            "tools": [{"name": "f"}],
            "documents": [{"title": "a", "text": "b"}],
            "enable_thinking": False,
            "n": np.int64(3),
            "add_generation_prompt": False,
        },
        "f b False 3",
    ),
    "a special token": ("{{ bos_token }}{{ eos_token }}", {"bos_token": "x"}, "x</s>"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of words, of characters here."""
    folder = tmp_path_factory.mktemp("chat")
    letters = sorted({*map(chr, range(32, 127)), *"éàù\n"})
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, "?")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    return folder


def load(folder, template):
    fields = {"eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return convert.load_tokenizer(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_renders(folder, name):
    template, variables, want = TEMPLATES[name]
    tokenizer = load(folder, template)
    ids = tokenizer.encode_chat(MESSAGES, **variables)
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == want


@pytest.mark.peers
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_the_same(folder, name):
    transformers = pytest.importorskip("transformers")
    template, variables, want = TEMPLATES[name]
    load(folder, template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    variables = {"add_generation_prompt": True, **variables}
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, **variables) == want


@pytest.mark.peers
@pytest.mark.parametrize(
    "template",
    [
        GENERATION,
        # Both tags in one line, twice in a message, empty, and with a filter inside.
        "{% for m in messages %}a{%- generation -%} {{ m.content | upper }}é"
        "{%- endgeneration -%} b{% generation %}{% endgeneration %}{% endfor %}",
        # In a condition that is never true, and none at all.
        "{% if false %}{% generation %}x{% endgeneration %}{% endif %}y",
        "{{ messages[0].content }}",
    ],
)
def test_what_the_assistant_writes(folder, template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered = load(folder, template).render_chat(MESSAGES)
    (text,), (spans,) = utils.render_jinja_template(
        [MESSAGES],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        eos_token="</s>",
    )
    assert rendered.text == text
    assert [*(rendered.spans or ())] == spans
    assert (rendered.spans is None) == ("generation" not in template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% generation %}x", "syntax error in line 1, .* Unexpected end of template"),
        ("{{ namespace(__init__=1) }}", "no attribute '__init__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "no attribute '_x'"),
        ("{{ dict.mro() }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ tojson.__globals__ }}", "refuses the messages"),
        ("{{ x | tojson }}", "refuses the messages"),
        ("{{ x | nothing }}", "syntax error in line 1, .* No filter named 'nothing'"),
    ],
)
def test_what_a_template_may_not(folder, template, message):
    with pytest.raises(ValueError, match=message):
        load(folder, template).encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "variables", "error", "message"),
    [
        ([], {}, ValueError, "there are no messages"),
        (["hello"], {}, TypeError, "must be a dict of role and content, got 'hello'"),
        ([{"content": b"x"}], {}, TypeError, "messages must contain only .* got bytes"),
        (
            MESSAGES,
            {"tools": [len]},
            TypeError,
            "tools must contain only .* got builtin",
        ),
    ],
)
def test_what_is_no_chat(folder, messages, variables, error, message):
    with pytest.raises(error, match=message):
        load(folder, "x").encode_chat(messages, **variables)


def test_a_syntax_error_is_one_of_the_checkpoint(folder):
    tokenizer = load(folder, "{% if x %}\n  {{ x } }}\n{% endif %}")
    with pytest.raises(convert.CheckpointError) as raised:
        tokenizer.encode_chat(MESSAGES)
    message = str(raised.value)
    assert "syntax error in line 2, '{{ x } }}': unexpected '}'" in message
    assert "messages" not in message


def test_arguments_that_no_template_reads(folder):
    tokenizer = load(folder, "{{ tokenize }}{{ max_length }}")
    with pytest.raises(TypeError, match=r"tokenize: .* max_length: it never pads"):
        tokenizer.encode_chat(MESSAGES, tokenize=False, max_length=8)
    with pytest.raises(TypeError, match="tokens without a mask"):
        tokenizer.encode_chat(MESSAGES, return_assistant_tokens_mask=True)


@pytest.mark.peers
def test_all_arguments_of_transformers_are_passed_on_or_refused(folder):
    transformers = pytest.importorskip("transformers")
    method = transformers.PreTrainedTokenizerBase.apply_chat_template
    tokenizer = load(folder, "x")
    known = {"tools", "documents", "add_generation_prompt"}
    for name in set(inspect.signature(method).parameters) - known - {"self", "kwargs"}:
        with pytest.raises(TypeError, match=f"{name}: "):
            tokenizer.encode_chat(MESSAGES, **{name: None})
