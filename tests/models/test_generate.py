import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.models import KVCache, Llama, generate, generate_stream
from jaxbnb.models._rope import RopeScaling


def greedy_loop(toy, model, prompt, count):
    """Without a cache: the whole forward pass for each token.

    What is not yet known is filled with zeros, which causality hides.
    """
    seq = prompt.shape[1]
    tokens = jnp.pad(prompt, [(0, 0), (0, count)])
    for i in range(seq, seq + count):
        likeliest = jnp.argmax(toy.run(model, tokens)[:, i - 1], axis=-1)
        tokens = tokens.at[:, i].set(likeliest.astype(jnp.int32))
    return tokens[:, seq:]


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_greedy_is_the_argmax_loop(toy, quant):
    model = toy.model(seed=1)
    if quant:
        jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig(quant))
    tokens = toy.tokens(2, 5)
    got = generate(model, tokens, 8)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, greedy_loop(toy, model, tokens, 8))
    np.testing.assert_array_equal(generate(model, np.asarray(tokens), 1), got[:, :1])
    np.testing.assert_array_equal(model.generate(tokens, 8), got)


def test_left_padded_rows_continue_as_alone(toy, model):
    tokens = toy.tokens(3, 5)
    pads = np.array([0, 2, 4])
    mask = np.arange(5) >= pads[:, None]
    got = generate(model, jnp.where(mask, tokens, 0), 8, attention_mask=mask)
    for row, pad in enumerate(pads):
        alone = generate(model, tokens[row : row + 1, pad:], 8)
        np.testing.assert_array_equal(got[row], alone[0])


def test_sampling_is_reproducible_by_key(toy, model):
    tokens = toy.tokens(2, 5)

    def sample(seed):
        return generate(model, tokens, 8, temperature=1.0, key=jax.random.key(seed))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


def test_sampling_among_one_is_greedy(toy, model):
    tokens = toy.tokens(2, 5)
    greedy = generate(model, tokens, 8)
    options = {"temperature": 2.0, "key": jax.random.key(0)}
    np.testing.assert_array_equal(
        generate(model, tokens, 8, top_k=1, **options), greedy
    )
    top_p = generate(model, tokens, 8, top_p=1e-6, **options)
    np.testing.assert_array_equal(top_p, greedy)


def test_samples_follow_the_probabilities(toy, model):
    rows = 8000
    prompt = toy.tokens(1, 5)
    p = np.asarray(jax.nn.softmax(toy.run(model, prompt)[0, -1] / 1.5))
    likeliest = np.argsort(-p)

    def frequencies(**options):
        got = generate(
            model,
            jnp.repeat(prompt, rows, axis=0),
            1,
            temperature=1.5,
            key=jax.random.key(0),
            **options,
        )
        return np.bincount(np.asarray(got[:, 0]), minlength=p.size) / rows

    def check(got, allowed):
        want = np.where(np.isin(np.arange(p.size), allowed), p, 0)
        want = want / want.sum()
        assert (got[want == 0] == 0).all()
        # Five sigma of a binomial frequency.
        assert (abs(got - want) <= 5 * np.sqrt(want * (1 - want) / rows)).all()

    check(frequencies(), likeliest)
    check(frequencies(top_k=3), likeliest[:3])
    # The fewest that together reach one half.
    count = int(np.searchsorted(np.cumsum(p[likeliest]), 0.5)) + 1
    assert 1 < count < p.size
    check(frequencies(top_p=0.5), likeliest[:count])
    check(frequencies(top_k=2, top_p=0.999), likeliest[:2])


def test_rows_end_with_eos_and_then_padding(toy, model):
    tokens = toy.tokens(2, 5)
    free = np.asarray(generate(model, tokens, 8))
    eos = int(free[0, 2])
    first = [list(row).index(eos) if eos in row else 8 for row in free]
    assert first[0] <= 2
    got = generate(model, tokens, 8, eos_token_id=eos, pad_token_id=88)
    for row in range(2):
        end = first[row] + 1
        np.testing.assert_array_equal(got[row, :end], free[row, :end])
        assert (got[row, end:] == 88).all()
    # Several end a row; the first of them pads.
    other = next(t for t in range(88) if t not in free)
    several = generate(model, tokens, 8, eos_token_id=[other, eos])
    assert (several[0, first[0] + 1 :] == other).all()


def test_it_stops_once_all_rows_have_ended(toy, model, monkeypatch):
    # Counted as it runs: every step of the compiled loop reports itself.
    steps = []
    logits = Llama.logits

    def counted(self, hidden):
        jax.debug.callback(lambda: steps.append(1))
        return logits(self, hidden)

    monkeypatch.setattr(Llama, "logits", counted)
    tokens = toy.tokens(1, 5)
    free = generate(model, tokens, 12)
    jax.effects_barrier()
    assert len(steps) == 12
    steps.clear()
    end = free[0].tolist().index(free[0, 3])
    generate(model, tokens, 12, eos_token_id=int(free[0, 3])).block_until_ready()
    jax.effects_barrier()
    assert len(steps) == end + 1


def test_the_second_call_compiles_nothing(toy, monkeypatch):
    traces = []
    logits = Llama.logits

    def counted(self, hidden):
        traces.append(hidden.shape)
        return logits(self, hidden)

    monkeypatch.setattr(Llama, "logits", counted)
    # A shape that no other test uses.
    options = {"top_k": 5, "top_p": 0.9, "cache_dtype": jnp.bfloat16}
    for seed, temperature in ((0, 0.5), (1, 0.8)):
        model = toy.model(seed=seed, intermediate_size=100)
        tokens = toy.tokens(2, 5, seed=seed)
        key = jax.random.key(seed)
        generate(model, tokens, 4, temperature=temperature, key=key, **options)
        # Prefill and step.
        assert traces == [(2, 64)] * 2


def test_a_stream_yields_the_columns(toy, model):
    tokens = toy.tokens(2, 5)
    free = np.asarray(generate(model, tokens, 8))
    got = list(generate_stream(model, tokens, 8))
    np.testing.assert_array_equal(np.stack(got, axis=1), free)
    sampling = {"temperature": 1.5, "top_p": 0.9, "key": jax.random.key(3)}
    want = generate(model, tokens, 8, **sampling)
    got = list(generate_stream(model, tokens, 8, **sampling))
    np.testing.assert_array_equal(np.stack(got, axis=1), want)


def test_a_stream_ends_once_all_rows_have(toy, model):
    tokens = toy.tokens(1, 5)
    free = np.asarray(generate(model, tokens, 8))[0].tolist()
    end = free.index(free[2])
    got = list(generate_stream(model, tokens, 8, eos_token_id=free[2]))
    assert [int(token) for (token,) in got] == free[: end + 1]


def test_a_stream_refuses_at_once(toy, model):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate_stream(model, toy.tokens(1, 5), 0)


def test_an_int8_cache_reads_what_was_rounded(toy, model, monkeypatch):
    tokens = toy.tokens(2, 5)

    def logits(dtype):
        @jax.jit
        def read(first, second):
            cache = KVCache.empty(model.config, 2, 16, dtype)
            _, cache = model(first, cache=cache)
            return model(second, cache=cache)

        return read(tokens[:, :3], tokens[:, 3:])

    got, cache = logits(jnp.int8)
    # 16 codes and one absmax for each token, head and layer, of keys and of values.
    assert jaxbnb.core.tree_nbytes((cache.keys, cache.values)) == 2 * 3 * 2 * 16 * 2 * (
        16 + 4
    )
    exact, _ = logits(jnp.float32)
    write = KVCache.write

    def round_and_write(self, is_near, index, keys, values):
        rounded = (jaxbnb.quantize(x, "int8").dequantize() for x in (keys, values))
        return write(self, is_near, index, *rounded)

    monkeypatch.setattr(KVCache, "write", round_and_write)
    rounded, _ = logits(jnp.float32)
    # Only the order of sums differs.
    scale = abs(rounded).max()
    np.testing.assert_allclose(got, rounded, rtol=0, atol=1e-5 * scale)
    assert abs(got - exact).max() > 1e-4 * scale


def test_a_cache_of_integers_is_refused(model):
    with pytest.raises(TypeError, match=r"a floating dtype or int8.*got int32"):
        KVCache.empty(model.config, 1, 8, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_slots_behind_the_length_of_a_cache_are_empty(dtype, model):
    cache = KVCache.empty(model.config, 2, 4, dtype)
    ones = jax.tree.map(jnp.ones_like, (cache.keys, cache.values, cache.mask))
    cut = KVCache(*ones, length=jnp.int32(4)).cut(jnp.int32(2))
    assert cut.length == 2
    assert cut.mask.tolist() == 2 * [[True, True, False, False]]
    for leaf in jax.tree.leaves((cut.keys, cut.values)):
        assert jnp.all(leaf[:, :, :2] == 1)
        assert jnp.all(leaf[:, :, 2:] == 0)


def test_the_cache_may_be_of_another_dtype(toy, model):
    tokens = toy.tokens(2, 5)
    got = generate(model, tokens, 8, cache_dtype=jnp.bfloat16)
    assert (got == generate(model, tokens, 8)).mean() > 0.5


@pytest.fixture(scope="module")
def longrope(toy):
    """Makes a model for 12 positions, and with other frequencies for 64."""
    rope = RopeScaling(
        "longrope",
        original_max_position_embeddings=12,
        short_factor=tuple(1 + 0.1 * i for i in range(8)),
        long_factor=tuple(4.0 + i for i in range(8)),
    )
    return toy.model(rope_scaling=rope, rope_theta=100.0)


def test_longrope_goes_by_the_length_at_hand(toy, longrope):
    """Continues like the same text as a prompt, also from the 13th token on."""
    tokens = toy.tokens(2, 8)
    got = generate(longrope, tokens, 10)
    text = jnp.concatenate([tokens, got], axis=1)
    for i in range(10):
        # One shape, so one compilation.
        start = jnp.pad(text[:, : 8 + i], [(0, 0), (10 - i, 0)])
        mask = jnp.broadcast_to(jnp.arange(18) >= 10 - i, (2, 18))
        logits = toy.run(longrope, start, attention_mask=mask)[:, -1]
        np.testing.assert_array_equal(got[:, i], jnp.argmax(logits, axis=-1))
    # The number of tokens asked for does not matter.
    np.testing.assert_array_equal(generate(longrope, tokens, 5), got[:, :5])
    columns = generate_stream(longrope, tokens, 10)
    np.testing.assert_array_equal(np.stack([*columns], axis=1), got)


def test_padding_is_no_length(toy, longrope):
    """All rows may be padded, and one row may cross the limit before another."""
    tokens = toy.tokens(2, 8)
    alone = generate(longrope, tokens, 10)
    mask = np.arange(13) >= 5
    padded = jnp.pad(tokens, [(0, 0), (5, 0)])
    both = np.stack([mask, mask])
    got = generate(longrope, padded, 10, attention_mask=both)
    np.testing.assert_array_equal(got, alone)
    # The longest row decides, as in transformers: it is as if alone.
    ragged = np.stack([np.arange(8) >= 0, np.arange(8) >= 3])
    got = generate(longrope, tokens, 10, attention_mask=ragged)
    np.testing.assert_array_equal(got[0], alone[0])


@pytest.mark.parametrize("ids", [2.0, "2", [2.5], True, [[2]], ["2"], 10**30])
@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_tokens_are_ints(toy, model, name, ids):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        generate(model, toy.tokens(2, 5), 4, **{name: ids})


def test_no_token_ends_a_row(toy, model):
    tokens = toy.tokens(2, 5)
    want = generate(model, tokens, 8)
    for none in ([], (), np.zeros(0, int)):
        np.testing.assert_array_equal(
            generate(model, tokens, 8, eos_token_id=none), want
        )


def test_a_token_of_a_larger_vocabulary_ends_nothing(toy, model):
    """Other tokens next to it still do."""
    tokens = toy.tokens(1, 5)
    eos = int(generate(model, tokens, 8)[0, 2])
    want = generate(model, tokens, 8, eos_token_id=eos)
    got = generate(model, tokens, 8, eos_token_id=[10**6, eos])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"eos_token_id": -1}, r"\(-1,\) is not in the vocabulary, 0 to 88"),
        ({"eos_token_id": [89, 2**40]}, "is not in the vocabulary"),
        ({"pad_token_id": 2**31}, "pad_token_id must fit in int32"),
        ({"max_new_tokens": 60}, "65 tokens; this model takes 1 to 64"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": 1.0}, r"needs key=jax.random.key\(seed\)"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be from 1 to .*89, got 0"),
        ({"temperature": 1.0, "top_k": 90}, "top_k must be from 1 to .*89, got 90"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 0.5}, "temperature 0 does not sample"),
        ({"token_ids": jnp.zeros(3, jnp.int32)}, r"\(3,\); .* token_ids\[None\]"),
        ({"token_ids": jnp.zeros((1, 0), jnp.int32)}, r"empty, of shape \(1, 0\)"),
        ({"token_ids": [[1, 2], [3]]}, "differ in length, 1 to 2. Pad them on"),
        ({"token_ids": jnp.full((1, 2), 89)}, "token 89 of row 0, .* and 1 more are"),
        ({"token_ids": [[1, -1]]}, "token -1 of row 0, position 1, is outside"),
        ({"token_ids": np.array([[2**32 + 1]])}, "token 4294967297 of row 0"),
        (
            {"token_ids": [[-100, 1]], "attention_mask": np.array([[False, True]])},
            "token -100 .* Padding needs a token in the vocabulary too",
        ),
        ({"attention_mask": jnp.ones((2, 4), bool)}, r"\(2, 5\); got \(2, 4\)"),
        (
            {"attention_mask": np.arange(5) < [[5], [3]]},
            r"padding in rows \[1\], and .*; pad on the left",
        ),
    ],
)
def test_bad_arguments(toy, model, options, message):
    arguments = {"token_ids": toy.tokens(2, 5), "max_new_tokens": 4} | options
    for run in (generate, generate_stream):
        with pytest.raises(ValueError, match=message):
            run(model, **arguments)


@pytest.mark.parametrize("kind", ["float32", "bool"])
def test_prompts_of_other_types(toy, model, kind):
    for run in (generate, generate_stream):
        with pytest.raises(TypeError, match=f"token_ids are of type {kind}"):
            run(model, toy.tokens(2, 5).astype(kind), 4)


@pytest.mark.parametrize("kind", ["uint8", "int64"])
def test_prompts_of_any_integers(toy, model, kind):
    """Also under the caller's jit, where the values are unknown."""
    tokens = toy.tokens(2, 5)
    want = generate(model, tokens, 1)
    np.testing.assert_array_equal(generate(model, np.asarray(tokens, kind), 1), want)
    np.testing.assert_array_equal(generate(model, np.asarray(tokens).tolist(), 1), want)
    if kind == "uint8":
        got = jax.jit(lambda x: generate(model, x, 1))(tokens.astype(kind))
        np.testing.assert_array_equal(got, want)


def test_dropout_is_for_training_only(toy):
    """A model that is being trained generates what it would in evaluation."""
    model = toy.model()
    config = jaxbnb.lora.LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["up_proj"], init_lora_weights=False
    )
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    model.train()
    before = jax.tree.leaves(nnx.state(model, nnx.RngCount))
    got = generate(model, jnp.array([[3, 1, 4]]), 4)
    model.eval()
    np.testing.assert_array_equal(got, generate(model, jnp.array([[3, 1, 4]]), 4))
    assert_same = np.testing.assert_array_equal
    jax.tree.map(assert_same, before, jax.tree.leaves(nnx.state(model, nnx.RngCount)))
