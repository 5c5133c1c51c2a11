"""The solver, against GPTQ in float64 NumPy, and against absmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbnb
from jaxbnb.calibration import _solver, minimize_error, search_scales
from jaxbnb.calibration._levels import encode, nearest, searchable
from jaxbnb.calibration._prepare import shrink_tiles, tile_shape
from jaxbnb_kernels.codebooks import NF4

POINTS = (NF4[1:] + NF4[:-1]) / 2


def make_problem(fan_in=96, fan_out=24, seed=0):
    """A kernel, and the moment of inputs that are few, correlated and uneven."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((fan_in, fan_out)).astype(np.float32)
    mix = rng.standard_normal((fan_in, fan_in)) * np.exp(rng.standard_normal(fan_in))
    x = rng.standard_normal((fan_in // 2, fan_in)) @ mix
    return jnp.asarray(w), x.T @ x / len(x)


def measure(w, q, moment):
    """The error that the solver minimises: in float64, with its damping."""
    d = np.asarray(q.dequantize(), np.float64) - np.asarray(w, np.float64)
    damped = moment + 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    return np.sum(d * (damped @ d))


def gptq(w, moment, size):
    """GPTQ as its paper has it, column by column, in float64: levels and scales."""
    w, n = w.astype(np.float64), len(w)
    h = moment + 0.01 * np.trace(moment) / n * np.eye(n)
    blocks = np.split(np.arange(n), n // size)
    blocks.sort(key=lambda block: -np.diag(h)[block].sum())
    order = np.concatenate([b[np.argsort(-np.diag(h)[b])] for b in blocks])
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    w, levels, scales = w[order], np.zeros_like(w), np.zeros((n // size, w.shape[1]))
    for out in range(w.shape[1]):
        for first in range(0, n, size):
            best = np.inf
            x0 = w[:, out].copy()
            largest = np.abs(x0[first : first + size]).max()
            for share in np.linspace(0.6, 1.1, 21):
                x, cost, chosen = x0.copy(), 0.0, []
                for i in range(first, first + size):
                    level = NF4[np.searchsorted(POINTS, x[i] / (share * largest))]
                    error = (x[i] - level * share * largest) / upper[i, i]
                    x[i:] -= error * upper[i, i:]
                    cost += error**2
                    chosen.append(level)
                if cost < best:
                    best, kept = cost, (x, chosen, share * largest)
            w[:, out] = kept[0]
            levels[order[first : first + size], out] = kept[1]
            scales[order[first] // size, out] = kept[2]
    return levels, scales


def test_it_is_gptq_with_a_search_for_scales(monkeypatch):
    monkeypatch.setattr(_solver, "_SWEEPS", 0)
    w, moment = make_problem(64, 3)
    levels, scales = gptq(np.asarray(w), moment, 16)
    q = minimize_error(w, moment, jaxbnb.QuantConfig("nf4", block_size=16))
    # Rounding in float32 could change a code only where a value is within 1e-6 of a
    # decision point. None of these 192 is.
    np.testing.assert_array_equal(q.codes, encode(jnp.asarray(levels.T), "nf4"))
    np.testing.assert_allclose(q.absmax, scales.T, rtol=1e-5)
    _solver._minimize.clear_cache()


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant", "fan_in"),
    [
        ("nf4", 64, False, 96),  # The last block is short.
        ("nf4", 32, True, 96),
        ("fp4", 32, False, 47),  # An odd number of codes.
        ("int4", 32, True, 64),
        ("int8", 64, False, 96),
    ],
)
def test_never_worse_than_absmax(quant_type, block_size, double_quant, fan_in):
    config = jaxbnb.QuantConfig(quant_type, block_size, double_quant)
    w, moment = make_problem(fan_in)
    plain = config.quantize_kernel(w)
    best, searched = minimize_error(w, moment, config), search_scales(w, config)
    seen = search_scales(w, config, np.diagonal(moment))
    for q in (best, searched, seen):
        assert jax.tree.structure(q) == jax.tree.structure(plain)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(plain)]
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(q)] == shapes
    # These inputs are correlated, so half the error is gone in any format.
    assert measure(w, best, moment) < 0.5 * measure(w, plain, moment)
    squared = [measure(w, q, np.eye(fan_in)) for q in (searched, plain)]
    assert squared[0] <= squared[1]
    weighted = [measure(w, q, np.diag(np.diag(moment))) for q in (seen, plain)]
    assert weighted[0] <= weighted[1]


def make_tiles(fan_out, seed=0):
    """Moments of correlated gradients, in tiles; and the same as one matrix."""
    rng, (count, tile, _) = np.random.default_rng(seed), tile_shape(fan_out)
    g = rng.standard_normal((2 * tile, count, 4)) @ rng.standard_normal((4, tile))
    g = g + 0.3 * rng.standard_normal(g.shape)
    g.reshape(len(g), -1)[:, fan_out:] = 0
    tiles = np.einsum("nki,nkj->kij", g, g) / len(g)
    whole = np.zeros((count * tile, count * tile))
    for k in range(count):
        rows = slice(k * tile, (k + 1) * tile)
        whole[rows, rows] = tiles[k]
    return tiles, whole[:fan_out, :fan_out]


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "fan_out"),
    [("nf4", False, 40), ("int4", True, 70), ("nf4", True, 530)],
)
def test_outputs_make_up_for_each_other(quant_type, double_quant, fan_out):
    """What the loss sees of the error is less than if outputs were independent."""
    config = jaxbnb.QuantConfig(quant_type, 32, double_quant)
    w, moment = make_problem(64, fan_out)
    tiles, whole = make_tiles(fan_out)
    shrunk = shrink_tiles(tiles, fan_out)
    # As shrink_tiles has it.
    whole = 0.5 * whole + np.diag(np.diag(whole)) * 0.5
    whole += 0.01 * np.trace(whole) / fan_out * np.eye(fan_out)

    def measure(q):
        e = np.asarray(q.dequantize(), np.float64) - np.asarray(w, np.float64)
        return np.sum((e @ whole) * (moment @ e))

    plain = config.quantize_kernel(w)
    alone = minimize_error(w, moment, config)
    together = minimize_error(w, moment, config, tiles)
    assert jax.tree.structure(together) == jax.tree.structure(plain)
    errors = [measure(q) for q in (together, alone, plain)]
    assert errors[0] < 0.9 * errors[1] < errors[2]
    signal = np.sum((np.asarray(w) @ whole) * (moment @ np.asarray(w)))
    np.testing.assert_allclose(
        _solver.output_error(w, together, jnp.asarray(moment), jnp.asarray(shrunk)),
        errors[0] / signal,
        rtol=1e-4,
    )


def test_outputs_that_are_independent():
    """Without correlation, the codes are those of each output alone."""
    w, moment = make_problem(64, 40)
    diagonal = np.diag(np.exp(np.random.default_rng(0).standard_normal(64)))[None]
    together = minimize_error(w, moment, "nf4", diagonal)
    alone = minimize_error(w, moment, "nf4")
    np.testing.assert_array_equal(together.codes, alone.codes)
    np.testing.assert_allclose(together.absmax, alone.absmax, rtol=1e-6)


def test_descent_lowers_the_error(monkeypatch):
    w, moment = make_problem()
    errors = []
    for sweeps in (0, 4):
        monkeypatch.setattr(_solver, "_SWEEPS", sweeps)
        _solver._minimize.clear_cache()
        errors.append(measure(w, minimize_error(w, moment, "nf4"), moment))
    assert errors[0] > errors[1]
    _solver._minimize.clear_cache()


@pytest.mark.parametrize("quant_type", searchable())
def test_levels_and_codes_are_those_of_quantize(quant_type):
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    q = jaxbnb.quantize(jnp.asarray(x), quant_type)
    levels = nearest(jnp.asarray(x) * (1 / q.absmax), quant_type)
    np.testing.assert_array_equal(encode(levels, quant_type), q.codes)


def test_zeros_and_values_that_are_not_finite():
    w, moment = make_problem(64, 4)
    w = w.at[:, 0].set(0.0).at[3, 1].set(jnp.inf)
    for q in (minimize_error(w, moment, "nf4"), search_scales(w, "nf4")):
        decoded = np.asarray(q.dequantize())
        assert (decoded[:, 0] == 0).all()
        assert not np.isfinite(decoded[:, 1]).any()
        assert np.isfinite(decoded[:, 2:]).all()


def test_inputs_that_never_come():
    w, _ = make_problem(64, 4)
    q = minimize_error(w, np.zeros((64, 64)), "nf4")
    plain = jaxbnb.quantize(w, "nf4", axis=-2)
    squared = [measure(w, x, np.eye(64)) for x in (q, plain)]
    assert squared[0] < squared[1]
    blind, searched = search_scales(w, "nf4"), search_scales(w, "nf4", np.zeros(64))
    np.testing.assert_array_equal(searched.codes, blind.codes)


@pytest.mark.parametrize("double_quant", [False, True])
def test_products_with_mirrored_levels(double_quant):
    """Every implementation takes a negative absmax."""
    w, x = make_problem(128, 64)[0], make_problem(128, 5, seed=1)[0].T
    q = search_scales(w, jaxbnb.QuantConfig("nf4", double_quant=double_quant))
    if not double_quant:
        assert 0.3 < jnp.mean(q.absmax < 0) < 0.7
    want = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    # Sums of 128 products of about 1 round in float32 by less than 1e-5.
    np.testing.assert_allclose(jaxbnb.matmul(x, q), want, atol=1e-4)
    codes, scales = np.asarray(q.codes), np.asarray(q.absmax)
    levels = NF4[np.stack([codes >> 4, codes & 15], -1).reshape(64, 2, 64)]
    if not double_quant:
        decoded = (levels * scales[..., None]).reshape(64, 128).T
        np.testing.assert_array_equal(q.dequantize(), decoded)


def test_a_stack_is_searched_matrix_by_matrix():
    problems = [make_problem(seed=seed) for seed in range(2)]
    w = jnp.stack([w for w, _ in problems])
    squares = np.stack([np.diagonal(moment) for _, moment in problems])
    q = search_scales(w, jaxbnb.QuantConfig("nf4", double_quant=True), squares)
    for i in range(2):
        one = search_scales(
            w[i], jaxbnb.QuantConfig("nf4", double_quant=True), squares[i]
        )
        # XLA may add up the 64 products of a block in another order. Absmax are below
        # 8 here, so one rounds by at most 64 times 2**-21.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2**-15), q[i], one
        )


@pytest.mark.parametrize("quant_type", searchable())
def test_a_search_does_not_shrink_blocks(quant_type):
    w, _ = make_problem(128)
    q = search_scales(w, quant_type)
    x, y = (np.asarray(a, np.float64).reshape(2, 64, 24) for a in (w, q.dequantize()))
    kept = (x * y).sum(1) / (x * x).sum(1)
    # A float32 sum of 64 products has a relative error below 64 * 2**-24. There are
    # two, and their quotient.
    np.testing.assert_allclose(kept, 1.0, atol=3 * 64 * 2**-24)


@pytest.mark.parametrize("has_inputs", [False, True])
def test_a_search_finds_the_best_codes(has_inputs):
    """In float64, one block and one scale at a time."""
    w = np.asarray(make_problem(64, 8)[0], np.float64)
    squares = np.diagonal(make_problem(64)[1]) if has_inputs else None
    q = search_scales(jnp.asarray(w, jnp.float32), "nf4", squares)
    d = np.ones(64) if squares is None else squares + 0.01 * squares.mean()
    absmax = np.asarray(q.absmax)[:, 0]
    for x, found, s in zip(w.T, np.asarray(q.dequantize()).T, absmax, strict=True):
        best = np.inf
        for share in np.linspace(0.6, 1.1, 21):
            for trial in (share, -share):
                levels = NF4[np.searchsorted(POINTS, x / (trial * abs(x).max()))]
                decoded = levels * (x @ (d * x)) / (x @ (d * levels))
                if np.sum(d * (decoded - x) ** 2) < best:
                    best = np.sum(d * (decoded - x) ** 2)
                    expected, scale = decoded, (x @ (d * x)) / (x @ (d * levels))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(s, scale, rtol=1e-5)


def test_tiny_weights():
    """Squares of the smallest ones would underflow."""
    w = make_problem(64)[0]
    for scale in (1.0, 2.0**-80, 2.0**80):
        q = search_scales(w * scale, "nf4")
        np.testing.assert_array_equal(q.codes, search_scales(w, "nf4").codes)
        np.testing.assert_array_equal(q.absmax, search_scales(w, "nf4").absmax * scale)


def test_errors():
    w, moment = make_problem(64, 4)
    with pytest.raises(ValueError, match="nf4, fp4, int4, int8; got 'dynamic8'"):
        search_scales(w, "dynamic8")
    with pytest.raises(ValueError, match=r"squares \(\.\.\., in\); got \(64, 4\)"):
        search_scales(w, "nf4", np.ones(4))
    with pytest.raises(ValueError, match=r"moment \(in, in\); got"):
        minimize_error(w, moment[:5, :5], "nf4")
    with pytest.raises(ValueError, match="not positive semi-definite"):
        minimize_error(w, -moment, "nf4")
    with pytest.raises(ValueError, match=r"tiles \(1, 32, 32\); got \(1, 4, 4\)"):
        minimize_error(w, moment, "nf4", np.eye(4)[None])


@pytest.mark.parametrize("quant_type", ["int4", "int8"])
@pytest.mark.parametrize("choose", [search_scales, minimize_error])
def test_weights_on_the_levels_stay_as_absmax_has_them(choose, quant_type):
    """Nothing is better than no error, and a search of scales may round."""
    w, moment = make_problem(128)
    config = jaxbnb.QuantConfig(quant_type)
    w = config.quantize_kernel(w).dequantize()
    plain = config.quantize_kernel(w)
    options = (config,) if choose is search_scales else (moment, config)
    best = choose(w, *options)
    # Rounded to float32, decoded numbers may differ from those of absmax.
    limit = measure(w, plain, moment)
    if choose is search_scales:
        assert np.sum((best.dequantize() - w) ** 2) <= np.sum(
            (plain.dequantize() - w) ** 2
        )
    else:
        assert measure(w, best, moment) <= limit
