"""Readers of tokenizers: the files that lie beside a model."""

import functools
import json

import tokenizers
from fuzzing import Reader
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from jaxbnb import convert

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "the sea"}]


@functools.cache
def _byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "th"])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("t", "h")])
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


@functools.cache
def _unigram():
    pieces = [("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in "thesa")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.enable_truncation(8, stride=2)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str()


def make_folder(rng, damaged):
    tokens = {"bos_token": {"__type": "AddedToken", "content": "<s>"}}
    tokens["eos_token"] = "</s>"
    config = tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"chat_template": TEMPLATE, "extra_special_tokens": {"image": "<s>"}}
    files = {
        "tokenizer.json": rng.choice([_byte_level, _unigram])(),
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps(tokens),
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "config.json": '{"model_type": "llama", "eos_token_id": 1}',
    }
    if rng.random() < 0.5:
        files["chat_template.jinja"] = TEMPLATE
    return {name: text.encode() for name, text in files.items()}


def read_folder(folder):
    tokenizer = convert.load_tokenizer(folder)
    ids = tokenizer.encode("the sea")
    assert all(type(token) is int for token in ids)
    tokenizer.decode(ids)
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat(MESSAGES)


READERS = [Reader("tokenizer folder", make_folder, read_folder)]
