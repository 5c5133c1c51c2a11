"""Attention in blocks against all scores at once, and what a model sees of a text."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbnb_kernels
from jaxbnb.finetune import next_token_loss
from jaxbnb.models import KVCache, _blocks, _layer, attention
from jaxbnb.models.attention import Sight, attend, attend_slots
from jaxbnb.nnx import Remat
from jaxbnb_kernels import native

BLOCK = 8
HEADS, KV_HEADS, DIM = 4, 2, 8


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def assert_close(got, want, limit=1e-5):
    """Sums of up to 40 products in another order, each off by a few 2^-24."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Products are of order 1, even where their sum is 0.
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * scale)


def naive(q, k, v, sees, scale, softcap, bias=None, sinks=None):
    """The definition, in NumPy and float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + np.asarray(bias)[:, :, None]
    scores = np.where(sees[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64)[:, None, None]
        # A row that sees nothing would overflow.
        above = np.minimum(sinks - scores.max(axis=-1, keepdims=True), 100)
        total = total + np.exp(above)
    weights /= total
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def slopes(seq):
    """A bias of each head and key, of order 1, for two rows."""
    return jnp.float32(np.arange(seq) % 7 * np.array([[[0.5], [-0.2], [0.1], [0.3]]]))


def seen(seq, window=None, is_real=None, segment_ids=None, bias=None):
    del bias
    i, j = np.arange(seq)[:, None], np.arange(seq)[None]
    sees = np.broadcast_to(j <= i, (2, seq, seq)).copy()
    if window is not None:
        sees &= i - j < window
    if is_real is not None:
        sees &= np.asarray(is_real)[:, None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        sees &= ids[:, :, None] == ids[:, None]
    return sees


def padding(seq, side):
    count = np.array([[0], [seq // 3]])
    column = np.arange(seq)
    if side == "left":
        return jnp.asarray(column >= count)
    return jnp.asarray(column < seq - count)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_attention_in_16_bits(dtype, softcap):
    """Roundings apart, it is that in float32; with strict promotion, as all tests."""
    seq = 40
    shapes = (2, seq, HEADS, DIM), *[(2, seq, KV_HEADS, DIM)] * 2, (2, seq, HEADS, DIM)
    arrays = [normal(*s, seed=i).astype(dtype) for i, s in enumerate(shapes)]
    ids = jnp.asarray(np.arange(seq)[None] * np.array([[1], [3]]) // 9, jnp.int32)
    limits = (
        {},
        {"window": 5},
        {"is_real": padding(seq, "right")},
        {"segment_ids": ids},
    )

    @jax.jit
    def run(arrays):
        *inputs, d_out = arrays

        def run_one(limit):
            sight = Sight(seq, **limit)
            out, pull_back = jax.vjp(
                lambda q, k, v: attend(q, k, v, sight, scale=0.5, softcap=softcap),
                *inputs,
            )
            return out, *pull_back(d_out)

        return [run_one(limit) for limit in limits]

    with jax.numpy_dtype_promotion("strict"):
        got = run(arrays)
    want = run([x.astype(jnp.float32) for x in arrays])
    # Weights, cotangents of scores and results are rounded, and their sums at most
    # twice: relative to an array, fewer than four roundings.
    limit = 4 * float(jnp.finfo(dtype).eps) / 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(a.astype(jnp.float32) - b) < limit * np.linalg.norm(b)


def test_short_attention_in_bfloat16_runs_the_native_kernel():
    if reason := native.why_not():
        pytest.skip(reason)
    q, k = (normal(1, 9, heads, DIM) for heads in (HEADS, KV_HEADS))

    def lower(dtype):
        arrays = [x.astype(dtype) for x in (q, k, k)]
        return jax.jit(lambda *x: attend(*x, Sight(9))).lower(*arrays).as_text()

    with jaxbnb_kernels.config.override(cpu="always"):
        assert "jaxbnb_cpu_attend_dense" in lower(jnp.bfloat16)
        assert "jaxbnb_cpu" not in lower(jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_long_attention_on_a_cpu_runs_the_native_kernel(dtype):
    """With every limit, and as blocks do, but not with options and on GPUs."""
    if reason := native.why_not():
        pytest.skip(reason)
    seq = 70
    shapes = (2, seq, HEADS, DIM), *[(2, seq, KV_HEADS, DIM)] * 2, (2, seq, HEADS, DIM)
    arrays = [normal(*s, seed=i).astype(dtype) for i, s in enumerate(shapes)]
    ids = jnp.asarray(np.arange(seq)[None] * np.array([[1], [3]]) // 9, jnp.int32)

    def make(limit, cpu="always", **options):
        def run(q, k, v, d_out):
            def attend_long(*x):
                return attend(*x, Sight(seq, **limit), dense_scores=0, **options)

            with jaxbnb_kernels.config.override(cpu=cpu):
                out, pull_back = jax.vjp(attend_long, q, k, v)
                return out, *pull_back(d_out)

        return jax.jit(run)

    def count_calls(run, platform="cpu"):
        lowered = run.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        return lowered.count("@jaxbnb_cpu_attend_dense")

    limit = 4 * float(jnp.finfo(dtype).eps)
    for sight in (
        {},
        {"window": 5},
        {"is_real": padding(seq, "right")},
        {"segment_ids": ids},
    ):
        run = make(sight)
        assert count_calls(run) == 2
        assert count_calls(run, "cuda") == 0
        in_blocks = make(sight, cpu="never")
        assert count_calls(in_blocks) == 0
        counts = seen(seq, **sight).any(axis=-1)[:, :, None, None]
        *inputs, d_out = arrays
        inputs.append(jnp.where(counts, d_out, 0).astype(dtype))
        got, want = (
            [np.asarray(x, np.float64) for x in f(*inputs)] for f in (run, in_blocks)
        )
        # The results of queries that see nothing are meaningless.
        for x in (got, want):
            x[0] *= counts
        for a, b in zip(got, want, strict=True):
            assert np.linalg.norm(a - b) < limit * np.linalg.norm(b)
    for options in ({"softcap": 2.0}, {"sinks": normal(HEADS)}, {"block": 16}):
        assert count_calls(make({}, **options)) == 0
    assert count_calls(make({"bias": slopes(seq)})) == 0


# Sizes around a block; padding follows at the end of the last one.
@pytest.mark.parametrize("seq", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_blocks_are_the_definition(seq):
    """And have its gradients, for each limit, a cap, a bias, and sinks."""
    q, g = normal(2, seq, HEADS, DIM), normal(2, seq, HEADS, DIM, seed=1)
    k, v = (normal(2, seq, KV_HEADS, DIM, seed=n) for n in (2, 3))
    segments = jnp.asarray(np.arange(seq)[None] * np.array([[1], [3]]) // 6, jnp.int32)
    heads = normal(HEADS, seed=4)
    cases = (
        ({"window": 5, "bias": slopes(seq)}, 2.0, None),
        ({"window": 1, "is_real": padding(seq, "right")}, None, heads),
        ({"is_real": padding(seq, "left"), "bias": slopes(seq)}, None, None),
        ({"segment_ids": segments}, 2.0, heads),
        ({}, None, None),
    )

    def run(dense_scores, limit, softcap, sinks):
        # Rows that see nothing are meaningless.
        counts = seen(seq, **limit).any(axis=-1)[:, :, None, None]

        def loss(q, k, v, sinks):
            options = {"scale": 0.5, "softcap": softcap, "block": BLOCK}
            options["sinks"] = sinks
            sight = Sight(seq, **limit)
            y = attend(q, k, v, sight, **options, dense_scores=dense_scores)
            y = jnp.where(counts, y, 0.0)
            return jnp.vdot(y, g), y

        argnums = range(3 if sinks is None else 4)
        return jax.grad(loss, argnums=tuple(argnums), has_aux=True)(q, k, v, sinks)

    @jax.jit
    def run_all():
        return [[run(scores, *case) for scores in (0, seq**2)] for case in cases]

    for (limit, softcap, sinks), ((grads, y), (dense_grads, dense)) in zip(
        cases, run_all(), strict=True
    ):
        sees = seen(seq, **limit)
        want = naive(q, k, v, sees, 0.5, softcap, limit.get("bias"), sinks)
        want *= sees.any(axis=-1)[..., None, None]
        assert_close(y, want)
        assert_close(dense, want)
        assert_close(grads, dense_grads)


def test_keys_in_slots(monkeypatch):
    """Queries from any offset, keys in order with a bias, or in a ring with sinks."""
    monkeypatch.setattr(attention, "DENSE_SLOTS", 0)
    total, window, size, new = 29, 6, 12, 5
    q, k, v = (normal(2, total, heads, DIM, seed=heads) for heads in (4, 2, 2))
    sees = seen(total, window, padding(total, "left"))

    @functools.partial(jax.jit, static_argnums=0)
    def run(is_ring, start):
        stop = start + new
        slots = jnp.arange(size if is_ring else total)
        last = stop - 1
        index = last - (last - slots) % size if is_ring else slots
        keys, values = (x[:, index] for x in (k, v))
        bias = None if is_ring else slopes(total)
        sight = Sight(total, start, padding(total, "left"), window, bias=bias)
        sight = sight.in_ring(size) if is_ring else sight
        rows = jax.lax.dynamic_slice_in_dim(q, start, new, 1)

        def read(first, count):
            return [
                jax.lax.dynamic_slice_in_dim(x, first, count, 1) for x in (keys, values)
            ]

        sinks = normal(HEADS, seed=5) if is_ring else None
        return attend_slots(rows, read, sight, sinks=sinks, block=4)

    for is_ring, start in itertools.product((False, True), (12, 24)):
        got = run(is_ring, start)
        bias = None if is_ring else slopes(total)
        sinks = normal(HEADS, seed=5) if is_ring else None
        want = naive(q, k, v, sees, DIM**-0.5, None, bias, sinks)
        assert_close(got, want[:, start : start + new])


def test_a_block_that_nobody_sees_is_not_read(monkeypatch):
    """Values there are NaN, and reach nothing."""
    monkeypatch.setattr(attention, "DENSE_SLOTS", 0)
    k = normal(1, 32, KV_HEADS, DIM).at[:, 16:].set(jnp.nan)

    def read(start, size):
        return [jax.lax.dynamic_slice_in_dim(k, start, size, 1)] * 2

    y = attend_slots(normal(1, 1, HEADS, DIM), read, Sight(32, 15), block=8)
    assert jnp.isfinite(y).all()


def test_memory_is_linear_in_the_length():
    """Twice the length takes twice the memory, of a step of all variables."""

    def temporaries(seq):
        x = jax.ShapeDtypeStruct((1, seq, HEADS, DIM), jnp.float32)

        def loss(q, k, v):
            options = {"block": 64, "dense_scores": 0}
            return attend(q, k, v, Sight(seq), **options).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(seq) for seq in (1024, 2048, 4096)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    # All scores would be 64 MiB for each head.
    assert sizes[2] < HEADS * 16 * 2**20


def test_nothing_is_gathered_on_a_mesh():
    """Each device computes its rows and heads, forwards and backwards."""
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    q, k = (
        jax.ShapeDtypeStruct((2, 40, heads, DIM), jnp.float32, sharding=sharding)
        for heads in (HEADS, KV_HEADS)
    )

    def loss(q, k, v):
        options = {"block": 16, "dense_scores": 0}
        return attend(q, k, v, Sight(40, window=20), **options).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text
    assert {s.spec for s in compiled.output_shardings} == {sharding.spec}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few tokens everywhere."""
    monkeypatch.setattr(attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(attention, "DENSE_SLOTS", 0)
    monkeypatch.setattr(_blocks, "BLOCKS", {"default": 4})


MIXED = {
    "sliding_window": 6,
    "full_attention_layers": (1,),
    "attention_softcap": 5.0,
}


def test_a_cache_keeps_the_window(toy, small_blocks):
    """Layers with a window keep fewer slots, and the logits are the same."""
    model, tokens = toy.model(**MIXED), toy.tokens(2, 23)
    mask = padding(23, "left")
    cache = KVCache.empty(model.config, 2, 30, part=4)
    assert cache.near_layers == (0, 2)
    assert cache.near_keys.shape == (2, 2, 10, 2, 16)
    assert cache.keys.shape == (1, 2, 30, 2, 16)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        whole = model(tokens, attention_mask=mask)
        # Four parts, of which the first is shorter, and then one token at a time.
        first, filled = model(tokens[:, :15], attention_mask=mask[:, :15], cache=cache)

        def step(cache, column):
            logits, cache = model(column[:, None], cache=cache)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, filled, tokens[:, 15:].T)
        return whole, jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

    whole, parts = run(state)
    assert_close(parts[mask], whole[mask])


def test_documents_in_a_row_are_apart(toy, small_blocks):
    """Logits and loss are those of each document in a row of its own."""
    model, tokens = toy.model(**MIXED), toy.tokens(1, 19)
    ids = jnp.asarray(np.repeat([[0, 1, 5]], [7, 10, 2], axis=1), jnp.int32)
    together = jax.jit(lambda: model(tokens, segment_ids=ids))()
    loss = jax.jit(lambda: next_token_loss(model, tokens, segment_ids=ids))()
    losses = []
    for start, stop in ((0, 7), (7, 17), (17, 19)):
        own = tokens[:, start:stop]
        assert_close(together[:, start:stop], toy.run(model, own))
        log_p = jax.nn.log_softmax(together[:, start : stop - 1])
        losses += [-log_p[0, i, token] for i, token in enumerate(own[0, 1:])]
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_wrong_segment_ids(toy, model):
    tokens = toy.tokens(2, 4)
    with pytest.raises(ValueError, match=r"must not decrease along a row; rows \[1\]"):
        model(tokens, segment_ids=jnp.array([[0, 0, 1, 1], [1, 0, 2, 2]]))
    with pytest.raises(TypeError, match="segment_ids must be integers, got float32"):
        model(tokens, segment_ids=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"segment_ids must have the shape.*\(2, 4\)"):
        model(tokens, segment_ids=jnp.zeros((2, 3), jnp.int32))
    cache = KVCache.empty(model.config, 2, 8)
    with pytest.raises(ValueError, match="a KVCache holds one document in each row"):
        model(tokens, segment_ids=jnp.zeros((2, 4), jnp.int32), cache=cache)
    with pytest.raises(ValueError, match="part must be at least 1, got 0"):
        KVCache.empty(model.config, 2, 8, part=0)


def test_windows_heads_and_lengths_that_do_not_fit(toy, model):
    with pytest.raises(ValueError, match=r"sliding_window must be a positive.*got 0"):
        dataclasses.replace(model.config, sliding_window=0)
    with pytest.raises(
        ValueError, match="4 must be a multiple of num_key_value_heads 3"
    ):
        dataclasses.replace(model.config, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"65 tokens.*64 \(max_position_embeddings\)"):
        model(toy.tokens(1, 65))


def test_recomputing_changes_no_gradient(toy, monkeypatch):
    """In groups of layers, from the host's memory, and with an MLP in chunks."""
    monkeypatch.setattr(_layer, "CHUNK", 4)
    model, tokens = toy.model(), toy.tokens(1, 9)
    graphdef, state = nnx.split(model)

    def gradient(remat):
        def loss(state):
            return next_token_loss(nnx.merge(graphdef, state), tokens, remat=remat)

        return jax.jit(jax.value_and_grad(loss))(state)

    want = gradient(False)
    for remat in (True, Remat(every=3), Remat(offload=True)):
        assert_close(gradient(remat), want)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"head_dim": 160}, "up to 128 features, by 8; not of 160"),
        ({"head_dim": 60}, "up to 128 features, by 8; not of 60"),
        ({"softcap": 5.0}, "does not bound scores"),
        ({"has_sinks": True}, "no attention sinks"),
        ({"sight": Sight(9, is_real=jnp.ones((1, 9)))}, "a mask of every query"),
        ({"sight": Sight(9, bias=jnp.ones((1, 1, 9)))}, "a bias of every query"),
        ({"sight": Sight(9, window=jnp.int32(3))}, "one window for all layers"),
        ({"sight": Sight(9, window=3)}, None),
    ],
)
def test_when_cudnn_serves(monkeypatch, facts, reason):
    monkeypatch.setattr(attention, "why_no_cudnn", lambda: None)
    monkeypatch.setattr(attention, "least_capability", lambda: (8, 0))
    got = attention.why_not_cudnn(**{"dtype": "bfloat16", "head_dim": 128} | facts)
    assert got is None if reason is None else reason in got


def test_a_program_for_a_gpu_calls_cudnn(monkeypatch):
    """The same trace has blocks for a CPU, and cuDNN's kernel for a GPU."""
    monkeypatch.setattr(native, "is_on", lambda: False)
    monkeypatch.setattr(attention, "why_no_cudnn", lambda: None)
    monkeypatch.setattr(attention, "least_capability", lambda: (8, 0))
    called = []

    def by_cudnn(q, k, v, **options):
        called.append(options)
        return jnp.sinh(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_cudnn)
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        return attend(q, k, v, Sight(512, window=9)).astype(jnp.float32).sum()

    def lower(platform):
        traced = jax.jit(jax.grad(loss)).trace(x, x, x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "cosh" in lower("cuda")
    assert "while" not in lower("cuda")
    assert "cosh" not in lower("cpu")
    assert "while" in lower("cpu")
    assert called[0]["local_window_size"] == (8, 0)
    assert called[0]["is_causal"]
    assert called[0]["implementation"] == "cudnn"
