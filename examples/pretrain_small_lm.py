"""A small language model from scratch: 8-bit Adam beside optax.adamw, on the same data.

    python examples/pretrain_small_lm.py [--steps 300] [--out out/pretrain]

A Llama over bytes trains on speeches, from the same weights and in the same order with
each optimizer. OUT/loss.png has both curves. `jaxbnb bench parity` does this for every
optimizer, with several seeds.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _shared import speeches
from flax import nnx

import jaxbnb
from jaxbnb import finetune
from jaxbnb.models import Llama, LlamaConfig, generate

BATCH, LENGTH = 8, 128
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
)


def read_windows():
    """Returns windows of bytes, to train on and held out."""
    return [
        finetune.pack([b"\n\n".join(t.encode() for t in texts.values())], LENGTH)
        for texts in speeches()
    ]


def train(tx, windows, held_out, steps, evaluate_every):
    """Returns the trained model, its held-out losses by step, and the run's figures."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    held_out_losses = {0: float(np.log(finetune.perplexity(model, held_out)))}
    order = np.random.default_rng(0).permutation(len(windows))[: steps * BATCH]
    batches = windows[order].reshape(-1, BATCH, LENGTH)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss_of(model):
            return finetune.next_token_loss(model, tokens)

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = []
    for number, batch in enumerate(batches, 1):
        losses.append(float(step(model, optimizer, jnp.asarray(batch))))
        if number % evaluate_every == 0 or number == steps:
            loss = float(np.log(finetune.perplexity(model, held_out)))
            held_out_losses[number] = loss
            print(f"  step {number}: loss {losses[-1]:.3f}, held-out {loss:.3f}")
    size = jaxbnb.core.tree_nbytes(nnx.state(optimizer.opt_state))
    return model, {"loss": losses, "held_out": held_out_losses, "state_bytes": size}


def plot(runs, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        label = f"{name}, {run['state_bytes'] / 2**20:.1f} MiB of state"
        axes.plot(*zip(*run["held_out"].items(), strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each run")
    parser.add_argument("--out", type=Path, default=Path("out/pretrain"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    windows, held_out = read_windows()
    held_out, runs = held_out[:64], {}
    rate = optax.warmup_cosine_decay_schedule(
        0, 3e-3, -(-args.steps // 10), args.steps + 1
    )
    for name, make in (("optax.adamw", optax.adamw), ("adamw8bit", jaxbnb.adamw8bit)):
        print(name)
        every = max(1, args.steps // 10)
        model, runs[name] = train(make(rate), windows, held_out, args.steps, every)
    plot(runs, args.out / "loss.png")
    (args.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    prompt = np.frombuffer(b"My fellow Americans, ", np.uint8)[None].astype(np.int32)
    new = generate(model, prompt, 100, temperature=0.7, key=jax.random.key(0))
    print(f"The model of the last run writes: {bytes(new[0].tolist())!r}")


if __name__ == "__main__":
    main()
