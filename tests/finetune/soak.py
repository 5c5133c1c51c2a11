"""Trains and saves for thousands of steps: is memory flat, does nothing recompile?

Called as ``python -m tests.finetune.soak FOLDER STEPS``, with a checkpoint after each
step. The first quarter of the steps warms up.
"""

import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

from jaxbnb.finetune import TrainConfig, train
from jaxbnb.finetune._checkpoints import Checkpoints
from tests.finetune import toy

COMPILED = "/jax/core/compile/backend_compile_duration"
# How much more memory the process may have after a step with a checkpoint. Orbax, alone
# in a loop, keeps 0.07 MiB of each checkpoint.
GROWTH = 0.1 * 2**20


def read_memory():
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def write_data(path):
    generator = np.random.default_rng(0)
    rows = [
        {"text": "".join(map(chr, generator.integers(97, 123, length)))}
        for length in generator.integers(8, 60, 256)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    toy.write_folder(folder)
    write_data(folder / "train.jsonl")
    memory, compiled, count = [], [], 0

    def listen(event, duration, **_):
        nonlocal count
        count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    save = Checkpoints.save

    def save_and_note(*args, **kwargs):
        memory.append(read_memory())
        compiled.append(count)
        return save(*args, **kwargs)

    Checkpoints.save = save_and_note
    config = TrainConfig(
        model=str(folder),
        data=str(folder / "train.jsonl"),
        out=str(folder / "run"),
        steps=steps,
        batch=2,
        accumulate=2,
        seq=32,
        quant="nf4",
        dtype="float32",
        rank=4,
        dropout=0.1,
        save_every=1,
        prompts=(),
        lr=1e-3,
    )
    train(config)
    quarter = steps // 4
    early = statistics.median(memory[quarter : 2 * quarter])
    late = statistics.median(memory[-quarter:])
    again = compiled[-1] - compiled[quarter]
    print(
        f"{steps} steps, {len(memory)} saves; memory {early / 2**20:.1f} MiB in the "
        f"second quarter, {late / 2**20:.1f} MiB in the last; {compiled[quarter]} "
        f"programs compiled before, {again} after"
    )
    assert len(memory) >= steps, len(memory)
    between = len(memory) - quarter // 2 - (quarter + quarter // 2)
    assert late - early < GROWTH * between, (early, late)
    assert again == 0, again


if __name__ == "__main__":
    main()
