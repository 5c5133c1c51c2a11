"""8-bit Adam in an Optax pipeline, with Linen's TrainState and nnx.Optimizer.

    python examples/optax_pipeline.py [--quick]

The pipeline clips, follows a schedule, steps matrices with 8-bit AdamW and everything
else with SGD, and decays only what a mask selects. Both Flax APIs take it as it is.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

import jaxbnb
from jaxbnb.core import tree_nbytes

WIDTH, HIDDEN = 32, 512


def make_optimizer(steps, adamw=jaxbnb.adamw8bit):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)

    def kinds(params):
        return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", params)

    def is_hidden(params):
        # The kernels of the hidden layers decay, and that of the last one does not.
        return jax.tree.map(lambda x: x.shape[-1] == HIDDEN, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "matrix": adamw(schedule, weight_decay=1e-3, mask=is_hidden),
                "rest": optax.sgd(schedule, momentum=0.9),
            },
            kinds,
        ),
    )


def make_data(key):
    """Returns inputs, and what a random network makes of them."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (256, WIDTH))
    hidden = jnp.sin(x @ jax.random.normal(keys[1], (WIDTH, WIDTH)))
    return x, hidden @ jax.random.normal(keys[2], (WIDTH, WIDTH)) / WIDTH**0.5


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(HIDDEN)(x))
        x = nn.gelu(nn.Dense(HIDDEN)(x))
        return nn.Dense(WIDTH)(x)


def train_linen(tx, x, y, steps):
    model = LinenModel()
    variables = model.init(jax.random.key(1), x)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    return losses, tree_nbytes(state.opt_state)


def train_nnx(tx, x, y, steps):
    rngs = nnx.Rngs(1)
    sizes = [(WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, WIDTH)]
    first, second, last = [nnx.Linear(*size, rngs=rngs) for size in sizes]
    model = nnx.Sequential(first, nnx.gelu, second, nnx.gelu, last)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, tree_nbytes(nnx.state(optimizer.opt_state))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    steps = 30 if parser.parse_args().quick else 300
    x, y = make_data(jax.random.key(0))
    print(f"{'':24}first loss  last loss  state, KiB")
    for api, train in (
        ("Linen, TrainState", train_linen),
        ("nnx.Optimizer", train_nnx),
    ):
        for name, adamw in (("32 bits", optax.adamw), ("8 bits", jaxbnb.adamw8bit)):
            losses, size = train(make_optimizer(steps, adamw), x, y, steps)
            print(f"{api:18}{name:>8}", end="")
            print(f"{losses[0]:10.2g}{losses[-1]:11.2g}{size / 2**10:12.0f}")


if __name__ == "__main__":
    main()
