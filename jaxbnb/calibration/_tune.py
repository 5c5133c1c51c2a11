"""tune: changes the absmax of a quantised model, for its predictions as a whole."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from jaxbnb.calibration._batches import (
    Text,
    check_language_model,
    hidden_states,
    in_chunks,
    read_text,
)
from jaxbnb.calibration._linear_layers import linear_paths
from jaxbnb.calibration._matrix import Progress, put_like
from jaxbnb.core import QuantizedArray
from jaxbnb.lora import adapter_names
from jaxbnb.nnx import LayerStack, QuantLinear, surgery
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax, quantize_absmax

# As Adam's, but faster to forget the first gradients: there are only dozens of steps.
_B2 = 0.95
# The learning rate at the end, as a share of its peak.
_LAST = 0.02


class _Factor(nnx.Variable[Array]):
    """Logarithm of the factor of each absmax."""


class _Tuned(nnx.Module):
    """A quantised linear layer with a product that has a gradient by each absmax."""

    def __init__(self, linear: QuantLinear):
        self.linear = linear
        q = _decode_absmax(linear.kernel.get_raw_value())
        self.factor = _Factor(jnp.zeros(q.absmax.shape, jnp.float32))

    def __call__(
        self, inputs: Float[Array, "*batch fan_in"], out_sharding: Any = None
    ) -> Float[Array, "*batch fan_out"]:
        q = _decode_absmax(self.linear.kernel.get_raw_value())
        levels = dataclasses.replace(q, absmax=jnp.ones_like(q.absmax))
        scales = q.absmax * jnp.exp(self.factor[...])
        rows = jnp.repeat(scales.mT, q.block_size, axis=0)[: q.axis_size]
        x = inputs.astype(self.linear.dtype or inputs.dtype)
        kernel = levels.dequantize(jnp.float32) * rows
        y = jnp.matmul(x, kernel.astype(x.dtype), out_sharding=out_sharding)
        bias = self.linear.bias
        return y if bias is None else y + bias[...].astype(y.dtype)


def tune(
    model: nnx.Module,
    reference: nnx.Module,
    batches: Iterable[Any],
    *,
    steps: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Tunes the absmax of a quantised language model, in place.

    `calibrate` chooses codes layer by layer. Its errors add up, and this makes up for
    some of them: it minimises the Kullback-Leibler divergence of the model's next-token
    distribution from the reference's, by Adam on the logarithm of each absmax. The
    codes stay as they are, and the format too.

    A step needs the memory of a training step over one batch, besides both models and
    three float32 numbers for each absmax.

    Args:
        model: the quantised model, with ``model.model(tokens)`` and
            ``model.logits(hidden)``. Its ``jaxbnb.nnx.QuantLinear`` layers are tuned,
            except for those with several kernels, such as experts.
        reference: the model before it was quantised.
        batches: text as for `calibrate`; it may be the same text.
        steps: number of steps, of one batch each.
        learning_rate: highest learning rate. It rises during the first tenth of the
            steps, and then falls along a cosine.
        seed: seed of the order of the batches.
        progress: called as ``progress(done, steps, "tuning")``.

    Returns:
        The mean divergence in each batch, in nats, before its step.

    Raises:
        TypeError: one of the two is not a language model, or a batch does not hold
            integers.
        ValueError: there are no batches, ``steps`` is negative, the model has adapters,
            or no layer can be tuned.
        FloatingPointError: the divergence is not finite. The model is as before.

    Example:
        >>> import jax, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.calibration import tune
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> reference = CausalLM(config, rngs=nnx.Rngs(0))
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.nnx.quantize_model(model, "int4")
        >>> text = jax.random.randint(jax.random.key(0), (4, 32), 0, 64)
        >>> divergences = tune(model, reference, [text], steps=16)
        >>> divergences[-1] < divergences[0]
        True
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    for each in (model, reference):
        check_language_model(each)
    texts = read_text(batches, reference)
    if not texts:
        raise ValueError("tuning needs batches of text, and there are none")
    if adapter_names(model):
        raise ValueError("the model has adapters; tune it before they are added")
    paths = linear_paths(model, (QuantLinear,))
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no QuantLinear with a single kernel; quantise "
            "the model first"
        )
    working = nnx.merge(*nnx.split(model))
    surgery.replace_modules(
        working, lambda path, x: _Tuned(cast(Any, x)) if path in paths else None
    )
    for *_, module in surgery.iter_children(working):
        if isinstance(module, LayerStack):
            module.remat = True
    graphdef, factors, rest = nnx.split(working, _Factor, ...)
    reference_graphdef, reference_state = nnx.split(reference)
    tx = optax.adam(_make_schedule(steps, learning_rate), b2=_B2, eps=1e-12)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(factors, opt_state, rest, reference_state, batch):
        other = nnx.merge(reference_graphdef, reference_state)

        def loss(factors):
            return _divergence(nnx.merge(graphdef, factors, rest), other, batch)

        value, gradient = jax.value_and_grad(loss)(factors)
        # Optax takes powers of Python numbers and counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(gradient, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, value

    order = np.random.default_rng(seed).permutation(len(texts))
    opt_state, values = tx.init(factors), []
    for number in range(steps):
        batch = texts[order[number % len(texts)]]
        factors, opt_state, value = step(
            factors, opt_state, rest, reference_state, batch
        )
        values.append(float(value))
        if not np.isfinite(values[-1]):
            raise FloatingPointError(
                f"the divergence is {values[-1]} in step {number + 1}; do the models "
                "overflow, or is learning_rate too high?"
            )
        if progress is not None:
            progress(number + 1, steps, "tuning")
    nnx.update(working, factors)
    tuned: Any = {path: x for path, _, _, x in surgery.iter_children(working)}
    linears: Any = {path: x for path, _, _, x in surgery.iter_children(model)}
    for path in paths:
        q = linears[path].kernel.get_raw_value()
        new = _scale_absmax(q, jnp.exp(tuned[path].factor[...]))
        linears[path].kernel.set_raw_value(jax.tree.map(put_like, new, q))
    return values


def _make_schedule(steps: int, peak: float) -> optax.Schedule:
    warmup = max(1, steps // 10)

    def schedule(count):
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * count / max(steps, 1)))
        rise = jnp.minimum(1.0, (count + 1) / warmup)
        return peak * rise * (_LAST + (1 - _LAST) * cosine)

    return schedule


def _divergence(model: Any, reference: Any, batch: Text) -> Float32[Array, ""]:
    """Returns the mean divergence of the predictions after the tokens that count."""
    hidden = []
    for each in (model, reference):
        each.eval()
        hidden.append(hidden_states(each, batch).reshape(batch.tokens.size, -1))
    is_real = jnp.asarray(batch.is_real).reshape(-1)

    @jax.checkpoint
    def add(total, chunk):
        *rows, is_real = chunk
        log_p, log_q = (
            jax.nn.log_softmax(each.logits(x).astype(jnp.float32))
            for each, x in zip((model, reference), rows, strict=True)
        )
        divergence = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        return total + jnp.sum(jnp.where(is_real, divergence, 0.0)), None

    total, _ = jax.lax.scan(add, jnp.float32(0), in_chunks((*hidden, is_real)))
    return total / jnp.maximum(jnp.sum(is_real), 1).astype(jnp.float32)


def _decode_absmax(q: QuantizedArray) -> QuantizedArray:
    """Returns the same array, not doubly quantised."""
    if not q.double_quant:
        return q
    decode = _for_each_matrix(dequantize_absmax, q)
    absmax = decode(q.absmax, q.nested_absmax, q.offset)
    return dataclasses.replace(q, absmax=absmax, nested_absmax=None, offset=None)


def _scale_absmax(q: QuantizedArray, factor: Array) -> QuantizedArray:
    absmax = _decode_absmax(q).absmax * factor
    if not q.double_quant:
        return dataclasses.replace(q, absmax=absmax)
    codes, nested_absmax, offset = _for_each_matrix(quantize_absmax, q)(absmax)
    return dataclasses.replace(
        q, absmax=codes, nested_absmax=nested_absmax, offset=offset
    )


def _for_each_matrix(function: Callable[..., Any], q: QuantizedArray) -> Any:
    for _ in q.shape[:-2]:
        function = jax.vmap(function)
    return function
