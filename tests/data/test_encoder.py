"""Which tokens a row becomes, and which of them are targets."""

import dataclasses

import pytest

from jaxbnb.convert import CheckpointError
from jaxbnb.data import DataError, Encoder
from jaxbnb.data._chat import NO_PROMPT
from jaxbnb.data._encoder import NO_COMPLETION, NO_STOP, NOT_A_PREFIX

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
END = "<|im_end|>"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "Là."},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "the answer"},
]
SYSTEM = f"<|im_start|>system\nBe brief.{END}\n"


def test_text_ends_with_the_end_token(load, split):
    tokenizer = load()
    encoder = Encoder(tokenizer)
    example = encoder.encode({"text": "Four score", "other": 1})
    assert split(tokenizer, example) == [("Four", False), (f" score{END}", True)]
    assert example.is_text
    assert example.notes == ()
    # An end token that is there already is not doubled.
    again = encoder.encode({"text": f"Four score{END}"})
    assert again.tokens.tolist() == example.tokens.tolist()
    # Nothing predicts the first token of a row, so an empty text has no targets.
    assert not encoder.encode({"text": ""}).is_target.any()


def test_a_completion_and_its_end_are_targets(load, split):
    tokenizer = load()
    row = {"prompt": "the answer", "completion": " is yes"}
    example = Encoder(tokenizer).encode(row)
    assert split(tokenizer, example) == [("the answer", False), (f" is yes{END}", True)]
    assert not example.is_text
    everything = Encoder(tokenizer, loss_on="all").encode(row)
    assert everything.is_target.tolist() == [False] + [True] * (len(example.tokens) - 1)
    # An empty prompt leaves all but the first token.
    example = Encoder(tokenizer).encode({"prompt": "", "completion": "yes"})
    assert example.is_target.tolist() == [False, *[True] * (len(example.tokens) - 1)]


def test_a_prompt_with_a_space_at_its_end_is_noted(load, split):
    tokenizer = load()
    example = Encoder(tokenizer).encode({"prompt": "the ", "completion": "answer"})
    # The space belongs to the token of "answer", which therefore is a target.
    assert split(tokenizer, example) == [("the", False), (f" answer{END}", True)]
    assert example.notes == (NOT_A_PREFIX,)


def test_an_empty_completion_is_noted(load, split):
    tokenizer = load()
    example = Encoder(tokenizer).encode({"prompt": "the", "completion": ""})
    assert split(tokenizer, example) == [("the", False), (END, True)]
    assert example.notes == (NO_COMPLETION,)


def test_special_tokens_around_a_prompt(load, split):
    """The end token that a tokenizer adds is not part of the prompt."""
    from tokenizers import processors

    tokenizer = load()
    start, end = (tokenizer.tokenizer.token_to_id(t) for t in ("<|im_start|>", END))
    tokenizer.tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {END}",
        special_tokens=[("<|im_start|>", start), (END, end)],
    )
    example = Encoder(tokenizer).encode({"prompt": "the", "completion": " answer"})
    assert example.notes == ()
    assert split(tokenizer, example) == [
        ("<|im_start|>the", False),
        (f" answer{END}", True),
    ]


@pytest.mark.parametrize(("template", "newline"), [("chatml", "\n"), ("marked", "")])
def test_the_assistants_turns_are_targets(load, split, template, newline):
    tokenizer = load(template)
    # A block ends where it says; the prefixes end where the next message begins.
    rest = "" if newline else "\n"
    want = [
        (f"{SYSTEM}{USER}Où?{END}\n{ASSISTANT}", False),
        (f"Là.{END}{newline}", True),
        (f"{rest}{USER}yes{END}\n{ASSISTANT}", False),
        (f"the answer{END}{newline}", True),
        *([(rest, False)] if rest else []),
    ]
    assert split(tokenizer, Encoder(tokenizer).encode({"messages": CHAT})) == want
    last = [("".join(text for text, _ in want[:3]), False), *want[3:]]
    for encoder, row in (
        (Encoder(tokenizer, loss_on="last"), {"messages": CHAT}),
        (Encoder(tokenizer), {"prompt": CHAT[:4], "completion": CHAT[4:]}),
    ):
        assert split(tokenizer, encoder.encode(row)) == last
    (first, everything) = split(
        tokenizer, Encoder(tokenizer, loss_on="all").encode({"messages": CHAT})
    )
    assert first == ("<|im_start|>", False)
    assert everything[1]


def test_tools_and_tool_calls(load, split):
    tokenizer = load()
    tools = '[{"name": "f"}]'
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages = [
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "is"},
    ]
    got = split(
        tokenizer, Encoder(tokenizer).encode({"messages": messages, "tools": tools})
    )
    assert got == [
        (
            f'<|im_start|>tools\n{{"name": "f"}}\n{END}\n{USER}yes{END}\n{ASSISTANT}',
            False,
        ),
        # The arguments are JSON, not a string with JSON in it.
        (f'{{"x": "é"}}{END}\n', True),
        (f"<|im_start|>tool\n7{END}\n{ASSISTANT}", False),
        (f"is{END}\n", True),
    ]
    assert isinstance(call["function"]["arguments"], str)
    # A template that needs a string gets it.
    plain = "call.function.arguments"
    adds = tokenizer.chat_template.replace(f"{plain} | tojson", f"'' + {plain}")
    tokenizer = dataclasses.replace(tokenizer, chat_template=adds)
    again = Encoder(tokenizer).encode({"messages": messages, "tools": tools})
    assert split(tokenizer, again) == got


def test_a_template_that_ends_a_whole_chat(load, split):
    """Phi-3's: the text end follows the last turn only."""
    tokenizer = load()
    phi = tokenizer.chat_template.replace(END, "</s>") + (
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    tokenizer = dataclasses.replace(tokenizer, chat_template=phi)
    runs = split(tokenizer, Encoder(tokenizer).encode({"messages": CHAT}))
    assert [text for text, is_target in runs if is_target] == [
        "Là.</s>\n",
        f"the answer</s>\n{END}",
    ]


def test_a_template_that_changes_earlier_turns(load, split):
    tokenizer = load("forgetful")
    with pytest.raises(DataError, match=r"chat up to message 2 .* loss_on='last'"):
        Encoder(tokenizer).encode({"messages": CHAT})
    example = Encoder(tokenizer, loss_on="last").encode({"messages": CHAT})
    assert split(tokenizer, example)[-1] == (f"(hm)the answer{END}\n", True)
    # One turn alone has no earlier one.
    example = Encoder(tokenizer).encode({"messages": CHAT[:3]})
    assert split(tokenizer, example)[-1] == (f"(hm)Là.{END}\n", True)


@pytest.mark.parametrize(
    ("start", "notes"),
    # Mistral's answers, for one, follow the user's message at once.
    [("<|im_start|>{{ m.role }}\n", (NO_PROMPT,)), (" ", ())],
)
def test_a_template_without_a_prompt_is_noted(load, split, start, notes):
    """It ignores add_generation_prompt, so what begins an answer is a target."""
    tokenizer = dataclasses.replace(
        load(),
        chat_template=f"{{% for m in messages %}}{start}{{{{ m.content }}}}{END}"
        "{% endfor %}",
    )
    example = Encoder(tokenizer).encode({"messages": CHAT})
    assert example.notes == notes
    header = ASSISTANT if notes else " "
    assert split(tokenizer, example)[-1] == (f"{header}the answer{END}", True)
    last = Encoder(tokenizer, loss_on="last").encode({"messages": CHAT})
    assert last.notes == notes


def test_a_template_that_does_not_end_turns_is_noted(load):
    tokenizer = dataclasses.replace(
        load(),
        chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    assert Encoder(tokenizer).encode({"messages": CHAT}).notes == (NO_STOP,)
    # A chat without an assistant has nothing that could end.
    example = Encoder(tokenizer).encode({"messages": CHAT[:2]})
    assert not example.is_target.any()
    assert example.notes == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a", "output": "b"},
            "its keys are 'instruction', 'output'. Rename output to completion",
        ),
        ({"conversations": []}, "its keys are 'conversations'. Give the turns as mess"),
        ({}, "its keys are none"),
        ({"text": 7}, "text must be a string, got 7"),
        ({"text": "a\ud800"}, "text holds half of a surrogate pair at character 1"),
        ({"prompt": "a", "completion": 7}, "both be strings, or both lists"),
        ({"prompt": "a", "completion": CHAT}, "both be strings, or both lists"),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": [{"from": "human"}]}, "must be a dict with a role"),
        ({"messages": CHAT, "tools": "[{"}, "tools are a string, and not valid JSON"),
        ({"messages": CHAT[2:]}, "the assistant speaks first"),
        (
            {"messages": CHAT, "chat_template_kwargs": {"padding": True}},
            "padding: it never pads",
        ),
    ],
)
def test_bad_rows(load, row, message):
    with pytest.raises(DataError, match=message):
        Encoder(load()).encode(row)


def test_no_template_and_no_end_token(load):
    tokenizer = load()
    bare = Encoder(dataclasses.replace(tokenizer, chat_template=None))
    with pytest.raises(DataError, match="has no chat template"):
        bare.encode({"messages": CHAT})
    broken = Encoder(dataclasses.replace(tokenizer, chat_template="{% if %}"))
    with pytest.raises(CheckpointError, match="syntax error"):
        broken.encode({"messages": CHAT})
    nameless = dataclasses.replace(tokenizer, special_tokens={}, stop_token_ids=())
    endless = Encoder(nameless)
    with pytest.raises(DataError, match="names no token that ends a text"):
        endless.encode({"text": "a"})
    with pytest.raises(ValueError, match="loss_on must be one of"):
        Encoder(tokenizer, loss_on="prompt")


def test_a_batch_keeps_its_order_and_its_errors(load):
    encoder = Encoder(load())
    rows = [
        {"text": "Four"},
        {"nothing": 1},
        {"messages": CHAT},
        {"prompt": "a", "completion": "b"},
        {"text": "score"},
    ]
    got = encoder.encode_batch(rows)
    assert isinstance(got.pop(1), DataError)
    rows.pop(1)
    for example, row in zip(got, rows, strict=True):
        alone = encoder.encode(row)
        assert example.tokens.tolist() == alone.tokens.tolist()
        assert example.is_target.tolist() == alone.is_target.tolist()


def test_a_token_that_the_model_does_not_have(load):
    """Only the rows with one are refused; the largest is named."""
    tokenizer = load()
    last = max(tokenizer.encode("the answer"))
    rows = [{"text": "z"}, {"text": "the answer"}]
    encoder = Encoder(tokenizer, vocab_size=last)
    # The end token has a low id, and the letter is one of the bytes.
    example, error = encoder.encode_batch(rows)
    assert example.is_text
    assert isinstance(error, DataError)
    token = tokenizer.tokenizer.id_to_token(last)
    assert str(error).startswith(f"token {last}, {token!r}, is outside the model's")
    for size in (None, last + 1):
        enough = dataclasses.replace(encoder, vocab_size=size)
        assert len(enough.encode(rows[1]).tokens)
