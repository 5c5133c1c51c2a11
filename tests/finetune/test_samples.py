"""Prompts of a report: taken from rows of any form, also where some are bad."""

import pytest

from jaxbnb.convert import load_tokenizer
from jaxbnb.data import Encoder, load_dataset
from jaxbnb.finetune import ConfigError
from jaxbnb.finetune._samples import choose_prompts, is_chat
from tests.finetune import toy

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

# Template with the names of tools, and arguments that must be objects.
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v }}{% endfor %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"function": {"name": "add", "arguments": '{"a": 2}'}}
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def encoder(tmp_path):
    toy.write_tokenizer(tmp_path, TEMPLATE)
    return Encoder(load_tokenizer(tmp_path))


def choose(encoder, rows, texts=None):
    prompts = choose_prompts(texts, load_dataset(rows), encoder)
    return [encoder.tokenizer.decode(prompt.token_ids) for prompt in prompts]


def test_rows_of_all_forms(encoder):
    """Columns without values are as in a table of several forms."""
    nothing = dict.fromkeys(("messages", "prompt", "completion", "text"))
    tools = '[{"name": "add"}]'
    cases = [
        ({"messages": CHAT, "tools": tools}, "[add]<user>2+2?<assistant>a=2<tool>4"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, "<user>2+2?"),
        ({"messages": CHAT[:1]}, "<user>2+2?"),
        ({"prompt": "2+2=", "completion": "4"}, "2+2="),
        ({"text": " ".join("abcdefghijklmnop")}, "a b c d e f g h i j k l"),
    ]
    for row, want in cases:
        rows = load_dataset([nothing | row])
        chats = is_chat(rows, encoder)
        assert chats == ("<user>" in want)
        end = "<assistant>" if chats else ""
        assert choose(encoder, [nothing | row]) == [want + end]


def test_bad_and_long_rows_are_passed_over(encoder):
    rows = [
        {"words": 1},
        {"prompt": 3, "completion": "x"},
        {"messages": [{"content": "no role"}]},
        {"prompt": 300 * "p", "completion": "c"},
        {"prompt": "", "completion": "c"},
        *({"prompt": f"{i}+1=", "completion": "c"} for i in range(3)),
    ]
    assert choose(encoder, rows) == ["0+1=", "1+1="]
    assert choose(encoder, rows[:3]) == []


def test_given_prompts_are_as_the_rows(encoder):
    assert choose(encoder, [{"text": "x"}], ["hi"]) == ["hi"]
    chats = [{"words": 1}, {"messages": CHAT}]
    assert choose(encoder, chats, ["hi"]) == ["<user>hi<assistant>"]


def test_prompts_leave_room_for_an_answer(encoder):
    """A model with 64 tokens, where an answer has 48."""
    rows = load_dataset([{"prompt": n * "p", "completion": "c"} for n in (17, 16)])
    (prompt,) = choose_prompts(None, rows, encoder, max_length=64)
    assert len(prompt.token_ids) == 16
    for text in ("", 17 * "p"):
        with pytest.raises(ConfigError, match=r"prompts: .* tokens; the model takes"):
            choose_prompts(["pp", text], rows, encoder, max_length=64)
