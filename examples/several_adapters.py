"""Several adapters over one frozen 4-bit base: trained apart, served together.

    python examples/several_adapters.py [--quick]

Each adapter learns another task on the same small model, which exists once. Then one
batch uses a different adapter in each row, and a weighted sum makes a new one.
"""

import argparse

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbnb
from jaxbnb import lora
from jaxbnb.core import tree_nbytes
from jaxbnb.models import Llama, LlamaConfig, generate

# The tasks: count upwards, or downwards, from any number below 64.
TASKS = {"up": 1, "down": -1}
NUMBERS, LENGTH = 64, 16


def make_base():
    config = LlamaConfig(
        vocab_size=NUMBERS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig("nf4", double_quant=True))
    return model


def make_batches(stride, count):
    starts = np.random.default_rng(0).integers(0, NUMBERS, (count, 16, 1))
    return (starts + stride * np.arange(LENGTH)) % NUMBERS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    steps = 40 if parser.parse_args().quick else 200
    model = make_base()
    prompt = jnp.array([[10, 11, 12]] * 3)
    before = model(prompt)
    print(f"base: {tree_nbytes(nnx.state(model)) / 2**10:.0f} KiB")

    config = lora.LoraConfig(r=16, lora_alpha=32)
    for name, stride in TASKS.items():
        lora.add_adapter(model, config, name=name, rngs=nnx.Rngs(1))
        lora.set_adapter(model, name)
        # Only this one: weight decay would shrink the others.
        only = lora.adapter_params(name)
        tx = jaxbnb.adamw8bit(1e-2)
        result = jaxbnb.finetune.fit(model, tx, make_batches(stride, steps), wrt=only)
        size = result.trainable_bytes / 2**10
        print(f"{name}: {size:.0f} KiB, loss {result.losses[0]:.2f}", end=" ")
        print(f"to {result.losses[-1]:.2f}")

    # In one batch, a row counts up, a row counts down, and a row has only the base.
    with lora.adapter_rows(model, ["up", "down"], jnp.array([0, 1, -1])):
        rows = generate(model, prompt, 6)
    for name, row in zip(("up", "down", "base"), rows.tolist(), strict=True):
        print(f"{name:5} 10 11 12 ->", *row)

    # A new adapter: the weighted sum of both.
    lora.combine_adapters(model, ["up", "down"], [0.9, 0.1], name="mostly_up")
    lora.set_adapter(model, "mostly_up")
    print("sum   10 11 12 ->", *generate(model, prompt[:1], 6)[0].tolist())
    with lora.disable_adapters(model):
        same = jnp.array_equal(model(prompt), before)
    print(f"The base is as it was: {bool(same)}")


if __name__ == "__main__":
    main()
