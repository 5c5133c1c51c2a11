"""Training in bfloat16 follows float32 with stochastic rounding, and not without.

With ``-s``, prints the losses of docs/finetune.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbnb
from jaxbnb.finetune import compile_train_step, split_trainable, train_step
from jaxbnb.optim import stochastic_rounding

STEPS, RATE, VOCAB = 200, 2e-4, 61


def make_batches():
    """Rows of a language in which two tokens follow each one."""
    generator = np.random.default_rng(0)
    follow = generator.integers(0, VOCAB, (VOCAB, 2))
    tokens = generator.integers(0, VOCAB, (STEPS + 1, 8, 1))
    for _ in range(24):
        last = tokens[..., -1]
        choice = generator.integers(0, 2, last.shape)
        tokens = np.concatenate([tokens, follow[last, choice][..., None]], axis=-1)
    return jnp.asarray(tokens, jnp.int32)


def train(model, tx, batches):
    """Returns the mean loss of the last 20 steps, each on new rows."""
    graphdef, params, rest = split_trainable(model, nnx.Param)
    state = tx.init(params)
    step = compile_train_step(
        train_step(graphdef, tx, remat=False),
        *(params, state, rest, batches.shape[1:]),
    )
    params, losses = jax.tree.map(jnp.copy, params), []
    for batch in batches:
        params, state, loss = step(params, state, rest, batch)
        losses.append(float(loss))
    return np.mean(losses[-20:])


def test_bfloat16_follows_float32(make):
    """All begin with the same weights, which both dtypes hold."""
    batches = make_batches()

    def weights(dtype):
        model = make.llama(compute_dtype=dtype)
        state = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16).astype(dtype), nnx.state(model, nnx.Param)
        )
        nnx.update(model, state)
        return model

    tx = jaxbnb.adamw8bit(RATE, min_quantized_size=0)
    with jax.numpy_dtype_promotion("standard"):  # For jax's own attention.
        want = train(weights(jnp.float32), tx, batches)
        nearest = train(weights(jnp.bfloat16), tx, batches)
        rounded = train(weights(jnp.bfloat16), stochastic_rounding(tx), batches)
    # A tenth of what rounding to nearest loses.
    print(f"float32 {want:.3f}, stochastic {rounded:.3f}, nearest {nearest:.3f}")
    assert abs(rounded - want) < 0.1 * (nearest - want)
