import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.models import KVCache, Llama, LlamaConfig
from jaxbnb.models._layer import in_float32
from jaxbnb.models._rope import rope_angles, rotate

# Float32 sums in another order: some ulps of logits of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_shapes_and_names(toy, changes):
    model = toy.model(**changes)
    logits = toy.run(model, toy.tokens(2, 8))
    assert logits.shape == (2, 8, 89)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    assert (model.lm_head is None) == model.config.tie_word_embeddings
    paths = {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(model))}
    layer = "model.layers.layer"
    assert f"{layer}.self_attn.q_proj.kernel" in paths
    assert f"{layer}.input_layernorm.scale" in paths
    assert (f"{layer}.mlp.down_proj.bias" in paths) == model.config.mlp_bias
    assert {"model.embed_tokens.embedding", "model.norm.scale"} < paths


def test_initialisation(toy):
    config = LlamaConfig(**toy.fields)
    model = Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = model.model.layers.layer.mlp.up_proj.kernel[...].astype(jnp.float32)
    # Each layer its own, of a spread that keeps activations of order 1.
    assert (kernel[0] != kernel[1]).mean() > 0.9
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 64**-0.5, rtol=0.1)
    state = nnx.state(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    assert toy.run(model, toy.tokens(2, 8)).std() < 3


def test_a_later_token_changes_no_earlier_logits(toy, model):
    tokens = toy.tokens(2, 8)
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 89)
    before, after = toy.run(model, tokens), toy.run(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_the_order_of_tokens_matters(toy, model):
    # Attention without rope would not see it.
    tokens = jnp.arange(8) + jnp.zeros((2, 1), jnp.int32)
    tokens = tokens.at[1, :2].set(jnp.array([1, 0]))
    logits = toy.run(model, tokens)[:, -1]
    assert abs(logits[0] - logits[1]).max() > 1e-3


def test_the_whole_is_head_of_hidden(toy, model):
    @nnx.jit
    def parts(model, tokens):
        hidden = model.model(tokens)
        return hidden, model.logits(hidden), model.logits(hidden[:, -1])

    hidden, logits, last = parts(model, toy.tokens(2, 8))
    assert hidden.shape == (2, 8, 64)
    want = toy.run(model, toy.tokens(2, 8))
    np.testing.assert_allclose(logits, want, **CLOSE)
    np.testing.assert_allclose(last, want[:, -1], **CLOSE)


@pytest.mark.parametrize("splits", [[1] * 8, [8], [6, 1, 1]])
def test_with_a_cache_step_by_step(toy, model, splits):
    tokens = toy.tokens(2, 8)
    cache = KVCache.empty(model.config, 2, max_length=11)
    logits, start = [], 0
    for size in splits:
        step, cache = toy.run(model, tokens[:, start : start + size], cache=cache)
        logits.append(step)
        start += size
    assert int(cache.length) == 8
    assert not cache.keys[:, :, 8:].any()
    np.testing.assert_allclose(
        jnp.concatenate(logits, axis=1), toy.run(model, tokens), **CLOSE
    )


@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padding_changes_nothing(toy, model, use_cache):
    tokens, pads = toy.tokens(2, 5), 3
    padded = jnp.concatenate([jnp.zeros((2, pads), jnp.int32), tokens], axis=1)
    # Only the first row is padded: its padding is attended to by nobody.
    mask = jnp.ones((2, 8), bool).at[0, :pads].set(False)
    if use_cache:
        cache = KVCache.empty(model.config, 2, max_length=11)
        first, cache = toy.run(
            model, padded[:, :6], attention_mask=mask[:, :6], cache=cache
        )
        second, _ = toy.run(model, padded[:, 6:], cache=cache)
        got = jnp.concatenate([first, second], axis=1)
    else:
        got = toy.run(model, padded, attention_mask=mask)
    np.testing.assert_allclose(got[0, pads:], toy.run(model, tokens[:1])[0], **CLOSE)
    np.testing.assert_allclose(got[1], toy.run(model, padded)[1], **CLOSE)
    assert jnp.isfinite(got).all()


def test_the_cache_is_updated_in_place(toy, model):
    graphdef, state = nnx.split(model)

    def step(cache, state, token):
        return nnx.merge(graphdef, state)(token, cache=cache)

    cache = KVCache.empty(model.config, 1, max_length=64)
    step = jax.jit(step, donate_argnums=0).lower(cache, state, toy.tokens(1, 1))
    memory = step.compile().memory_analysis()
    both = cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes >= both
    # One layer's weights and slots are copied out of the stack, the stack never is.
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(state["model"]["layers"])) / 3
    assert memory.temp_size_in_bytes < layer + both


def test_remat_gives_the_same_gradients_with_less_memory(toy):
    model = toy.model(num_hidden_layers=8)
    graphdef, state = nnx.split(model)
    tokens = toy.tokens(2, 32)

    def loss(state, remat):
        logits = nnx.merge(graphdef, state)(tokens[:, :-1], remat=remat)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    grads, temps = [], []
    for remat in (False, True):
        grad = jax.jit(jax.grad(lambda state, remat=remat: loss(state, remat)))
        compiled = grad.lower(state).compile()
        grads.append(compiled(state))
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temps[1] < temps[0] / 2
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
        assert jnp.abs(a).max() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_computing_in_bfloat16(toy, tied):
    tokens = toy.tokens(2, 8)
    want = toy.run(toy.model(tie_word_embeddings=tied), tokens)
    half = toy.model(dtype=jnp.bfloat16, tie_word_embeddings=tied)
    assert jax.eval_shape(half.model, tokens).dtype == jnp.bfloat16
    logits = toy.run(half, tokens)
    assert logits.dtype == jnp.float32
    # The head accumulates in float32 and nothing rounds its result.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
    # Some 20 roundings of 2^-9 each, of logits with this spread.
    assert jnp.abs(logits - want).max() < 20 * 2**-9 * want.std() * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tied_embedding_may_be_quantised(toy, dtype):
    """The same as of a model that has its decoded rows."""
    model = toy.model(dtype=dtype, tie_word_embeddings=True)
    rules = [(["embed_tokens"], jaxbnb.QuantConfig("nf4")), (".*", None)]
    assert jaxbnb.nnx.quantize_model(model, rules=rules) == ["model.embed_tokens"]
    tokens = toy.tokens(2, 8)
    logits = toy.run(model, tokens)
    jaxbnb.nnx.dequantize_model(model)
    want = toy.run(model, tokens)
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, 8, 89))
    if dtype == jnp.float32:
        np.testing.assert_allclose(logits, want, **CLOSE)
    else:
        # Rounded alike, but for sums in another order.
        assert jnp.abs(logits - want).max() < 20 * 2**-9 * want.std() * 3
        assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_linear_layers_may_be_replaced(toy, model, quant_type):
    quantised = toy.model()
    names = jaxbnb.nnx.quantize_model(quantised, jaxbnb.QuantConfig(quant_type))
    assert len(names) == 7
    tokens = toy.tokens(2, 8)
    got, want = toy.run(quantised, tokens), toy.run(model, tokens)
    error = jnp.abs(got - want).mean() / want.std()
    assert 0 < error < {"int8": 0.02, "nf4": 0.3}[quant_type]
    cache = KVCache.empty(model.config, 2, max_length=11)
    cached, _ = toy.run(quantised, tokens, cache=cache)
    np.testing.assert_allclose(cached, got, **CLOSE)
    # Norms, embedding and head are what there is left to train.
    trained = {
        path[-1] for path, _ in nnx.to_flat_state(nnx.state(quantised, nnx.Param))
    }
    assert trained == {"scale", "embedding", "kernel"}


def test_rope_rotates_halves_by_position_times_frequency():
    cos, sin = rope_angles(jnp.array([[0, 3]]), 4, 100.0)
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4).repeat(2, axis=1)
    turned = [(1 + 3j) * np.exp(3j), (2 + 4j) * np.exp(3j / 10)]
    want = [turned[0].real, turned[1].real, turned[0].imag, turned[1].imag]
    got = rotate(x, cos, sin)[0, :, 0]
    np.testing.assert_array_equal(got[0], x[0, 0, 0])
    np.testing.assert_allclose(got[1], want, rtol=1e-5)
    # An angle in the thousands needs more than 8 bits of mantissa.
    half = rotate(x.astype(jnp.bfloat16), cos, sin)
    np.testing.assert_array_equal(half, rotate(x, cos, sin).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_in_16_bits_are_rounded_once(dtype):
    """So are their gradients, for which only the arrays are kept."""
    gate, up, d_y = (
        jnp.asarray(np.random.default_rng(i).normal(size=(7, 9)), dtype)
        for i in range(3)
    )
    y, pull_back = jax.vjp(
        lambda gate, up: in_float32(lambda a, b: jax.nn.silu(a) * b, gate, up), gate, up
    )
    got = y, *pull_back(d_y)
    gate, up, d_y = (np.asarray(x, np.float64) for x in (gate, up, d_y))
    share = 1 / (1 + np.exp(-gate))
    slope = share * (1 + gate * (1 - share))
    want = gate * share * up, d_y * up * slope, d_y * gate * share
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        # Half a unit, and some operations in float32; small numbers cancel in slope.
        limit = jnp.finfo(dtype).eps / 2 * 1.01 * np.abs(b) + 2e-6
        assert np.all(np.abs(np.asarray(a, np.float64) - b) <= limit)
    kept = jax.tree.leaves(pull_back)
    assert [x.dtype for x in kept if x.ndim] == [dtype, dtype]


def test_too_many_tokens(toy, model):
    with pytest.raises(ValueError, match="65 tokens; this model takes 1 to 64"):
        model(toy.tokens(1, 65))
    with pytest.raises(ValueError, match="65 tokens; this model takes 1 to 64"):
        KVCache.empty(model.config, 1, max_length=65)
    cache = KVCache.empty(model.config, 1, max_length=4).advance(3)
    with pytest.raises(
        ValueError, match=r"max_length 4 with 3 tokens.* room for 2 more"
    ):
        model(toy.tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="token_ids have 2 rows, the KVCache 1"):
        model(toy.tokens(2, 1), cache=cache)


def test_a_mask_of_another_shape(toy, model):
    with pytest.raises(ValueError, match=r"token_ids, \(2, 4\); got \(2, 5\)"):
        model(toy.tokens(2, 4), attention_mask=jnp.ones((2, 5), bool))
