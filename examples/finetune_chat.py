"""Fine-tuning on chats: questions about speeches, answered in the speaker's words.

    make finetune-chat                   # or, in an environment that has it all:
    python examples/finetune_chat.py --steps 24 --out out/finetune_chat

The chats are made from State of the Union addresses: "What did President Truman say
about peace in 1950?", and a paragraph of that year's speech. The model's own template
renders them, and only the answers are trained on. With so few, SmolLM2-135M learns the
manner of these answers, not the facts: what it says was not said by anyone.
"""

import argparse
import re
import shutil
from pathlib import Path

from _shared import smollm2, speeches, write_jsonl

from jaxbnb import finetune
from jaxbnb.convert import load_tokenizer

TOPICS = (
    *("agriculture", "business", "debt", "defense", "education", "employment"),
    *("energy", "freedom", "health", "housing", "inflation", "peace", "science"),
    *("taxes", "trade", "wages"),
)
SHORTEST, LONGEST = 150, 600


def make_chats(texts):
    """Makes a chat for each speech and topic, of the first paragraph with the word."""
    chats = []
    for name, text in texts.items():
        year, president = re.match(r"(\d+)-(.*)-\d+", name).groups()
        paragraphs = [
            paragraph.strip()
            for paragraph in text.split("\n\n")
            if SHORTEST <= len(paragraph.strip()) <= LONGEST
        ]
        for topic in TOPICS:
            word = re.compile(rf"\b{topic}\b", re.IGNORECASE)
            answer = next(filter(word.search, paragraphs), None)
            if answer is None:
                continue
            question = f"What did President {president} say about {topic} in {year}?"
            user = {"role": "user", "content": question}
            assistant = {"role": "assistant", "content": answer}
            chats.append({"messages": [user, assistant]})
    return chats


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=24, help="training steps")
    parser.add_argument("--seq", type=int, default=512, help="tokens in a window")
    parser.add_argument(
        "--model", type=Path, help="folder or GGUF; SmolLM2 if left out"
    )
    parser.add_argument("--out", type=Path, default=Path("out/finetune_chat"))
    args = parser.parse_args()
    model = args.model or smollm2()
    train, held_out = map(make_chats, speeches())
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "held_out.jsonl", held_out)
    print(f"{len(train)} chats to train on, {len(held_out)} held out. The first one,")
    print("with what is trained on between brackets, or in green:\n")
    tokenizer = load_tokenizer(model)
    encoder = finetune.Encoder(tokenizer)
    finetune.show_example(encoder.encode(train[0]), tokenizer)

    # What an earlier run of this file has left.
    shutil.rmtree(args.out / "run", ignore_errors=True)
    result = finetune.train(
        finetune.TrainConfig(
            model=model,
            data=args.out / "train.jsonl",
            eval=args.out / "held_out.jsonl",
            out=args.out / "run",
            steps=args.steps,
            batch=2,
            accumulate=1,
            seq=args.seq,
            lr=1e-3,
            warmup=0.1,
            save_every=max(1, args.steps // 3),
            prompts=("What did President Kennedy say about peace in 1962?",),
        )
    )
    for prompt, before, after in result.samples:
        print(f"\n{prompt}\n\nbefore: {before}\n\nafter: {after}")


if __name__ == "__main__":
    main()
