"""Adapters over 4-bit layers in your own Flax models, Linen and NNX.

    python examples/flax_adapters.py [--quick]

In Linen, `QuantDense` takes the place of `nn.Dense`, and the adapter is two thin layers
of your own. In NNX, `quantize_model` and `add_adapter` change an existing model. The
frozen kernels belong to a network that computes something else.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxbnb
from jaxbnb.core import tree_nbytes

WIDTH, HIDDEN, RANK = 64, 256, 8


class AdaptedDense(nn.Module):
    """A frozen 4-bit kernel, plus a trained product of two thin matrices."""

    features: int

    @nn.compact
    def __call__(self, x):
        down = nn.Dense(RANK, use_bias=False)(x)
        up = nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.zeros)
        return jaxbnb.QuantDense(self.features, "nf4")(x) + up(down)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(AdaptedDense(HIDDEN)(x))
        return AdaptedDense(WIDTH)(x)


def train_linen(kernels, x, y, steps):
    model = LinenModel()
    variables = model.init(jax.random.key(1), x)
    # Kernels of a checkpoint replace the random ones.
    quantized = {
        f"AdaptedDense_{i}": {
            "QuantDense_0": {
                "kernel": jaxbnb.QuantConfig("nf4").quantize_kernel(kernel)
            }
        }
        for i, kernel in enumerate(kernels)
    }
    params, tx = variables["params"], jaxbnb.adamw8bit(1e-2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            variables = {"params": params, "quantized": quantized}
            return jnp.mean((model.apply(variables, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses, tree_nbytes(quantized), tree_nbytes(params)


def train_nnx(kernels, x, y, steps):
    first, last = [nnx.Linear(*kernel.shape, rngs=nnx.Rngs(1)) for kernel in kernels]
    first.kernel[...], last.kernel[...] = kernels
    model = nnx.Sequential(first, nnx.gelu, last)
    jaxbnb.nnx.quantize_model(model, "nf4")
    config = jaxbnb.lora.LoraConfig(r=RANK, lora_alpha=RANK)
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(model, jaxbnb.adamw8bit(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        adapters = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=adapters)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    frozen = nnx.state(model, jaxbnb.nnx.QuantParam)
    return losses, tree_nbytes(frozen), tree_nbytes(nnx.state(model, nnx.LoRAParam))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    steps = 30 if parser.parse_args().quick else 300
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    kernels = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, shapes, strict=False)
    ]
    # The new task: what the network computes, turned around and shifted.
    x = jax.random.normal(keys[2], (256, WIDTH))
    y = (jax.nn.gelu(x @ kernels[0]) @ kernels[1])[:, ::-1] + 0.5
    print(f"{'':8}first loss  last loss  4-bit, KiB  trained, KiB")
    for api, train in (("Linen", train_linen), ("NNX", train_nnx)):
        losses, frozen, trained = train(kernels, x, y, steps)
        print(f"{api:8}{losses[0]:10.4f}{losses[-1]:11.4f}", end="")
        print(f"{frozen / 2**10:12.1f}{trained / 2**10:14.1f}")


if __name__ == "__main__":
    main()
