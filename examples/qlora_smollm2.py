"""QLoRA end to end: a real language model, fine-tuned in 4 bits on files of text.

    make demo                            # or, in an environment that has it all:
    python examples/qlora_smollm2.py --steps 24 --out out/qlora_smollm2

SmolLM2-135M trains on speeches, and three held-out ones show whether it has learned.
The training is one call, with a command for your own files: jaxbnb finetune MODEL
--data train.jsonl --eval held_out.jsonl --out run. It writes OUT/run, with report.html
and the adapter. OUT/results.json has everything that is printed.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from _shared import bf16_adamw_bytes, smollm2, speeches, write_jsonl

import jaxbnb
from jaxbnb import finetune
from jaxbnb.models import generate

SEQ = 1024
QUANT_TYPES = ("nf4", "fp4", "int4", "int8", "fp8_e4m3", "fp8_e5m2", "dynamic8")
PROMPT = "My fellow Americans, the state of our union"


def main():
    args = parse_args()
    start = time.perf_counter()
    encoder = finetune.Encoder(jaxbnb.convert.load_tokenizer(smollm2()))
    tokenizer = encoder.tokenizer
    train, held_out = speeches()
    write_jsonl(args.out / "train.jsonl", [{"text": text} for text in train.values()])
    # Windows share a token, so that each one after the first adds SEQ - 1.
    tokens = tokenizer.encode("\n\n".join(held_out.values()))
    text = tokenizer.decode(tokens[: args.windows * (SEQ - 1)])
    write_jsonl(args.out / "held_out.jsonl", [{"text": text}])
    config = finetune.TrainConfig(
        model=smollm2(), data=args.out / "train.jsonl", out=args.out / "run",
        eval=args.out / "held_out.jsonl", eval_every=-(-args.steps // 3),
        quant=args.quant_type, rank=args.rank, steps=args.steps, save_every=args.steps,
        batch=1, accumulate=1, seq=SEQ, lr=1e-3, warmup=0.1, seed=args.seed,
        prompts=(PROMPT,),
    )  # fmt: skip
    shutil.rmtree(config.out, ignore_errors=True)  # What an earlier demo has left.
    print("1. float32: held-out perplexity", end=" ", flush=True)
    model = jaxbnb.load_pretrained(config.model, dtype=jnp.float32)
    ppl = {"float32": finetune.perplexity(model, windows(config, encoder))}
    bf16 = bf16_adamw_bytes(model.config, (1, SEQ))
    del model
    print(f"{ppl['float32']:.2f}\n\n2. Adapters over {args.quant_type}", flush=True)
    result = finetune.train(config)
    metrics = Path(config.out, "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    losses = {x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x}
    ppl[args.quant_type] = math.exp(losses[0])
    ppl[f"{args.quant_type}_lora"] = math.exp(losses[args.steps])

    quant, dtype = config.quant_config(), jnp.dtype(config.dtype)
    model = jaxbnb.load_pretrained(config.model, quant=quant, dtype=dtype)
    jaxbnb.lora.load_adapter(model, Path(config.out, "adapter"))
    ((prompt, before, after),) = result.samples
    tokens = np.array([tokenizer.encode(prompt)])
    again = tokenizer.decode(generate(model, tokens, 48)[0].tolist())
    same = again == after.removesuffix("…")  # The report marks an answer that was cut.
    print(f"\n3. The adapter, loaded again, answers in the same words: {same}")
    ours = {"weights": result.weight_bytes, "adapters": result.trainable_bytes}
    ours["optimizer_state"] = result.optimizer_bytes
    ours["compiled_peak"] = result.peak_bytes
    print(f"\n{'MiB':<18}{'QLoRA':>8}{'bf16 + optax.adamw':>20}")
    for name, count in ours.items():
        print(f"{name:<18}{count / 2**20:8.1f}{bf16[name] / 2**20:20.1f}")
    print("\nHeld-out perplexity:", ", ".join(f"{k} {v:.2f}" for k, v in ppl.items()))
    print(f"\n{prompt} ...\n\nbefore: {before}\n\nafter: {after}")
    results = {
        "perplexity": ppl,
        "held_out_loss": losses,
        "loss": [x["loss"] for x in lines if "loss" in x],
        "bytes": {**ours, "bf16_adamw": bf16},
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - start,
        "adapter_reloads_exactly": same,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{results['seconds']:.0f} s. {config.out}/report.html shows the run.")


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


def windows(config, encoder):
    """Returns the windows on which the run is evaluated."""
    data = finetune.load_dataset(config.eval)
    once = {"batch_size": 1, "seq_length": SEQ, "shuffle": False, "epochs": 1}
    batches = finetune.Batches(data, encoder, **once)
    return np.concatenate([batch.tokens[0] for batch in batches])


if __name__ == "__main__":
    main()
