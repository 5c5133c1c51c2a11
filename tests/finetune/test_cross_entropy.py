"""The losses of tokens in pieces of the vocabulary beside those of all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.finetune import _cross_entropy, next_token_loss
from jaxbnb.finetune._cross_entropy import token_losses
from jaxbnb.lora import LoraConfig, adapter_rows, add_adapter
from jaxbnb.models.head import cut_head
from jaxbnb.nnx import quantize_model

NESTED = jaxbnb.QuantConfig("nf4", block_size=16, double_quant=True)
# Parts of 7 and of 6 tokens: the last of three pieces overlaps the one before it by two
# tokens of a part, and of four pieces by two.
VOCAB = 7 * 16
ROWS, TOKENS = 8, 3 * 16


def make_head(
    make, *, tied=False, use_bias=False, quant=None, adapter=None, vocab_size=VOCAB
):
    model = make.llama(
        vocab_size=vocab_size,
        num_hidden_layers=1,
        tie_word_embeddings=tied,
        logit_softcap=3.0,
    )
    if use_bias:
        model.lm_head = nnx.Linear(32, vocab_size, rngs=nnx.Rngs(3))
    if quant is not None:
        name = "embed_tokens" if tied else "lm_head"
        quantize_model(model, rules=[([name], quant), (".*", None)])
    if adapter is not None:
        config = LoraConfig(r=4, target_modules=["lm_head"], **adapter)
        add_adapter(model, config, rngs=nnx.Rngs(1))
        lora_b = model.lm_head.adapters["default"].lora_b
        lora_b[...] = 0.1 * jax.random.normal(jax.random.key(2), lora_b.shape)
        for bias in model.lm_head.biases.values():
            bias[...] = jax.random.normal(jax.random.key(4), bias.shape)
    return model


HEADS = {
    "linear": {},
    "embedding": {"tied": True},
    "odd vocabulary": {"vocab_size": 113},
    "quantised": {"quant": NESTED, "adapter": {}},
    "quantised embedding": {"tied": True, "quant": "int8"},
    "llm_int8": {"quant": "llm_int8"},
    "dora": {"quant": "nf4", "adapter": {"use_dora": True}},
    "bias": {"use_bias": True, "adapter": {"bias": "all"}},
    "dropout": {"adapter": {"lora_dropout": 0.5}},
}


@pytest.fixture
def small(monkeypatch):
    """Chunks and pieces of a few rows and tokens; the rows of both are the same."""
    monkeypatch.setattr(_cross_entropy, "CHUNK", ROWS)
    monkeypatch.setattr(_cross_entropy, "PIECE", (ROWS, TOKENS))

    def choose(in_pieces):
        monkeypatch.setattr(_cross_entropy, "LOGITS", 0 if in_pieces else 2**30)

    return choose


def losses_and_gradients(model, hidden, targets, weights):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def weigh(params, hidden):
        # Copied, because dropout would count in the variables of the caller's model.
        model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, rest))
        model.train()
        losses = token_losses(model, hidden, targets)
        return jnp.vdot(losses, weights), losses

    function = jax.value_and_grad(weigh, argnums=(0, 1), has_aux=True)
    (_, losses), gradients = jax.jit(function)(params, hidden)
    return losses, gradients


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_pieces_are_the_whole(make, small, options):
    """Losses and gradients, of each kind of head, with a cap of the logits."""
    model = make_head(make, **options)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 7, 32)), jnp.float32)
    vocab_size = options.get("vocab_size", VOCAB)
    targets = jnp.asarray(rng.integers(0, vocab_size, (3, 7)), jnp.int32)
    # The first and the last token of the vocabulary are in the first and last piece.
    targets = targets.at[0, :2].set(jnp.asarray([0, vocab_size - 1]))
    weights = jnp.asarray(rng.standard_normal((3, 7)), jnp.float32)
    small(in_pieces=False)
    want = losses_and_gradients(model, hidden, targets, weights)
    small(in_pieces=True)
    head, _ = cut_head(model, TOKENS)
    assert head.num_pieces == 3
    got = losses_and_gradients(model, hidden, targets, weights)
    # Losses of about 5 and sums of 112 terms in another order: a few 2^-24 of 5.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    if "dropout" not in str(options):
        log_p = jax.nn.log_softmax(model.logits(hidden))
        exact = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(got[0], exact, rtol=1e-5)


def test_each_chunk_drops_others(make, small):
    """The same row in two chunks has two losses, and in one chunk with all dropped."""
    small(in_pieces=True)
    model = make_head(make, adapter={"lora_dropout": 0.5})
    hidden, targets = jnp.ones((1, 2 * ROWS, 32)), jnp.zeros((1, 2 * ROWS), jnp.int32)
    losses, _ = losses_and_gradients(model, hidden, targets, jnp.ones((1, 2 * ROWS)))
    assert len(np.unique(losses)) == 2 * ROWS


def test_a_token_outside_the_vocabulary(make, small):
    small(in_pieces=True)
    model = make_head(make)
    targets = jnp.asarray([[0, -1, VOCAB - 1, VOCAB, 2**31 - 1]], jnp.int32)
    losses = token_losses(model, jnp.ones((1, 5, 32)), targets)
    assert jnp.isnan(losses).tolist() == [[False, True, False, True, True]]


def test_heads_that_cannot_be_cut(make):
    assert cut_head(make.bigrams(), TOKENS) is None
    # Blocks of 16 tokens.
    rows = make_head(make)
    rows.lm_head = jaxbnb.nnx.QuantLinear.from_linear(
        rows.lm_head, jaxbnb.QuantConfig("int8", block_size=16)
    )
    kernel = rows.lm_head.kernel.get_value().dequantize()
    rows.lm_head.kernel = rows.lm_head.kernel.replace(
        jaxbnb.quantize(kernel, "int8", block_size=16, axis=-1)
    )
    assert cut_head(rows, TOKENS) is None
    custom = make_head(make)
    custom.lm_head.dot_general = lambda *args, **options: None
    assert cut_head(custom, TOKENS) is None
    by_row = make_head(make, adapter={})
    with adapter_rows(by_row, ["default"], jnp.zeros(1, jnp.int32)):
        assert cut_head(by_row, TOKENS) is None
    # Rows of tokens 3 and 100 that train.
    some = make_head(make)
    config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 100]}
    )
    add_adapter(some, config, rngs=nnx.Rngs(1))
    assert cut_head(some, TOKENS) is None
    own = make_head(make)
    own.logits = lambda hidden: hidden
    assert cut_head(own, TOKENS) is None


def sizes(jaxpr):
    """The sizes of all intermediate values, also inside loops."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from sizes(getattr(value, "jaxpr", value))


def is_jaxpr(x):
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def test_nothing_is_as_large_as_positions_times_vocabulary(make, small):
    """Neither a whole vocabulary of a chunk, nor all positions of a piece."""
    small(in_pieces=True)
    model, count = make_head(make, vocab_size=1024), 1024
    graphdef, params = nnx.split(model)

    def loss(params, hidden):
        targets = jnp.zeros((1, count), jnp.int32)
        return token_losses(nnx.merge(graphdef, params), hidden, targets).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(params, jnp.ones((1, count, 32))).jaxpr
    assert max(sizes(jaxpr)) == 32 * 1024 < count * TOKENS


def test_devices_that_divide_the_vocabulary_cut_their_own(make, small):
    """Nothing but sums goes from one to another, also where rows are divided too."""
    small(in_pieces=True)
    model, tokens = make_head(make), make.tokens(4, 16)
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)

    def place(path, x):
        names = P(None, "model") if "lm_head" in str(path) else P()
        return NamedSharding(mesh, names)

    graphdef, params = nnx.split(model)
    shardings = jax.tree.map_with_path(place, params)
    rows = NamedSharding(mesh, P("data"))

    def loss(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, rows),
        out_shardings=(None, shardings),
    )
    compiled = step.lower(params, tokens).compile()
    collectives = r" (all-\w+|collective-\w+|reduce-scatter)\("
    assert set(re.findall(collectives, compiled.as_text())) == {"all-reduce"}
    got = compiled(*jax.device_put((params, tokens), (shardings, rows)))
    small(in_pieces=False)
    want = jax.jit(jax.value_and_grad(loss))(params, tokens)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
