"""The native step with 8-bit moments for CPUs, against the specification.

The tests call the kernel through XLA, for each instruction set that this processor has.
"""

import dataclasses
import functools
import hashlib
import platform

import jax
import jax.numpy as jnp
import known_rules
import numpy as np
import pytest
from cpu_library import alone, check_threads, library, using

import jaxbnb
from jaxbnb_kernels import errors
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED
from jaxbnb_kernels.update_8bit import Moment, Rule, block_layout, update_8bit
from jaxbnb_kernels.update_8bit.cpu_kernel import update
from jaxbnb_kernels.update_8bit.cpu_program import Op, compile_rule
from jaxbnb_kernels.update_8bit.operands import Step

LEVELS = {True: DYNAMIC8_SIGNED, False: DYNAMIC8_UNSIGNED}
ZERO_CODE = {True: 127, False: 0}
STEPS = known_rules.steps()
pytestmark = pytest.mark.matrix

ISAS = ["neon"] if platform.machine() == "aarch64" else ["avx2", "avx512"]
every_isa = pytest.mark.parametrize("isa", ISAS)
every_step = pytest.mark.parametrize("title", STEPS)
# Whole blocks, a block of rows, ragged rows, blocks that end within a vector, a scalar,
# and nothing at all.
SHAPES = [((8, 512), 256), ((40, 16), 256), ((3, 1001), 256), ((70, 100), 50)]
SHAPES += [((5, 999), 32), ((), 256), ((1,), 256), ((0, 300), 256), ((2, 5000), 2048)]


@functools.partial(jax.jit, static_argnames=("step",))
def run(scalars, arrays, step):
    return update(scalars, *arrays, step=step)


def scalars_of(step, seed=0):
    """Draws scalars between zero and one, in the order of the leaves."""
    rng = np.random.default_rng(seed)
    count = max(step.scalars.num_leaves, 1)
    return jnp.asarray(rng.uniform(0.05, 0.95, count), jnp.float32)


def arrays_of(step, shape, has_param, grad_dtype=jnp.float32, param_dtype=jnp.float32):
    """Draws a gradient, a parameter and a state, with blocks of zeros and extremes."""
    rng = np.random.default_rng(0)
    grad = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    param = rng.standard_normal(shape).astype(np.float32)
    moments = []
    for _ in step.signed:
        absmax = rng.uniform(0.5, 2, step.layout.absmax_shape).astype(np.float32)
        absmax.reshape(-1)[1:2] = 0
        moments.append((rng.integers(0, 256, shape, np.uint8), absmax))
    params = [jnp.asarray(param).astype(param_dtype)] if has_param else []
    codes, absmax = ([jnp.asarray(m[i]) for m in moments] for i in (0, 1))
    return [jnp.asarray(grad).astype(grad_dtype), *params, *codes, *absmax]


def with_shape(step, shape, block_size):
    return dataclasses.replace(step, layout=block_layout(shape, block_size))


def split(arrays, step, has_param):
    """Returns ``(grad, param, moments)``."""
    count, first = len(step.signed), 1 + has_param
    codes, absmax = arrays[first : first + count], arrays[first + count :]
    moments = tuple(map(Moment, codes, absmax, step.signed))
    return arrays[0], arrays[1] if has_param else None, moments


def exact_moments(step, scalars, arrays, has_param):
    """Computes the new moments in float32, before they are encoded, as blocks."""
    grad, _, moments = split(arrays, step, has_param)
    outer, inner = grad.shape[: step.layout.axis], grad.shape[step.layout.axis :]
    rows = (int(np.prod(outer)), int(np.prod(inner)))
    size = step.layout.size

    def blocks(x, fill):
        x = np.asarray(x).reshape(rows)
        x = np.pad(x, ((0, 0), (0, -rows[1] % size)), constant_values=fill)
        return x.reshape(-1, size)

    old = tuple(
        LEVELS[m.signed][blocks(m.codes, ZERO_CODE[m.signed])]
        * np.asarray(m.absmax).reshape(-1, 1)
        for m in moments
    )
    tree = step.scalars.unflatten(list(scalars[: step.scalars.num_leaves]))
    g = blocks(grad.astype(jnp.float32), 0)
    _, kept = step.rule.apply(tree, *jax.tree.map(jnp.asarray, (g, old)))
    return [np.asarray(k, np.float64) for k in kept], blocks


def assert_encoded(step, scalars, arrays, results, has_param):
    """New codes are the nearest, up to roundings of a step."""
    exact, blocks = exact_moments(step, scalars, arrays, has_param)
    count = len(step.signed)
    new_codes, new_absmax = results[1 : 1 + count], results[1 + count :]
    for signed, moment, codes, absmax in zip(
        step.signed, exact, new_codes, new_absmax, strict=True
    ):
        largest = np.abs(moment).max(axis=1, initial=0)
        got = np.asarray(absmax, np.float64).reshape(-1)
        np.testing.assert_allclose(got, largest, rtol=errors.STEPPED)
        is_zero = largest < 1e-37
        scaled = moment / np.where(is_zero, 1, largest)[:, None]
        levels = LEVELS[signed].astype(np.float64)
        decoded = levels[blocks(codes, ZERO_CODE[signed])]
        # No positive square is stored as zero.
        nearest = errors.nearest(scaled, LEVELS[signed][0 if signed else 1 :])
        farther = np.abs(decoded - scaled) - np.abs(nearest - scaled)
        assert farther[~is_zero].max(initial=0) <= errors.STEPPED
        assert not decoded[largest == 0].any()
        if not signed:
            assert ((decoded > 0) == (scaled > 0))[~is_zero].all()


def assert_result(step, scalars, arrays, result, has_param):
    """The result is right up to roundings, of the decoded moments too."""
    grad, param, moments = split(arrays, step, has_param)
    tree = step.scalars.unflatten(list(scalars[: step.scalars.num_leaves]))

    def expected(moments):
        block_size = step.layout.size
        x, _ = update_8bit(
            step.rule,
            tree,
            grad.astype(jnp.float32),
            moments,
            None if param is None else param.astype(jnp.float32),
            block_size=block_size,
            implementation="reference",
        )
        return np.asarray(x, np.float64)

    want = expected(moments)
    # A level is off by a relative 2^-21; four roundings of a step as much together.
    allowed = 2.0**-21 * np.abs(want) + 2.0**-21
    for i in range(len(moments)):
        off = [
            dataclasses.replace(m, absmax=m.absmax * (1 + 2.0**-16 * (i == k)))
            for k, m in enumerate(moments)
        ]
        allowed += np.abs(expected(tuple(off)) - want) / 16
    unit = errors.unit_roundoff(result.dtype)
    allowed += unit * np.abs(want)
    got = np.asarray(result, np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    is_finite = np.isfinite(want)
    is_off = np.abs(got - want)[is_finite] > allowed[is_finite]
    # A sign turns where its argument is rounded to the other side of zero.
    assert is_off.mean() <= 1e-3 if is_off.size else True


@every_isa
@every_step
def test_a_step_is_the_specification(title, isa):
    step, has_param = STEPS[title]
    shape = (4, 600)
    step = with_shape(step, shape, 256)
    scalars, arrays = scalars_of(step), arrays_of(step, shape, has_param)
    with using(isa):
        results = run(scalars, arrays, step)
    assert_encoded(step, scalars, arrays, results, has_param)
    assert_result(step, scalars, arrays, results[0], has_param)


@every_isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("title", ["adam, a step with weight decay", "lion, an update"])
def test_any_shape(title, shape, isa):
    shape, block_size = shape
    step, has_param = STEPS[title]
    step = with_shape(step, shape, block_size)
    scalars, arrays = scalars_of(step), arrays_of(step, shape, has_param)
    with using(isa):
        results = run(scalars, arrays, step)
    for got, like in zip(results[1:], arrays[1 + has_param :], strict=True):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    if arrays[0].size:
        assert_encoded(step, scalars, arrays, results, has_param)


@every_isa
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16, None])
def test_dtypes(grad_dtype, param_dtype, isa):
    has_param = param_dtype is not None
    step, _ = STEPS["adam, a step" if has_param else "adam, an update"]
    shape = (3, 700)
    step = with_shape(step, shape, 256)
    scalars = scalars_of(step)
    arrays = arrays_of(step, shape, has_param, grad_dtype, param_dtype)
    with using(isa):
        results = run(scalars, arrays, step)
    assert results[0].dtype == (param_dtype if has_param else grad_dtype)
    assert_encoded(step, scalars, arrays, results, has_param)
    assert_result(step, scalars, arrays, results[0], has_param)


@every_isa
@every_step
def test_the_interpreter_computes_the_same(title, isa):
    """One more scalar, and the rule is not among those that the compiler knows."""
    step, has_param = STEPS[title]
    shape = (6, 777)
    step = with_shape(step, shape, 256)
    scalars, arrays = scalars_of(step), arrays_of(step, shape, has_param)
    count = step.scalars.num_leaves

    def apply(function):
        return lambda s, *args: function(step.scalars.unflatten(s[:count]), *args)

    rule = step.rule
    finish = None if rule.finish is None else apply(rule.finish)
    unknown = Rule(apply(rule.advance), apply(rule.direction), finish)
    structure = jax.tree.structure([0.0] * (count + 1))
    interpreted = dataclasses.replace(step, rule=unknown, scalars=structure)
    with using(isa):
        want = run(scalars, arrays, step)
        got = run(jnp.append(scalars, 0), arrays, interpreted)
    for a, b in zip(got, want, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@every_step
def test_instruction_sets_compute_the_same(title):
    step, has_param = STEPS[title]
    shape = (5, 999)
    step = with_shape(step, shape, 256)
    scalars, arrays = scalars_of(step), arrays_of(step, shape, has_param)
    with using("avx2"):
        want = jax.tree.map(np.asarray, run(scalars, arrays, step))
    with using("avx512"):
        got = run(scalars, arrays, step)
    for a, b in zip(got, want, strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()


@every_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_bad_gradient_element_spoils_only_itself(value, isa):
    step, has_param = STEPS["adam, a step"]
    shape = (2, 512)
    step = with_shape(step, shape, 256)
    scalars, arrays = scalars_of(step), arrays_of(step, shape, has_param)
    bad = [arrays[0].at[1, 300].set(value), *arrays[1:]]
    good = [arrays[0].at[1, 300].set(0.0), *arrays[1:]]
    with using(isa):
        got, want = run(scalars, bad, step), run(scalars, good, step)
    is_bad = np.zeros(shape, bool)
    is_bad[1, 300] = True
    assert np.isnan(np.asarray(got[0])[is_bad]).all()
    assert np.array_equal(np.asarray(got[0])[~is_bad], np.asarray(want[0])[~is_bad])
    assert_encoded(step, scalars, bad, got, has_param)


@every_isa
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-19, 1e-10, 1e10, 1e18])
def test_moments_of_any_magnitude(scale, isa):
    step, has_param = STEPS["adam, an update"]
    step = with_shape(step, (4, 256), 256)
    scalars, arrays = scalars_of(step), arrays_of(step, (4, 256), has_param)
    grad, *state = arrays
    absmax = [a * s for a, s in zip(state[2:], (scale, scale**2), strict=True)]
    arrays = [grad * scale, *state[:2], *(jnp.float32(a) for a in absmax)]
    with using(isa):
        results = run(scalars, arrays, step)
    assert_encoded(step, scalars, arrays, results, has_param)


@every_isa
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_decision_point(signed, isa):
    """On either side of the middle between two levels, the code is the nearer one's."""
    levels = LEVELS[signed].astype(np.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    off = np.abs(middles) * 2**-20
    # The largest magnitude of a block, zero, and a number far below the levels.
    row = np.concatenate([middles - off, middles + off, [1, 0, 1e-12]])
    tiny = 127 if signed else 1  # no positive square is stored as zero
    expected = [*range(255), *range(1, 256), 255, ZERO_CODE[signed], tiny]
    expected[0] = 0 if signed else tiny
    sizes = [1.0, 1.9999, 3e-19, 0.7, 1.8e19, 5e-25]
    values = jnp.asarray(np.outer(sizes, row), jnp.float32)
    rule = Rule(lambda s, g, old: (g,), lambda s, g, old, new: g)
    step = Step(rule, jax.tree.structure(0.0), (signed,), None)
    step = with_shape(step, values.shape, row.size)
    arrays = arrays_of(step, values.shape, False)
    with using(isa):
        results = run(scalars_of(step), [values, *arrays[1:]], step)
    np.testing.assert_array_equal(results[1], [expected] * len(sizes))


@every_isa
@pytest.mark.parametrize("shape", [(3, 600), (7, 33)], ids=str)
def test_examples_have_their_own_scalars(shape, isa):
    """Those of an odd size begin anywhere in memory, except for the first."""
    step, has_param = STEPS["adam, a step"]
    step = with_shape(step, shape, 256)
    arrays = arrays_of(step, shape, has_param)
    scalars = jnp.stack([scalars_of(step, seed) for seed in range(4)])
    stacked = [jnp.stack([a, a[::-1], a, a]) for a in arrays]
    with using(isa):
        together = run(scalars, stacked, step)
        for i in range(4):
            alone = run(scalars[i], [a[i] for a in stacked], step)
            for a, b in zip(together, alone, strict=True):
                assert np.array_equal(a[i], b)


def test_it_is_done_in_place():
    library()
    step, has_param = STEPS["adam, a step"]
    step = with_shape(step, (64, 1024), 256)
    scalars, arrays = scalars_of(step), arrays_of(step, (64, 1024), has_param)

    def call(state, scalars, grad):
        return update(scalars, grad, *state, step=step)

    compiled = jax.jit(call, donate_argnums=0).lower(arrays[1:], scalars, arrays[0])
    compiled = compiled.compile()
    assert " copy(" not in compiled.as_text()
    addresses = [a.unsafe_buffer_pointer() for a in arrays[1:]]
    results = compiled(arrays[1:], scalars, arrays[0])
    assert [a.unsafe_buffer_pointer() for a in results] == addresses


@pytest.mark.parametrize(
    ("advance", "message"),
    [
        (lambda s, g, old: (jnp.exp(old[0]),), "exp"),
        (lambda s, g, old: (old[0] + jnp.arange(2.0)[1:],), "support"),
        (
            lambda s, g, old: (old[0].astype(jnp.bfloat16).astype(jnp.float32),),
            "bfloat16",
        ),
        (lambda s, g, old: (jnp.cumsum(old[0]),), "support"),
    ],
)
def test_other_rules_are_refused(advance, message):
    rule = Rule(advance, lambda s, g, old, new: new[0])
    step = Step(rule, jax.tree.structure(0.0), (True,), block_layout((256,), 256))
    with pytest.raises(NotImplementedError, match=message):
        compile_rule(step, has_param=False)


def test_a_long_rule_is_refused():
    def advance(s, g, old):
        values = [old[0] * k for k in range(200)]
        return (functools.reduce(lambda a, b: jnp.maximum(b, a), values[::-1], g),)

    rule = Rule(advance, lambda s, g, old, new: new[0])
    step = Step(rule, jax.tree.structure(0.0), (True,), block_layout((256,), 256))
    with pytest.raises(NotImplementedError, match="up to 128 values"):
        compile_rule(step, has_param=False)


EVERYTHING = Rule(
    advance=lambda s, g, old: (
        jnp.where((g > s) & ~(g >= 2 * s) | (g == 0), -old[0], jnp.sign(g) * 0.5),
        jnp.minimum(jnp.maximum(old[1], jnp.abs(g)), s),
    ),
    direction=lambda s, g, old, new: (
        jnp.where(new[0] != new[1], new[0] - new[1] * g, s)
        + jax.lax.rsqrt(new[1] + 1)
        - jnp.square(g) * (g <= s).astype(jnp.float32)
    ),
)


@every_isa
def test_a_rule_of_all_operations(isa):
    """Everyone's own rule is interpreted."""
    step = Step(EVERYTHING, jax.tree.structure(0.0), (True, False), None)
    step = with_shape(step, (9, 500), 64)
    scalars, arrays = scalars_of(step), arrays_of(step, (9, 500), False)
    with using(isa):
        results = run(scalars, arrays, step)
    assert_encoded(step, scalars, arrays, results, False)
    assert_result(step, scalars, arrays, results[0], False)


def test_outputs_may_be_inputs_or_the_same():
    library()
    rule = Rule(
        advance=lambda s, g, old: (old[1], old[1]),
        direction=lambda s, g, old, new: new[1],
    )
    step = Step(rule, jax.tree.structure(0.0), (True, True), None)
    step = with_shape(step, (4, 256), 256)
    scalars, arrays = scalars_of(step), arrays_of(step, (4, 256), False)
    _, first, second, *absmax = run(scalars, arrays, step)
    assert np.array_equal(first, second)
    assert np.array_equal(*absmax)
    again = run(scalars, [arrays[0], first, second, *absmax], step)
    assert np.array_equal(again[1], second)


def test_fused_and_shared_instructions():
    step, has_param = STEPS["adam, a step with weight decay"]
    names = [Op(line[0]).name for line in compile_rule(step, has_param).instructions]
    assert names == [
        "NEG",
        "SUM_OF_PRODUCTS",
        "PRODUCT",
        "FMA",
        "PRODUCT",
        "SELECT_FINITE_SUM",
        "SELECT_FINITE_SUM",
        "SQRT_OF_FMA",
        "QUOTIENT",
        "ADD",
        "FMA",
        "FMA",
    ]


def test_the_compiler_knows_our_rules():
    assert known_rules.PATH.read_text() == known_rules.header()


@pytest.mark.parametrize(
    ("make", "has_decay"),
    [
        (jaxbnb.adam8bit, False),
        (jaxbnb.adamw8bit, True),
        (functools.partial(jaxbnb.adamw8bit, nesterov=True), True),
        (jaxbnb.lion8bit, True),
        (jaxbnb.sgd8bit, False),
        (functools.partial(jaxbnb.sgd8bit, nesterov=True), False),
        (jaxbnb.rmsprop8bit, False),
        (functools.partial(jaxbnb.rmsprop8bit, centered=True), False),
        (jaxbnb.adagrad8bit, False),
        (jaxbnb.ademamix8bit, True),
    ],
)
def test_a_fused_step_is_known(make, has_decay, monkeypatch):
    """What an optimizer passes to the op is a program of the header."""
    programs = []

    def spy(rule, scalars, grad, moments, param, *, block_size):
        signed = tuple(m.signed for m in moments)
        layout = block_layout(grad.shape, block_size)
        step = Step(rule, jax.tree.structure(scalars), signed, layout)
        programs.append((compile_rule(step, param is not None), signed))
        return update_8bit(rule, scalars, grad, moments, param, block_size=block_size)

    monkeypatch.setattr("jaxbnb.optim._elementwise.update_8bit", spy)
    tx = make(0.1)
    params = jnp.ones((64, 128))
    jaxbnb.optim.fused_step(tx)(params, tx.init(params), params)
    known = [(compile_rule(step, p), step.signed) for step, p in STEPS.values()]
    assert programs
    assert all(program in known for program in programs)


def digest_of_results():
    """A digest of a step's results, with this process's threads."""
    library()
    step, has_param = STEPS["adam, a step"]
    step = with_shape(step, (300, 1000), 256)
    digest = hashlib.sha256()
    for array in run(scalars_of(step), arrays_of(step, (300, 1000), has_param), step):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


@alone
def test_numbers_do_not_depend_on_threads():
    check_threads("test_cpu_update", digest_of_results())
