"""Packed examples have the loss and the gradient that they have alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.data import Batches, Encoder, load_dataset
from jaxbnb.finetune import next_token_loss
from jaxbnb.models import Llama, LlamaConfig

SEQ = 32
ROWS = [
    {"text": "Four score and seven years ago our fathers brought forth the answer"},
    {"prompt": "the answer", "completion": " is yes"},
    {"text": "our fathers"},
    {"prompt": "seven", "completion": " years"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
]


def test_packed_is_unpacked(load):
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    # Without the initializers, which take longest to compile.
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.25 * rng.standard_normal(x.shape), x.dtype), shapes
    )

    @jax.jit
    @jax.value_and_grad
    def total_loss(params, tokens, mask, segment_ids, targets):
        model = nnx.merge(graphdef, params)
        mean = next_token_loss(model, tokens, mask=mask, segment_ids=segment_ids)
        return mean * targets

    def run(packing):
        batches = Batches(
            load_dataset(ROWS),
            Encoder(load()),
            batch_size=2,
            seq_length=SEQ,
            packing=packing,
            epochs=1,
        )
        total, grads = 0.0, jax.tree.map(np.zeros_like, params)
        for batch in batches:
            tokens, mask, segment_ids = (x[0] for x in batch[:3])
            targets = np.float32(mask.sum())
            loss, grad = total_loss(params, tokens, mask, segment_ids, targets)
            total, grads = total + loss, jax.tree.map(np.add, grads, grad)
        count = batches.statistics.targets
        return (
            batches.statistics,
            total / count,
            jax.tree.map(lambda g: g / count, grads),
        )

    packed, packed_loss, packed_grads = run(packing=True)
    alone, alone_loss, alone_grads = run(packing=False)
    assert packed.targets == alone.targets
    assert packed.windows < alone.windows
    # Sums of 60 targets and of 32 keys in another order: about 100 roundings of 2^-24.
    np.testing.assert_allclose(packed_loss, alone_loss, rtol=6e-6)
    for got, want in zip(
        jax.tree.leaves(packed_grads), jax.tree.leaves(alone_grads), strict=True
    ):
        scale = float(jnp.abs(want).max())
        assert scale > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=6e-6 * scale)
