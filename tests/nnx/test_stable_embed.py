"""StableEmbed of both Flax APIs, and the 32-bit optimizer state that it declares."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxbnb
from jaxbnb.optim import decode_state, encode_state

ROWS, FEATURES = 512, 64
TOKENS = jnp.array([[3, 5, 5, 511]])
OPTIMIZERS = {
    "adamw8bit": jaxbnb.adamw8bit(1e-2),
    "adamw4bit": jaxbnb.optim.adamw4bit(1e-2),
    "adamw_fp8": jaxbnb.optim.adamw_fp8(1e-2),
    "sgd8bit": jaxbnb.sgd8bit(1e-2, momentum=0.9),
    "in a chain": optax.chain(optax.clip_by_global_norm(1.0), jaxbnb.lion8bit(1e-2)),
    "per_parameter": jaxbnb.optim.per_parameter(
        jaxbnb.adamw8bit, [(r".*kernel", {"weight_decay": 0.0})], learning_rate=1e-2
    ),
    "paged": jaxbnb.paged_adamw8bit(1e-2),
}


@pytest.fixture(autouse=True)
def as_optax_expects():
    """Its schedules and bias corrections promote int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = jaxbnb.nnx.StableEmbed(ROWS, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, 128, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = jaxbnb.linen.StableEmbed(ROWS, FEATURES, name="embed")(tokens)
        return nn.Dense(128, name="head")(x)


def check_state(state, params):
    """32 bits for the embedding and few for the kernel, of nearly the same size."""
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if "embed" in name and leaf.size > 1:
            assert leaf.dtype in (jnp.float32, jnp.uint32), name
            assert leaf.size in (ROWS * FEATURES, FEATURES), name
    few = [x for x in jax.tree.leaves(state) if x.dtype.itemsize == 1]
    assert few
    assert all(x.size in (FEATURES * 128, FEATURES * 64) for x in few)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_by_itself_under_nnx_optimizer(make):
    model = Model()
    optimizer = nnx.Optimizer(model, make, wrt=nnx.Param)
    check_state(optimizer.opt_state, nnx.state(model))
    before = np.asarray(model.embed.embedding)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(TOKENS) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    check_state(optimizer.opt_state, nnx.state(model))
    moved = np.any(np.asarray(model.embed.embedding) != before, axis=-1)
    assert moved[[3, 5, 511]].all()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_by_itself_under_linen(make):
    model = LinenModel()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make)
    check_state(state.opt_state, params)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean(state.apply_fn({"params": params}, TOKENS) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    check_state(state.opt_state, params)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_the_moments_of_the_embedding_are_those_of_32_bits():
    def train(tx):
        model = Model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        # The head's gradients do not depend on its steps here.
        grads = nnx.grad(lambda m: jnp.mean(m.embed(TOKENS) ** 3))(model)
        for _ in range(5):
            optimizer.update(model, grads)
        return model.embed.embedding[...]

    got, want = train(jaxbnb.adamw8bit(1e-2)), train(optax.adamw(1e-2))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_a_rule_goes_before_what_a_layer_declares():
    params = nnx.state(Model(), nnx.Param)
    tx = jaxbnb.quantize_state(optax.adamw(1e-2), rules=[(["embedding"], {})])
    codes = tx.init(params).codes[0].mu
    assert codes["embed"]["embedding"][...].dtype == jnp.uint8


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "paged"])
def test_state_converts(name):
    model, tx = Model(), OPTIMIZERS[name]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    state = nnx.as_pure(optimizer.opt_state)
    wide = decode_state(tx, state, params)
    assert {x.dtype for x in jax.tree.leaves(wide) if x.ndim} == {jnp.dtype("float32")}
    back = encode_state(tx, wide, params)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_the_same_layer_in_both_apis():
    nnx_embed = jaxbnb.nnx.StableEmbed(ROWS, FEATURES, rngs=nnx.Rngs(0))
    linen_embed = jaxbnb.linen.StableEmbed(ROWS, FEATURES)
    params = linen_embed.init(jax.random.key(1), TOKENS)["params"]
    params = params | {
        "embedding": params["embedding"].replace_boxed(nnx_embed.embedding[...])
    }
    got = linen_embed.apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(got, nnx_embed(TOKENS))
    rows = np.asarray(nnx_embed.embedding[...], np.float64)[np.asarray(TOKENS)]
    mean, var = rows.mean(-1, keepdims=True), rows.var(-1, keepdims=True)
    np.testing.assert_allclose(got, (rows - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    bound = np.sqrt(6 / (ROWS + FEATURES))
    assert 0.99 * bound < np.abs(nnx_embed.embedding[...]).max() <= bound


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes_and_tying(dtype):
    embed = jaxbnb.nnx.StableEmbed(
        ROWS, FEATURES, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    y = embed(TOKENS)
    assert y.dtype == jnp.bfloat16
    assert embed.norm.scale.dtype == jnp.float32
    assert embed.attend(y).shape == (*TOKENS.shape, ROWS)


def test_boxes_in_a_stack_and_in_other_boxes():
    """Under nn.scan the box of a parameter gets an axis, and may hold another box."""
    init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init_boxed = jaxbnb.linen.with_state_bits(init)
            return nn.Dense(64, kernel_init=init_boxed)(x), None

    stack = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    x = jnp.ones((1, 64))
    params = stack.init(jax.random.key(0), x, None)["params"]
    box = params["Dense_0"]["kernel"]
    assert (box.state_bits, box.value.names) == (32, ("layers", "in", "out"))
    assert box.unbox().shape == (3, 64, 64)
    assert stack.apply({"params": params}, x, None)[0].shape == (1, 64)
    state = jaxbnb.adamw8bit(1e-3).init(params)
    assert nn.unbox(state[0].mu)["Dense_0"]["kernel"].dtype == jnp.float32


def test_other_bits_are_refused():
    params = {"w": jaxbnb.linen.StateBits(jnp.ones((64, 64)), state_bits=4)}
    for tx in (jaxbnb.adamw8bit(1e-3), jaxbnb.quantize_state(optax.adam(1e-3))):
        with pytest.raises(ValueError, match="declares state_bits=4"):
            tx.init(params)


@pytest.mark.peers
def test_beside_bitsandbytes():
    bnb, torch = pytest.importorskip("bitsandbytes"), pytest.importorskip("torch")
    theirs = bnb.nn.StableEmbedding(ROWS, FEATURES)
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.norm.bias)
    ours = jaxbnb.nnx.StableEmbed(ROWS, FEATURES, rngs=nnx.Rngs(0))
    ours.embedding[...] = jnp.asarray(theirs.weight.detach().numpy())
    ours.norm.scale[...] = jnp.asarray(theirs.norm.weight.detach().numpy())
    ours.norm.bias[...] = jnp.asarray(theirs.norm.bias.detach().numpy())
    want = theirs(torch.tensor(np.asarray(TOKENS)))
    torch.sum(want**3).backward()
    np.testing.assert_allclose(ours(TOKENS), want.detach().numpy(), atol=1e-5)
    grads = nnx.grad(lambda m: jnp.sum(m(TOKENS) ** 3))(ours)
    for got, like in (
        (grads.embedding, theirs.weight),
        (grads.norm.scale, theirs.norm.weight),
        (grads.norm.bias, theirs.norm.bias),
    ):
        scale = float(like.grad.abs().max())
        np.testing.assert_allclose(
            got[...], like.grad.numpy(), rtol=1e-4, atol=1e-5 * scale
        )
