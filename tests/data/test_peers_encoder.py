"""Tokens and targets beside those of transformers, and of TRL's formulas."""

import numpy as np
import pytest

from jaxbnb.data import Encoder

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers")

CHATS = [
    [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": " Là, 你"}],
    [
        {"role": "system", "content": "Four score"},
        {"role": "user", "content": "the answer\n\n"},
        {"role": "assistant", "content": "is"},
        {"role": "user", "content": "<|im_end|> seven"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "  yes \n"},
    ],
]


def theirs(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("messages", CHATS)
def test_assistant_masks(folder, load, messages):
    ours = Encoder(load("marked")).encode({"messages": messages})
    want = theirs(folder).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.tokens.tolist() == want["input_ids"]
    assert ours.is_target.tolist() == [bool(x) for x in want["assistant_masks"]]


@pytest.mark.parametrize("messages", CHATS)
def test_prompts_and_completions_of_messages(folder, load, messages):
    """TRL's mask: whatever follows the tokens of the prompt."""
    ours = Encoder(load("chatml")).encode(
        {"prompt": messages[:-1], "completion": messages[-1:]}
    )
    tokenizer = theirs(folder)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ours.tokens.tolist() == whole
    assert ours.is_target.tolist() == [False] * len(prompt) + [True] * (
        len(whole) - len(prompt)
    )


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the answer is", " yes"), ("Où?\n", "Là, 你"), ("a", "b<|im_end|>")],
)
def test_prompts_and_completions(folder, load, prompt, completion):
    """TRL's: the end token is added to the text, and the prompt is a prefix."""
    ours = Encoder(load()).encode({"prompt": prompt, "completion": completion})
    tokenizer = theirs(folder)
    if not completion.endswith("<|im_end|>"):
        completion += "<|im_end|>"
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"]
    assert whole[: len(before)] == before
    np.testing.assert_array_equal(ours.tokens, whole)
    np.testing.assert_array_equal(ours.is_target, np.arange(len(whole)) >= len(before))
    assert ours.notes == ()
