"""A step of each optimizer on 16.8 million float32 parameters, and bytes of state."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxbnb import optim
from jaxbnb.benchmarks._data import SMOLLM2
from jaxbnb.benchmarks._figure import Figure, is_installed
from jaxbnb.benchmarks._timing import milliseconds, ratio, time_together
from jaxbnb.core import tree_nbytes
from jaxbnb.models import Llama

SHAPE = (4096, 4096)
# jaxbnb's optimizer, Optax's, and the name of bitsandbytes'.
FAMILIES: dict[str, tuple[Callable, Callable, str | None]] = {
    "adamw8bit": (optim.adamw8bit, optax.adamw, "AdamW8bit"),
    "lion8bit": (optim.lion8bit, optax.lion, "Lion8bit"),
    "sgd8bit": (optim.sgd8bit, lambda lr: optax.sgd(lr, 0.9), "SGD8bit"),
    "rmsprop8bit": (optim.rmsprop8bit, optax.rmsprop, "RMSprop8bit"),
    "adagrad8bit": (optim.adagrad8bit, optax.adagrad, "Adagrad8bit"),
    "ademamix8bit": (optim.ademamix8bit, optax.contrib.ademamix, "AdEMAMix8bit"),
    "lamb8bit": (optim.lamb8bit, optax.lamb, None),
    "lars8bit": (optim.lars8bit, optax.lars, None),
}
# Limits of the time of `fused_step` and of `update` relative to Optax's.
LIMITS = {"adamw8bit": (0.9, 1.3)}


def bench_optim() -> Iterator[Figure]:
    """Compares each optimizer with Optax's 32-bit and bitsandbytes' 8-bit one."""
    for name, (make, make_32bit, theirs) in FAMILIES.items():
        functions: dict[str, Callable[[], Any]] = {
            "fused": make_stepper(make(1e-3), optim.fused_step),
            "update": make_stepper(make(1e-3), update_and_apply),
            "optax": make_stepper(make_32bit(1e-3), update_and_apply),
        }
        if theirs is not None and is_installed("torch", "bitsandbytes"):
            functions["bitsandbytes"] = make_bitsandbytes(theirs)
        times = time_together(functions, rounds=9)
        detail = ", ".join(f"{key} {milliseconds(t)}" for key, t in times.items())
        fused, plain = f"{name} fused_step", f"{name} update"
        fused_limit, plain_limit = LIMITS.get(name, (1.0, 2.0))
        value = ratio(times["fused"], times["optax"])
        yield Figure(fused, value, "x Optax's time", fused_limit, detail)
        value = ratio(times["update"], times["optax"])
        yield Figure(plain, value, "x Optax's time", plain_limit, detail)
        if "bitsandbytes" in times:
            value = ratio(times["update"], times["bitsandbytes"])
            yield Figure(plain, value, "x bitsandbytes' time", 0.5, detail)
    yield from _measure_state()


def _measure_state() -> Iterator[Figure]:
    """Measures the bytes of state for whole models, including small parameters."""
    makers = {"adamw8bit": 2.1, "lion8bit": 1.05, "ademamix8bit": 3.15}
    models = {"Llama": _make_llama(), "ViT": _make_vit(), "ResNet": _make_resnet()}
    for model, params in models.items():
        size = sum(p.size for p in jax.tree.leaves(params))
        for name, limit in makers.items():
            state = jax.eval_shape(FAMILIES[name][0](1e-3).init, params)
            value = tree_nbytes(state) / size
            unit = "bytes a parameter"
            yield Figure(f"{name} state, {model}", value, unit, limit)


def update_and_apply(tx: optax.GradientTransformation) -> Callable:
    """Makes the step that people chain, for `make_stepper`."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def make_stepper(
    tx: optax.GradientTransformation,
    make_step: Callable,
    shape: tuple[int, ...] = SHAPE,
) -> Callable[[], jax.Array]:
    """Returns a function that takes one step at each call.

    Parameters and state are donated; the gradient is kept.
    """
    params = jax.random.normal(jax.random.key(0), shape)
    grads = 0.1 * jax.random.normal(jax.random.key(1), shape)
    state = tx.init(params)
    full_step = make_step(tx)
    # The arguments are in the order of the results, because JAX matches donated buffers
    # of equal shape by position. A parameter in place of a moment makes XLA copy both.
    step = jax.jit(lambda p, s, g: full_step(g, s, p), donate_argnums=(0, 1))

    def call():
        nonlocal params, state
        params, state = step(params, state, grads)
        return params

    return call


def make_bitsandbytes(name: str, shape: tuple[int, ...] = SHAPE) -> Callable[[], None]:
    """Returns a function that takes one step of bitsandbytes' optimizer."""
    import bitsandbytes
    import torch

    param = torch.nn.Parameter(torch.randn(shape))
    param.grad = 0.1 * torch.randn(shape)
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    return getattr(bitsandbytes.optim, name)([param], lr=1e-3, **options).step


def _make_llama() -> Any:
    """Returns the parameters of SmolLM2-135M."""
    return nnx.eval_shape(
        lambda: nnx.state(Llama(SMOLLM2, rngs=nnx.Rngs(0)), nnx.Param)
    )


def _make_vit() -> Any:
    """Returns the parameters of ViT-B/16.

    References:
        Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """
    d, mlp = 768, 3072
    block = {
        "attention": [(d, 12, 64)] * 3 + [(12, 64, d)],
        "attention_bias": [(12, 64)] * 3 + [(d,)],
        "mlp": [(d, mlp), (mlp,), (mlp, d), (d,)],
        "norm": [(d,)] * 4,
    }
    shapes = {
        "patches": (16, 16, 3, d),
        "positions": (1, 197, d),
        "blocks": [block] * 12,
        "head": [(d, 1000), (1000,)],
    }
    return _make_arrays(shapes)


def _make_resnet() -> Any:
    """Returns the parameters of ResNet-50.

    References:
        He et al., Deep Residual Learning for Image Recognition, 2015.
    """
    shapes: dict[str, Any] = {"stem": [(7, 7, 3, 64), (64,), (64,)]}
    features = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            kernels = [(1, 1, features, width), (3, 3, width, width)]
            kernels += [(1, 1, width, 4 * width)]
            if block == 0:
                kernels += [(1, 1, features, 4 * width)]
            norms = [(k[-1],) for k in kernels for _ in range(2)]
            shapes[f"stage{stage}_block{block}"] = kernels + norms
            features = 4 * width
    return _make_arrays(shapes | {"head": [(features, 1000), (1000,)]})


def _make_arrays(shapes: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
