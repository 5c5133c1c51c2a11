"""Models on explicit axes: the numbers of one device, and shardings stay."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.finetune import (
    compile_train_step,
    fit,
    next_token_loss,
    perplexity,
    split_trainable,
    train_step,
)
from jaxbnb.lora import LoraConfig, add_adapter, merge, unmerge
from jaxbnb.models import KVCache, generate, generate_stream
from jaxbnb.sharding import shard_model

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
ROWS = ("data", "fsdp")


def on_mesh(make, run, sizes):
    """The results on one device and on the mesh, of ``run(shard, put)``."""
    want = run(lambda model: model, lambda x, *_: x)
    mesh = make.mesh(AxisType.Explicit, **sizes)
    with jax.set_mesh(mesh):

        def shard(model):
            shard_model(model, mesh)
            assert is_explicit(model)
            return model

        def put(x, *leading):
            rows = tuple(name for name in ROWS if name in sizes)
            return jax.device_put(x, P(*leading, rows))

        got = run(shard, put)
    return got, want


def is_explicit(tree):
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return all(set(mesh.axis_types) == {AxisType.Explicit} for mesh in meshes)


def find_shardings(tree):
    return [jax.typeof(x).sharding for x in jax.tree.leaves(tree)]


def assert_close(got, want, atol=1e-4):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_step_of_ones_own(make, sizes):
    """Gradients, an 8-bit optimizer and a forward pass, in a program of the user."""
    tokens = make.tokens(8, 9)
    trained = nnx.DiffState(0, nnx.LoRAParam)

    def run(shard, put):
        model = shard(make.llama())
        # The codes of a moment may flip by one, 1.4 % of what a step moves.
        tx = jaxbnb.adamw8bit(1e-3, min_quantized_size=0)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, tokens):
            def find_loss(model):
                return next_token_loss(model, tokens)

            loss, grads = nnx.value_and_grad(find_loss, argnums=trained)(model)
            optimizer.update(model, grads)
            return loss, grads

        before = find_shardings(nnx.state((model, optimizer)))
        inputs = put(tokens)
        for _ in range(3):
            loss, grads = step(model, optimizer, inputs)
        assert find_shardings(nnx.state((model, optimizer))) == before
        state = nnx.state(model, nnx.LoRAParam)
        assert find_shardings(grads) == find_shardings(state)
        logits = jax.jit(lambda x: model(x))(inputs)
        spec = jax.typeof(logits).sharding.spec
        assert spec[:1] == jax.typeof(inputs).sharding.spec[:1]
        return loss, grads, state, logits, generate(model, tokens, 3)

    got, want = on_mesh(make, run, sizes)
    assert is_explicit(got)
    assert_close(got, want)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_train_step(make, is_compiled):
    """Two batches of rows make one step."""
    tokens = make.tokens(2, 8, 5)

    def run(shard, put):
        model = shard(make.llama(num_hidden_layers=1))
        graphdef, trainable, frozen = split_trainable(model)
        tx = jaxbnb.adamw8bit(1e-3, min_quantized_size=0)
        state, inputs = tx.init(trainable), put(tokens, None)
        before = find_shardings((trainable, state))
        step = jax.jit(train_step(graphdef, tx))
        if is_compiled:
            home = getattr(inputs, "sharding", None)
            step = compile_train_step(
                train_step(graphdef, tx),
                *(trainable, state, frozen, tokens.shape),
                batch_sharding=home,
            )
        for _ in range(2):
            trainable, state, loss = step(trainable, state, frozen, inputs)
        assert find_shardings((trainable, state)) == before
        return loss, trainable

    assert_close(*on_mesh(make, run, MESHES[0]))


def test_changes_of_a_model(make):
    tokens = make.tokens(8, 5)
    call = nnx.jit(lambda model, x: model(x))

    def run(shard, put):
        model, inputs = shard(make.llama(quant=None, rank=0)), put(tokens)
        is_on_mesh, logits = isinstance(inputs, jax.Array), []

        def note():
            logits.append(call(model, inputs))
            assert is_explicit(model) or not is_on_mesh

        jaxbnb.nnx.quantize_model(model, QuantConfig("nf4", block_size=32))
        note()
        lora = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
        add_adapter(model, lora, rngs=nnx.Rngs(1))
        note()
        merged = merge(model)
        note()
        unmerge(model, merged)
        note()
        # Dropout draws other numbers in each call.
        model.train()
        for _ in range(2):
            note()
        assert not np.allclose(*logits[-2:])
        return logits

    assert_close(*on_mesh(make, run, MESHES[0]))


def test_cache_and_fit(make):
    tokens = make.tokens(8, 5)

    def run(shard, put):
        model, inputs = shard(make.llama()), put(tokens)
        cache = KVCache.empty(model.config, 8, 6, np.float32)
        cache = jax.tree.map(lambda x: put(x, None) if x.ndim == 5 else x, cache)
        before = find_shardings(cache)
        logits, cache = jax.jit(lambda x, c: model(x, cache=c))(inputs, cache)
        assert find_shardings(cache) == before
        more, _ = model(put(tokens[:, :1]), cache=cache)
        losses = fit(model, jaxbnb.adamw8bit(1e-3), [tokens] * 2).losses
        assert is_explicit(model) or not isinstance(inputs, jax.Array)
        streamed = np.stack([*generate_stream(model, tokens, 2)])
        return logits, more, losses, perplexity(model, tokens), streamed

    assert_close(*on_mesh(make, run, MESHES[0]))
