"""Readers of tokenizers: the files that lie beside a model."""

import contextlib
import functools
import json

import mutators
import tokenizers
from charsmaps import charsmap, encode
from fuzzing import Reader
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxbnb import convert

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
    "{{ eos_token }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "the sea"}]
# Ligatures and spaces are what the maps of characters are for.
TEXTS = ("the sea", "", " \ufb01x \u3000 日本é\n\n🙂 sea-1", "the " * 60)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "th"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([tokenizers.AddedToken("the sea", lstrip=True)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
            ),
        ]
    )
    return tokenizer


def _sentence_pieces():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    tokens += ["▁", *LETTERS, "th", "▁th", "▁the"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [("t", "h"), ("▁", "th"), ("▁th", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.enable_truncation(16)
    return tokenizer


def _word_pieces():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, "the"]
    tokens += ["##" + letter for letter in LETTERS]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)})
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding()
    return tokenizer


def _unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in LETTERS]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(CHARSMAP), normalizers.Replace("-", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.enable_truncation(8, stride=2)
    tokenizer.enable_padding(length=8)
    return tokenizer


CHARSMAP = charsmap({"\ufb01": "fi", "\u3000": " ", "é": "e\u0301", "\uff21": "A"})
KINDS = (_byte_level, _sentence_pieces, _word_pieces, _unigram)


@functools.cache
def _text(kind):
    return kind().to_str()


def make_folder(rng, damaged):
    tokens = {"bos_token": {"__type": "AddedToken", "content": "<s>"}}
    tokens["eos_token"] = "</s>"
    config = tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"chat_template": TEMPLATE, "extra_special_tokens": {"image": "<s>"}}
    if rng.random() < 0.5:
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}]
        config["added_tokens_decoder"] = {
            "1": {"content": "</s>", "lstrip": True, "special": True}
        }
    files = {
        "tokenizer.json": _text(rng.choice(KINDS)),
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps(
            tokens | {"additional_special_tokens": ["<x>", {"content": "<y>"}]}
        ),
        "added_tokens.json": '{"<x>": 300, "<z>": 301}',
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "config.json": '{"text_config": {"eos_token_id": 1}, "eos_token_id": []}',
    }
    if rng.random() < 0.5:
        files["chat_template.jinja"] = TEMPLATE
        files["additional_chat_templates/tool_use.jinja"] = TEMPLATE
    return {name: text.encode() for name, text in files.items()}


def read_folder(folder):
    use(convert.load_tokenizer(folder))


def use(tokenizer):
    """Encodes, and decodes all tokens; what shows only then is refused only then."""
    for text in TEXTS:
        with contextlib.suppress(convert.CheckpointError):
            ids = tokenizer.encode(text)
            assert all(type(token) is int for token in ids)
            tokenizer.decode(ids)
            assert "".join(tokenizer.decode_stream(ids)) is not None
    with contextlib.suppress(convert.CheckpointError):
        tokenizer.decode(range(tokenizer.tokenizer.get_vocab_size() + 2))
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat(MESSAGES)


def make_json(rng, damaged):
    """Makes only a tokenizer.json. The damage may be in its map of characters."""
    text = _text(rng.choice(KINDS))
    if damaged and rng.random() < 0.4:
        changed = encode(mutators.damage_bytes(CHARSMAP, rng))
        text = _text(_unigram).replace(encode(CHARSMAP), changed)
    return {"tokenizer.json": text.encode()}


READERS = [
    Reader("tokenizer folder", make_folder, read_folder),
    Reader("tokenizer.json", make_json, read_folder),
]
