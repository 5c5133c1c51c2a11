"""trl.json: the losses of TRL's SFTTrainer with PEFT on a small model.

To make it again, install trl, peft and torch for the CPU, and run

    python -m tests.goldens.make_trl

README.md says what is stored.
"""

import json
import tempfile
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl

from tests.finetune import toy

RANK, LENGTH, STEPS = 4, 48, 20
RATE, CLIP = 5e-3, 0.4

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("and", "sleeps"),
]


def sentence(first: int, count: int) -> str:
    """Returns ``count`` words."""
    return " ".join(WORDS[(3 * first + 5 * i) % len(WORDS)] for i in range(count))


# 11 rows each, so that the last batch of an epoch is smaller. All fit into LENGTH.
TEXTS = [{"text": sentence(i, 1 + i % 7)} for i in range(11)]
SUMS = [
    {"prompt": f"{a}+{b}=", "completion": f"{a + b}{' ' + sentence(a, b) if b else ''}"}
    for a in range(4)
    for b in range(3)
][:11]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"][:4]},
            *([{"role": "user", "content": "?"}] if i % 2 else []),
            *([{"role": "assistant", "content": WORDS[i][:3]}] if i % 2 else []),
        ]
    }
    for i, row in enumerate(SUMS)
]
# The longest first and no two of one length, so that windows are in the order of rows.
PACKED = [{"text": sentence(i, 9)[: 40 - 3 * i]} for i in range(11)]
# By name: rows, fields of SFTConfig, and the number of micro-batches in a step.
RUNS = {
    "text": (TEXTS, {}, 1),
    "completions": (SUMS, {}, 1),
    "chats": (CHATS, {"assistant_only_loss": True}, 1),
    "packed": (PACKED, {"packing": True, "packing_strategy": "bfd"}, 1),
    "accumulated": (SUMS, {}, 3),
}


class Trainer(trl.SFTTrainer):
    """Keeps the loss of each micro-batch, which the logs round."""

    def training_step(self, *args, **kwargs):
        """Records what the step returns."""
        loss = super().training_step(*args, **kwargs)
        self.parts.append((self.state.global_step, loss.item()))
        return loss


def run(folder: Path, rows: list, fields: dict, accumulate: int) -> dict:
    """Trains, and returns the losses and the norms of the gradients."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    config = trl.SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS,
        max_length=LENGTH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **fields,
    )
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.parts = []
    trainer.train()
    losses = [0.0] * STEPS
    for step, part in trainer.parts:
        losses[step] += part
    norms = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
    return {
        "rows": rows,
        "packing": fields.get("packing", False),
        "accumulate": accumulate,
        "losses": losses,
        "grad_norms": norms,
    }


def main() -> None:
    """Writes the file."""
    settings = {"rank": RANK, "length": LENGTH, "rate": RATE, "clip": CLIP, "batch": 2}
    runs = {}
    for name, (rows, fields, accumulate) in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            toy.write_folder(folder, toy.MARKED_TEMPLATE)
            toy.write_adapter(folder / "start", RANK)
            runs[name] = run(folder, rows, fields, accumulate)
        print(name, runs[name]["losses"][0], runs[name]["losses"][-1])
    content = {"settings": settings, "runs": runs}
    path = Path(__file__).with_name("trl.json")
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
