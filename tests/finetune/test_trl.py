"""The losses and gradient norms of 20 steps, as TRL's SFTTrainer with PEFT has them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb
from jaxbnb.finetune import Batches, Encoder, TrainConfig, load_dataset
from jaxbnb.finetune._data import Batch, flatten
from jaxbnb.finetune._loop import Loop
from jaxbnb.finetune._optimizer import make_optimizer, make_schedule
from jaxbnb.finetune._step import make_loss
from tests.finetune import toy

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("goldens/trl.json").read_text())
SETTINGS, RUNS = GOLDEN["settings"], GOLDEN["runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy.write_folder(folder)
    toy.write_adapter(folder / "start", SETTINGS["rank"])
    return folder


@pytest.fixture(scope="module")
def loop(folder):
    """The model with its adapter. Steps of a shape are compiled once for all runs."""
    model = jaxbnb.load_pretrained(folder)
    jaxbnb.lora.load_adapter(model, folder / "start")
    config = TrainConfig(
        model=str(folder),
        out="out",
        optimizer="adamw",
        lr=SETTINGS["rate"],
        warmup=0.0,
        schedule="cosine",
    )
    tx = make_optimizer(config, make_schedule(config, steps=20))
    loop = Loop(model, tx, make_loss(False), max_grad_norm=SETTINGS["clip"])
    zeros = np.zeros((SETTINGS["batch"], SETTINGS["length"]), np.int32)
    loop.start(Batch(zeros, None))
    # Steps donate their state.
    return loop, jax.tree.map(np.array, loop.state)


# The template with marks is TRL's way to find the assistant's text.
@pytest.mark.parametrize(
    ("name", "template"),
    [*((name, toy.TEMPLATE) for name in RUNS), ("chats", toy.MARKED_TEMPLATE)],
    ids=[*RUNS, "chats by marks"],
)
def test_losses_are_those_of_trl(name, template, folder, loop):
    """Text, completions, chats, packed windows, and micro-batches of unequal counts.

    A loss of 5 to 6 has a rounding of 2.4e-7. The limit is 40 of them, and ten times as
    many for norms, as sums of squares over all gradients. The first step's differ by 3,
    and so do the twentieth's.
    """
    run = RUNS[name]
    toy.write_tokenizer(folder, template)
    batches = Batches(
        load_dataset(run["rows"]),
        Encoder(jaxbnb.convert.load_tokenizer(folder)),
        batch_size=SETTINGS["batch"],
        accumulate=run["accumulate"],
        seq_length=SETTINGS["length"],
        packing=run["packing"],
        shuffle=False,
    )
    loop, start = loop
    loop.state = jax.tree.map(jnp.array, start)
    # Optax's AdamW raises a float to the power of an int.
    with jax.numpy_dtype_promotion("standard"):
        results = [loop.step(flatten(next(batches)), "a batch") for _ in range(20)]
    losses, norms, _ = zip(*results, strict=True)
    np.testing.assert_allclose(losses, run["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, run["grad_norms"], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.1
