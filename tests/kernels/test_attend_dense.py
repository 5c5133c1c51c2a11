"""The contract of attend_dense: the result, its derivative, and where a kernel runs.

The tolerance follows from the roundings. Weights, and the cotangents of scores, are
rounded to the dtype once before they are multiplied, and so is each result. The rest is
in float32: sums in any order, and exponentials, which magnify the errors of scores.
"""

import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import ISAS, alone, check_threads, library, using
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbnb_kernels import config
from jaxbnb_kernels.attend_dense import attend_dense, xla

TARGET = "jaxbnb_cpu_attend_dense"
SCALE = 0.3
# Sums in float32 of numbers of 16 bits, and 8 units of the last place for exp.
EPS = 2.0**-24

# (batch, queries, keys, heads, kv_heads, head_dim): one query, as in decoding; less
# than a vector, a strip, a group and a tile; several blocks; more keys than queries.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 40, 4, 2, 8),
    (2, 7, 7, 3, 3, 4),
    (1, 33, 33, 2, 1, 20),
    (2, 70, 70, 6, 2, 64),
    (1, 130, 200, 2, 2, 80),
]


def draw(*shape, seed=0, dtype="bfloat16"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.dtype(dtype))


def draw_arrays(batch, queries, keys, heads, kv_heads, head_dim, dtype="bfloat16"):
    """Returns queries, keys, values, and the cotangent of the result."""
    of_queries, of_keys = (batch, queries, heads), (batch, keys, kv_heads)
    shapes = (of_queries, of_keys, of_keys, of_queries)
    return [
        draw(*shape, head_dim, seed=i, dtype=dtype) for i, shape in enumerate(shapes)
    ]


def make_mask(batch, queries, keys, kind):
    i, j = np.arange(queries)[:, None], np.arange(keys)[None]
    if kind == "causal":
        return jnp.asarray(j <= i + keys - queries)[None]
    if kind == "window":
        distance = i + keys - queries - j
        return jnp.asarray((distance >= 0) & (distance < 9))[None]
    seen = np.random.default_rng(5).random((batch, queries, keys)) < 0.3
    seen[:, np.arange(queries), np.arange(queries) % keys] = True
    return jnp.asarray(seen)


def check(got, arrays, mask, scale=SCALE):
    """Compares the result and its gradients with the definition, in float64."""
    dtype = got[0].dtype
    half_unit = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
    q, k, v, d_out = (np.asarray(a, np.float64) for a in arrays)
    mask = np.asarray(mask)[:, None]
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    queries_keys = functools.partial(np.einsum, "bqhd,bkhd->bhqk")
    to_queries = functools.partial(np.einsum, "bhqk,bkhd->bqhd")
    to_keys = functools.partial(np.einsum, "bhqk,bqhd->bkhd")

    def sum_groups(a):
        return a.reshape(*a.shape[:2], -1, group, a.shape[-1]).sum(axis=3)

    scores = np.where(mask, scale * queries_keys(q, k), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = queries_keys(d_out, v)
    mean = (weights * d_weights).sum(axis=-1, keepdims=True)
    d_scores = scale * weights * (d_weights - mean)

    # Relative errors of weights, and absolute ones of the cotangents of scores.
    size, keys = q.shape[-1], k.shape[1]
    of_scores = (size + 2) * EPS * abs(scale) * queries_keys(abs(q), abs(k))
    of_scores = np.where(mask, of_scores, 0).max(axis=-1, keepdims=True)
    of_weights = 2 * of_scores + (keys + 16) * EPS
    terms = queries_keys(abs(d_out), abs(v))
    spread = terms + (weights * terms).sum(axis=-1, keepdims=True)
    of_d_scores = abs(scale) * weights * spread * (2 * of_weights + (size + 4) * EPS)
    of_d_scores += half_unit * abs(d_scores)
    of_weights = (of_weights + half_unit) * weights
    sums = (keys + q.shape[1] * group) * EPS

    def bound(product, errors, values, other):
        return product(errors + sums * abs(values), abs(other))

    expected = [
        to_queries(weights, v),
        to_queries(d_scores, k),
        sum_groups(to_keys(d_scores, q)),
        sum_groups(to_keys(weights, d_out)),
    ]
    tolerances = [
        bound(to_queries, of_weights, weights, v),
        bound(to_queries, of_d_scores, d_scores, k),
        sum_groups(bound(to_keys, of_d_scores, d_scores, q)),
        sum_groups(bound(to_keys, of_weights, weights, d_out)),
    ]
    names = ["out", "d_q", "d_k", "d_v"]
    for name, a, b, tolerance in zip(names, got, expected, tolerances, strict=False):
        assert a.shape == b.shape
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float64) - b)
        limit = tolerance + half_unit * np.abs(b) + 1e-37
        assert np.all(error <= limit), (name, (error / limit).max())


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def run(q, k, v, d_out, mask, *, scale=SCALE, implementation="cpu"):
    def attend(q, k, v):
        return attend_dense(q, k, v, mask, scale=scale, implementation=implementation)

    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(d_out)


every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


@pytest.mark.parametrize("kind", ["causal", "window", "each text its own"])
@every_dtype
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernel(isa, dtype, kind):
    library()
    for shape in SHAPES:
        arrays, mask = draw_arrays(*shape, dtype=dtype), make_mask(*shape[:3], kind)
        # Each instruction set runs the same program.
        with using(isa):
            got = run(*arrays, mask)
        check(got, arrays, mask)


@every_dtype
@pytest.mark.parametrize("rows", [1, 8, 33, 50])
def test_xla(dtype, rows, monkeypatch):
    """Also in strips of some queries. The last one is shorter."""
    monkeypatch.setattr(xla, "_MOST_SCORES", rows * 40 + 39)
    arrays = draw_arrays(2, 33, 40, 6, 2, 24, dtype=dtype)
    mask = make_mask(2, 33, 40, "each text its own")
    # Traces are cached.
    got = jax.jit(functools.partial(run.__wrapped__, implementation="xla"))(
        *arrays, mask
    )
    check(got, arrays, mask)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 30.0])
def test_scale(scale):
    """Also one where most weights vanish."""
    library()
    arrays, mask = draw_arrays(1, 40, 40, 2, 1, 16), make_mask(1, 40, 40, "causal")
    check(run(*arrays, mask, scale=scale), arrays, mask, scale)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_a_query_that_sees_nothing_changes_nothing_else(implementation):
    """Its result is finite; with a cotangent of zero it moves no key and no value."""
    if implementation == "cpu":
        library()
    q, k, v, d_out = draw_arrays(2, 70, 70, 2, 1, 16)
    mask = np.array(make_mask(2, 70, 70, "each text its own"))
    blind = np.zeros(70, bool)
    # Some of a block, and a block of its own.
    blind[[0, 5, 64, 65, 66, 67, 68, 69]] = True
    mask[:, blind] = False
    d_out = d_out.at[:, blind].set(0)
    got = run(q, k, v, d_out, jnp.asarray(mask), implementation=implementation)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in got)
    out, d_q, d_k, d_v = got
    others = (out[:, ~blind], d_q[:, ~blind], d_k, d_v)
    arrays = q[:, ~blind], k, v, d_out[:, ~blind]
    check(others, arrays, mask[:, ~blind])


def test_not_a_number_stays_in_its_row():
    library()
    q, k, v, d_out = draw_arrays(1, 20, 20, 1, 1, 8)
    q = q.at[0, 3, 0, 2].set(jnp.nan)
    out, d_q, _, _ = run(q, k, v, d_out, make_mask(1, 20, 20, "causal"))
    for a in (out, d_q):
        is_nan = np.isnan(np.asarray(a, np.float32)).all(axis=(0, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(is_nan), [3])


@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 2, 1, 4), (2, 0, 3, 2, 1, 4), (2, 3, 0, 2, 1, 4)]
)
def test_empty(shape):
    """Without keys, results are zeros."""
    library()
    arrays, mask = draw_arrays(*shape), jnp.ones((1, *shape[1:3]), bool)
    for a, b in zip(run(*arrays, mask), (arrays[0], *arrays[:3]), strict=True):
        np.testing.assert_array_equal(a, jnp.zeros_like(b))


def digest_of_results() -> str:
    shape = (2, 130, 130, 6, 2, 24)
    arrays = run(*draw_arrays(*shape), make_mask(*shape[:3], "causal"))
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


@alone
def test_results_do_not_depend_on_threads():
    library()
    check_threads("test_attend_dense", digest_of_results())


@pytest.mark.parametrize("has_masks", [False, True], ids=["one mask", "masks"])
def test_mapped(has_masks):
    """Over texts, which may have masks of their own."""
    library()
    shape = (2, 20, 20, 4, 2, 8)
    arrays = [jnp.stack([a, 2 * a, a + 1]) for a in draw_arrays(*shape)]
    mask = make_mask(*shape[:3], "causal")
    masks = jnp.stack([mask, ~mask | jnp.eye(20, dtype=bool), mask])
    axes = (0, 0, 0, 0, 0 if has_masks else None)
    got = jax.vmap(run, axes)(*arrays, masks if has_masks else mask)
    for i in range(3):
        own = masks[i] if has_masks else mask
        check([a[i] for a in got], [a[i] for a in arrays], own)


@pytest.mark.parametrize("kind", ["causal", "each text its own"])
def test_divided(kind):
    """Each device computes its texts and its heads, and nothing is sent."""
    library()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays, mask = draw_arrays(2, 20, 20, 4, 2, 8), make_mask(2, 20, 20, kind)
    sharding = NamedSharding(mesh, P("data", None, "model", None))
    arrays = [jax.device_put(a, sharding) for a in arrays]
    of_mask = P("data" if len(mask) > 1 else None)
    mask = jax.device_put(mask, NamedSharding(mesh, of_mask))
    text = run.lower(*arrays, mask).compile().as_text()
    assert f"{TARGET}_gradient" in text
    assert not re.findall(r" (all-[a-z]+|collective-permute)\(", text)
    check(run(*arrays, mask), arrays, mask)


def test_only_arguments_are_kept():
    q, k, v, _ = draw_arrays(2, 20, 24, 4, 2, 8)
    mask = make_mask(2, 20, 24, "causal")
    _, pull_back = jax.vjp(lambda *a: attend_dense(*a, mask, scale=SCALE), q, k, v)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull_back) if leaf.ndim}
    assert kept == {q.shape, k.shape, mask.shape}


def test_second_derivative():
    """As XLA's own: the same roundings, but for those of the first derivative."""
    library()
    q, k, v, d_out = draw_arrays(1, 12, 12, 2, 1, 8)
    mask = make_mask(1, 12, 12, "causal")

    def penalty(implementation, dtype, q, k, v):
        arrays = [a.astype(dtype) for a in (q, k, v, d_out)]
        grads = run(*arrays, mask, implementation=implementation)[1:]
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads)

    def second(*options):
        return jax.grad(functools.partial(penalty, *options), argnums=(0, 1, 2))

    want = second("xla", jnp.float32)(q, k, v)
    for a, b in zip(second("cpu", jnp.bfloat16)(q, k, v), want, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        # Some roundings of 2^-9 in a row; cancellation makes single numbers worse.
        assert np.linalg.norm(a - b) < 2.0**-6 * np.linalg.norm(b)


@every_dtype
def test_by_default_it_runs(dtype):
    library()
    arrays, mask = draw_arrays(1, 4, 4, 1, 1, 4, dtype=dtype), jnp.ones((1, 4, 4), bool)
    attend = functools.partial(attend_dense, mask=mask, scale=SCALE)
    with config.override(cpu="always"):
        assert TARGET in jax.jit(attend).lower(*arrays[:3]).as_text()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": draw(2, 3, 4)}, ValueError, r"q must be .* got \(2, 3, 4\)"),
        ({"q": draw(1, 3, 3, 4)}, ValueError, "kv_heads divides heads"),
        ({"v": draw(1, 5, 2, 8)}, ValueError, r"and \(1, 5, 2, 8\)"),
        ({"mask": jnp.ones((2, 3, 5), bool)}, ValueError, r"\(1 or 1, 3, 5\)"),
        ({"mask": jnp.ones((1, 3, 5))}, TypeError, "mask boolean; got .* float32"),
        ({"k": draw(1, 5, 2, 4, dtype="float32")}, TypeError, "bfloat16, float32"),
        ({"q": draw(1, 3, 4, 4, dtype="float16")}, TypeError, "got float16"),
    ],
)
def test_wrong_arguments(change, error, message):
    q, k, v, _ = draw_arrays(1, 3, 5, 4, 2, 4)
    arguments = {"q": q, "k": k, "v": v, "mask": jnp.ones((1, 3, 5), bool), **change}
    with pytest.raises(error, match=message):
        attend_dense(**arguments, scale=SCALE)
