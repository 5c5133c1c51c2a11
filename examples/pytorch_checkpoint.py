"""A PyTorch checkpoint in JAX, and back: your own model, in 4 bits on the way.

    python examples/pytorch_checkpoint.py

Needs torch. For Hugging Face's models, `jaxbnb.load_pretrained` and `jaxbnb convert` do
this without it.
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbnb
from jaxbnb.convert import load_state_dict

WIDTH, HIDDEN, CLASSES = 64, 256, 10


class Classifier(nnx.Module):
    """The Flax twin of the model in `torch_model`."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(self.norm(x))))


# torch's name, our path, and the change. A torch weight is (out, in), and a Flax kernel
# (in, out).
RULES = [
    (r"0\.weight", "norm.scale"),
    (r"0\.bias", "norm.bias"),
    (r"1\.weight", "up.kernel", np.transpose),
    (r"3\.weight", "down.kernel", np.transpose),
    (r"1\.bias", "up.bias"),
    (r"3\.bias", "down.bias"),
]


def torch_model(torch):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.LayerNorm(WIDTH),
        torch.nn.Linear(WIDTH, HIDDEN),
        torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN, CLASSES),
    )


def to_state_dict(model, torch):
    """Returns the weights of our model with torch's names and shapes."""
    state_dict = {}
    values = {".".join(path): x for path, x in nnx.to_flat_state(nnx.state(model))}
    for name, path, *transform in RULES:
        array = np.asarray(values[path][...])
        if transform:
            array = array.T
        state_dict[name.replace("\\", "")] = torch.tensor(array)
    return state_dict


def main():
    try:
        import torch
    except ImportError:
        print("This example needs torch, to have a model of PyTorch; nothing was done.")
        return
    theirs = torch_model(torch)
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    expected = theirs(torch.tensor(x)).detach().numpy()

    # A file as PyTorch users have it. jaxbnb reads it tensor by tensor.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pytorch_model.bin")
        torch.save(theirs.state_dict(), path)
        model = nnx.eval_shape(lambda: Classifier(nnx.Rngs(0)))
        report = load_state_dict(model, path, RULES)
    for name, target in report.mapped.items():
        print(f"{name:10} -> {target}")
    print(f"largest difference of outputs: {np.abs(model(x) - expected).max():.1e}")

    jaxbnb.nnx.quantize_model(model, "nf4")
    print(f"the same in 4 bits:            {np.abs(model(x) - expected).max():.1e}")

    # And back: what was quantised is decoded first.
    jaxbnb.nnx.dequantize_model(model, dtype=jnp.float32)
    back = torch_model(torch)
    back.load_state_dict(to_state_dict(model, torch))
    again = back(torch.tensor(x)).detach().numpy()
    print(
        f"torch, with our 4-bit weights: {np.abs(model(x) - again).max():.1e} from us"
    )


if __name__ == "__main__":
    main()
