"""jaxbnb against what bitsandbytes itself computed; README.md here says how.

Codes, absmax and decoded values have the same bytes, with these exceptions. All are on
purpose and have a test here:

* FP4 has two codes for zero. Upstream gives 8 to tiny positive values and 0 to tiny
  negative ones; jaxbnb stores 0 for both. Both libraries decode both codes to zero.
* Upstream divides a short last block by its absmax, and multiplies a full one by the
  reciprocal. jaxbnb always multiplies, so values on a decision point may go either way.
* Upstream cuts the flattened tensor into blocks, jaxbnb each row. They agree if rows
  are whole blocks, and on the flattened tensor itself.
* jaxbnb computes the dynamic 8-bit codes by arithmetic. Within a relative 2^-20 of a
  decision point, it may take either neighbour.
* 8-bit Adam in jaxbnb never stores a nonzero second moment as zero.
* LLM.int8 divides by 127 squared. Upstream's constant for that lacks a digit.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb_kernels import codebooks
from jaxbnb_kernels.matmul_int8 import outlier_columns, quantize_rows
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax

HERE = pathlib.Path(__file__).parent
GOLDEN = {path.stem: dict(np.load(path)) for path in HERE.glob("*.npz")}
GRADIENTS = types.SimpleNamespace(**runpy.run_path(str(HERE / "gradients.py")))

LEVELS = {
    "nf4": codebooks.NF4,
    "fp4": codebooks.FP4,
    "signed": codebooks.DYNAMIC8_SIGNED,
    "unsigned": codebooks.DYNAMIC8_UNSIGNED,
}


def bits(x):
    """Distinguishes -0.0 from 0.0."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def unpack(packed):
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)


def nearest(x, levels):
    """Returns codes by counting the float32 mid-points strictly below."""
    points, codes = codebooks.decision_points(levels)
    return codes[np.searchsorted(points, x, side="left")]


# --- The codebooks.


def test_codebooks():
    golden = GOLDEN["codebooks"]
    for ours, theirs in [
        (codebooks.NF4, golden["nf4"]),
        (codebooks.DYNAMIC8_SIGNED, golden["dynamic_signed"]),
        (codebooks.DYNAMIC8_UNSIGNED, golden["dynamic_unsigned"]),
    ]:
        np.testing.assert_array_equal(bits(ours), bits(theirs))
    # Upstream drops the sign of FP4's bit pattern 1000.
    differ = bits(codebooks.FP4) != bits(golden["fp4"])
    assert np.flatnonzero(differ).tolist() == [8]
    assert (codebooks.FP4[8], golden["fp4"][8]) == (0.0, 0.0)


# --- 4 bits.

FOUR_BIT = [
    (quant_type, case, block_size)
    for quant_type in ("nf4", "fp4")
    for case in ("normal", "planted", "short")
    for block_size in (64, 128)
]
four_bit = pytest.mark.parametrize(("quant_type", "case", "block_size"), FOUR_BIT)


def four_bit_golden(quant_type, case, block_size):
    golden = GOLDEN[quant_type]
    keys = ("packed", "absmax", "float32", "bfloat16")
    return golden[case], *(golden[f"{case}_{block_size}_{key}"] for key in keys)


def without_second_zero(codes, quant_type):
    """Replaces upstream's FP4 code 8, which stands for zero, by 0."""
    return np.where(codes == 8, 0, codes) if quant_type == "fp4" else codes


def quantized_forms(x, quant_type, block_size):
    """Quantises the flattened tensor and, if possible, a dense layer's kernel.

    A torch weight is (out, in); ours is (in, out), blocked along the axis -2.
    """
    flat = jaxbnb.quantize(
        jnp.asarray(x.reshape(-1)), quant_type, block_size=block_size
    )
    yield flat, lambda decoded: decoded
    if x.shape[1] % block_size == 0:
        kernel = jnp.asarray(x).T
        q = jaxbnb.quantize(kernel, quant_type, block_size=block_size, axis=-2)
        assert q.shape == x.shape[::-1]
        yield q, lambda decoded: decoded.T


@four_bit
def test_four_bit(quant_type, case, block_size):
    x, packed, absmax, float32, bfloat16 = four_bit_golden(quant_type, case, block_size)
    # `short` has 183 elements. Its short last block has its own test.
    whole = x.size // block_size * block_size if case == "short" else x.size
    for q, torch_order in quantized_forms(x, quant_type, block_size):
        got = unpack(np.asarray(q.codes).reshape(-1))[:whole]
        want = unpack(packed)[:whole]
        np.testing.assert_array_equal(got, without_second_zero(want, quant_type))
        np.testing.assert_array_equal(bits(q.absmax).reshape(-1), bits(absmax))
        for dtype, decoded in ((jnp.float32, bits(float32)), (jnp.bfloat16, bfloat16)):
            got = bits(torch_order(q.dequantize(dtype))).reshape(-1)[:whole]
            np.testing.assert_array_equal(got, decoded.reshape(-1)[:whole])


def test_both_forms_were_compared():
    forms = {key: 0 for key in FOUR_BIT}
    for key in FOUR_BIT:
        x = GOLDEN[key[0]][key[1]]
        forms[key] = len(list(quantized_forms(x, key[0], key[2])))
    assert [key[1:] for key, count in forms.items() if count == 2] == 2 * [
        ("normal", 64),
        ("planted", 64),
    ]


def test_how_often_upstream_uses_the_second_zero_of_fp4():
    """It is 40 of 12,288 codes on normal values, so it matters."""
    _, packed, *_ = four_bit_golden("fp4", "normal", 128)
    assert np.sum(unpack(packed) == 8) == 40
    q = jaxbnb.quantize(jnp.asarray(GOLDEN["fp4"]["normal"]), "fp4", block_size=64)
    assert not np.any(unpack(np.asarray(q.codes)) == 8)


@pytest.mark.parametrize(("quant_type", "differ"), [("nf4", 8), ("fp4", 3)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_the_short_last_block(quant_type, block_size, differ):
    """Compares upstream's x / 7 with our x * (1 / 7), on mid-points times 7.

    Each equals its own formula bit for bit, including the last byte's padding.
    """
    x, packed, absmax, *_ = four_bit_golden(quant_type, "short", block_size)
    q = jaxbnb.quantize(jnp.asarray(x.reshape(-1)), quant_type, block_size=block_size)
    tail = np.append(x.reshape(-1)[128:], np.float32(0))
    seven = np.float32(7)
    np.testing.assert_array_equal(absmax, seven)
    ours = nearest(tail * (np.float32(1) / seven), LEVELS[quant_type])
    theirs = nearest(tail / seven, LEVELS[quant_type])
    np.testing.assert_array_equal(unpack(np.asarray(q.codes))[128:], ours)
    golden = without_second_zero(unpack(packed)[128:], quant_type)
    np.testing.assert_array_equal(golden, theirs)
    assert np.sum(ours != theirs) == differ


@four_bit
def test_upstreams_bytes_decode_to_upstreams_values(quant_type, case, block_size):
    """All of a checkpoint that bitsandbytes wrote decodes, even short blocks."""
    x, packed, absmax, float32, bfloat16 = four_bit_golden(quant_type, case, block_size)
    q = jaxbnb.quantize(jnp.asarray(x.reshape(-1)), quant_type, block_size=block_size)
    q = dataclasses.replace(q, codes=jnp.asarray(packed), absmax=jnp.asarray(absmax))
    # Compared as values: FP4's code 8 decodes to +0.0 there, to -0.0 here.
    np.testing.assert_array_equal(q.dequantize(), float32.reshape(-1))
    want = jnp.asarray(bfloat16.reshape(-1)).view(jnp.bfloat16)
    np.testing.assert_array_equal(q.dequantize(jnp.bfloat16), want)


# --- Double quantisation.


def double_quant_input():
    golden = GOLDEN["double_quant"]
    scale = golden["input_scale"].astype(np.float32)[:, None]
    blocks = golden["input_int8"].reshape(-1, 64).astype(np.float32) * scale
    return blocks.reshape(256, 576)


@pytest.mark.parametrize("form", ["flattened", "kernel"])
def test_double_quant(form):
    golden, x = GOLDEN["double_quant"], jnp.asarray(double_quant_input())
    if form == "flattened":
        q = jaxbnb.quantize(x.reshape(-1), "nf4", double_quant=True)
    else:
        q = jaxbnb.quantize(x.T, "nf4", axis=-2, double_quant=True)
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), golden["packed"])
    # The mean of 2,304 float32, summed in another order, is within one step of the last
    # bit of upstream's and of the exact mean.
    offset = np.asarray(q.offset).reshape(1)
    blocks = np.abs(double_quant_input().reshape(-1, 64)).astype(np.float64)
    exact = blocks.max(axis=1).mean()
    assert np.abs(offset - golden["offset"]) <= np.spacing(golden["offset"])
    assert np.abs(offset - exact) <= np.spacing(golden["offset"])
    # That step moves every absmax - offset by as much. None is within twenty such steps
    # of a decision point of the 8-bit map.
    np.testing.assert_array_equal(
        np.asarray(q.absmax).reshape(-1), golden["absmax_codes"]
    )
    step = float(np.spacing(golden["offset"])[0])
    nested = np.asarray(q.nested_absmax).reshape(-1)
    np.testing.assert_allclose(nested, golden["nested_absmax"], rtol=2**-23, atol=step)
    # level * nested + offset, |level| <= 1, may differ by a step of the offset, a step
    # of the nested absmax, and half a step for each rounding of product and sum, there
    # and here.
    absmax = dequantize_absmax(q.absmax, q.nested_absmax, q.offset)
    absmax = np.asarray(absmax).reshape(-1)
    product, total = float(np.spacing(nested.max())), float(np.spacing(absmax.max()))
    np.testing.assert_allclose(
        absmax, golden["absmax_float32"], rtol=0, atol=step + 2 * product + total
    )


def test_upstreams_doubly_quantised_bytes_decode_to_upstreams_values():
    """A doubly quantised checkpoint that bitsandbytes wrote decodes.

    Upstream rounds level * nested_absmax before it adds the offset. Compiled, we may
    not, so our absmax may be more exact by up to a float32 step. With upstream's absmax
    all bits agree: 16 rows are compared, and a hash of all rows.
    """
    golden = GOLDEN["double_quant"]
    q = jaxbnb.quantize(
        jnp.asarray(double_quant_input().reshape(-1)), "nf4", double_quant=True
    )
    children = {
        "codes": golden["packed"],
        "absmax": golden["absmax_codes"],
        "nested_absmax": golden["nested_absmax"],
        "offset": golden["offset"].reshape(()),
    }
    q = dataclasses.replace(q, **{k: jnp.asarray(v) for k, v in children.items()})
    absmax = jax.jit(dequantize_absmax)(q.absmax, q.nested_absmax, q.offset)
    apart = np.abs(np.asarray(absmax) - golden["absmax_float32"])
    assert np.all(apart <= np.spacing(golden["absmax_float32"]))
    # That step is at most a relative 2^-23, and so is the product's rounding.
    np.testing.assert_allclose(
        np.asarray(q.dequantize()).reshape(256, 576)[:16],
        golden["float32_head"],
        rtol=2 * 2**-23,
    )
    plain = dataclasses.replace(
        q, absmax=jnp.asarray(golden["absmax_float32"]), nested_absmax=None, offset=None
    )
    decoded = np.asarray(plain.dequantize()).reshape(256, 576)
    np.testing.assert_array_equal(bits(decoded[:16]), bits(golden["float32_head"]))
    digest = hashlib.sha256(decoded.astype("<f4").tobytes()).digest()
    assert digest == golden["float32_sha256"].tobytes()


# --- 8 bits.


@pytest.mark.parametrize("block_size", [256, 64])
@pytest.mark.parametrize("case", ["normal", "planted", "short"])
@pytest.mark.parametrize("signed", ["signed", "unsigned"])
def test_dynamic8(signed, case, block_size):
    golden = GOLDEN["dynamic8"]
    x = golden[f"{signed}_{case}"].reshape(-1)
    codes, absmax, decoded = (
        golden[f"{signed}_{case}_{block_size}_{key}"].reshape(-1)
        for key in ("codes", "absmax", "float32")
    )
    quant_type = "dynamic8" if signed == "signed" else "dynamic8_unsigned"
    q = jaxbnb.quantize(jnp.asarray(x), quant_type, block_size=block_size)
    np.testing.assert_array_equal(bits(q.absmax), bits(absmax))
    got = np.asarray(q.codes)
    differ = got != codes
    np.testing.assert_array_equal(bits(q.dequantize())[~differ], bits(decoded)[~differ])
    # Where they differ, the value is within a relative 2^-20 of a decision point.
    levels = LEVELS[signed].astype(np.float64)
    points = (levels[:-1] + levels[1:]) / 2
    scaled = x / np.repeat(absmax.astype(np.float64), block_size)[: x.size].clip(1e-38)
    assert np.all(np.abs(got.astype(int) - codes) <= 1)
    crossed = points[np.minimum(got, codes)[differ]]
    assert np.all(np.abs(scaled[differ] - crossed) <= 2**-20 * np.abs(crossed))
    # None of the 6,144 drawn values are that close. Planted values are (the points,
    # their neighbours and two thresholds nearby; in `short` two copies of the points),
    # but at most a third of them differ: the rest round to the right side.
    close = np.any(np.abs(scaled[:, None] - points) <= 2**-20 * np.abs(points), axis=1)
    if case == "normal":
        assert differ.sum() == 0
    else:
        assert close.sum() == {"planted": 3 * 255 + 2, "short": 2 * 255}[case]
        assert differ.sum() <= close.sum() / 3


# --- 8-bit Adam: 50 steps without syncing again.

STORED = (1, 2, 10, 50)
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
OPTIMIZERS = {
    "adam": lambda: jaxbnb.adam8bit(LEARNING_RATE),
    "adamw": lambda: jaxbnb.adamw8bit(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def trajectory(request):
    """Returns the name, and parameter and state after each step, from step 0 on."""
    tx = OPTIMIZERS[request.param]()
    params = jnp.asarray(GRADIENTS.initial())
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    steps = [(params, state[0])]
    for t in range(1, GRADIENTS.STEPS + 1):
        params, state = step(params, state, jnp.asarray(GRADIENTS.gradient(t)))
        steps.append((params, state[0]))
    return request.param, jax.tree.map(np.asarray, steps)


def ordinary_rows(rows=GRADIENTS.SHAPE[0]):
    """Returns the rows where upstream's second moment does not underflow to zero."""
    ordinary = np.ones(rows, bool)
    ordinary[GRADIENTS.UNDERFLOW_ROWS] = False
    return ordinary


@pytest.mark.parametrize("t", [1, 50])
def test_adam_state(trajectory, t):
    golden, (_, state) = GOLDEN["adam8bit"], trajectory[1][t]
    # A fused product and sum rounds once, else twice. The difference is at most t half
    # steps of float32 in the terms of a block's largest moment.
    for ours, key in ((state.mu_absmax, "m_absmax"), (state.nu_absmax, "v_absmax")):
        want = golden[f"{key}_{t}"].reshape(ours.shape)
        np.testing.assert_allclose(ours, want, rtol=2 * t * 2**-24)
    # A rounding of 2^-24 changes a code if a decision point lies in between, and these
    # are about 2^-6 apart. That is 5 of the 50 x 14,336 codes; 20 is 6 sigma.
    rows = ordinary_rows()
    for ours, key in ((state.mu, "m_codes"), (state.nu, "v_codes")):
        want = golden[f"{key}_{t}"]
        differ = (ours != want)[rows]
        assert differ.sum() <= (0 if t == 1 else 20)
        assert np.all(np.abs(ours.astype(int) - want)[rows] <= 1)


@pytest.mark.parametrize("t", [1, 50])
def test_adam_never_stores_a_positive_second_moment_as_zero(trajectory, t):
    """This is the only difference in the rows that underflow.

    At first jaxbnb has code 1 where upstream has 0. Later steps add to that level, so
    some of the lowest codes are one higher.
    """
    ours = trajectory[1][t][1].nu[~ordinary_rows()]
    theirs = GOLDEN["adam8bit"][f"v_codes_{t}"][~ordinary_rows()]
    differ = ours != theirs
    assert np.mean(differ) > 0.2
    np.testing.assert_array_equal(ours[differ], theirs[differ] + 1)
    assert theirs[differ].max() <= (0 if t == 1 else 2)
    # Elements without any gradient stay zero.
    gradients = [GRADIENTS.gradient(i) for i in range(1, t + 1)]
    untouched = np.all(np.stack(gradients) == 0, axis=0)[~ordinary_rows()]
    np.testing.assert_array_equal(ours == 0, untouched)


def parameter_tolerance(name, trajectory, t):
    """Returns how far apart parameters may be after t steps, element by element.

    Upstream forms 1 - b^t in double, optax and jaxbnb in float32. In float32 b2 = 0.999
    is off by up to 2^-25, and its power, about 1, by another two halves of 2^-24 per
    step of pow. So 1 - b2^t, about t / 1000, is off by a relative
    (t 2^-25 + 2 2^-24) 1000 / t, and the root halves that: 7e-5 at t = 1. For b1 = 0.9
    it is (t 2^-25 b1^t + 2 2^-24) / (1 - b1^t). Division, root and products add a few
    2^-24.

    Adding the update rounds the parameter by 2^-24 |p|, there and here. Upstream's
    decay multiplies by a rounded 1 - lr * wd and rounds again: 2^-25 + 2^-24.
    """
    total = np.zeros(GRADIENTS.SHAPE)
    for s in range(1, t + 1):
        before, after = (trajectory[i][0].astype(np.float64) for i in (s - 1, s))
        decay = LEARNING_RATE * WEIGHT_DECAY * before if name == "adamw" else 0.0
        b1, b2 = 0.9**s, 0.999**s
        of_mu = (s * 2**-25 * b1 + 2 * 2**-24) / (1 - b1)
        of_nu = (s * 2**-25 * b2 + 2 * 2**-24) / (1 - b2)
        relative = of_mu + of_nu / 2 + 8 * 2**-24
        roundings = 3.5 if name == "adamw" else 2
        step = np.abs(after - before + decay)
        total += relative * step + roundings * 2**-24 * np.abs(after)
    return total


@pytest.mark.parametrize("t", STORED)
def test_adam_parameters(trajectory, t):
    name, steps = trajectory
    ours, theirs = steps[t][0][:8], GOLDEN["adam8bit"][f"{name}_{t}"]
    tolerance = parameter_tolerance(name, steps, t)[:8]
    rows = ordinary_rows(8)
    assert np.all(np.abs(ours - theirs)[rows] <= tolerance[rows])
    # The tolerance is meaningful: a hundredth of a step for each element.
    assert np.median(tolerance[rows]) < 0.01 * LEARNING_RATE * t
    # The first step agrees everywhere, because it uses the moments before storage.
    if t == 1:
        assert np.all(np.abs(ours - theirs) <= tolerance)


def test_parameters_stay_bounded_where_upstreams_jump(trajectory):
    """Upstream divides by eps alone once a second moment is stored as zero.

    A step of Adam is at most lr (1 - b1) / sqrt(1 - b2) = 3.2 lr, and the decay of
    parameters up to 3.1 adds another 0.3 lr.
    """
    name, steps = trajectory
    row, initial = ~ordinary_rows(8), GRADIENTS.initial()[:8]
    theirs = GOLDEN["adam8bit"][f"{name}_50"]
    assert np.abs(theirs - initial)[row].max() > 100
    for before, after in itertools.pairwise(steps):
        move = np.abs(after[0] - before[0])
        assert move.max() <= 3.5 * LEARNING_RATE


# --- LLM.int8.

INT8 = GOLDEN["llm_int8"]
DTYPES = ["float32", "float16", "bfloat16"]


def int8_array(key, dtype):
    """Returns a stored result as float64. 16-bit results are stored as their bits."""
    stored = INT8[f"{key}_{dtype}"]
    return stored.view(jnp.dtype(dtype)).astype(np.float64)


def int8_weight(dtype=jnp.float32):
    weight = jnp.asarray(INT8["weight"].T, dtype)
    return jax.jit(lambda w: jaxbnb.quantize(w, "llm_int8", axis=-2))(weight)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_int8_codes_and_scales_of_a_weight(dtype):
    q = int8_weight(dtype)
    np.testing.assert_array_equal(q.codes, INT8["codes"])
    np.testing.assert_array_equal(bits(q.absmax[:, 0]), bits(INT8["col_scale"]))


def test_int8_codes_and_scales_of_an_input():
    x = jnp.asarray(INT8["x"])
    columns = outlier_columns(x, 6.0)
    np.testing.assert_array_equal(np.flatnonzero(columns), INT8["outlier_columns"])
    codes, scale = jax.jit(quantize_rows)(jnp.where(jnp.abs(x) >= 6, 0, x))
    np.testing.assert_array_equal(jnp.where(columns, 0, codes), INT8["x_codes"])
    np.testing.assert_array_equal(bits(scale), bits(INT8["row_scale"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0, 6])
def test_int8_product(threshold, dtype):
    """It is upstream's, with its sum of integers divided by 127 squared."""
    x = jnp.asarray(INT8["x"]).astype(dtype)
    y = jax.jit(lambda x, q: jaxbnb.matmul(x, q, outlier_threshold=float(threshold)))(
        x, int8_weight()
    )
    assert y.dtype == dtype
    x64 = np.asarray(x).astype(np.float64)
    large = np.abs(x64) >= (threshold or np.inf)
    columns = large.any(axis=0)
    codes, scale = jax.jit(quantize_rows)(jnp.where(large, 0, x))
    sums = np.where(columns, 0, codes).astype(np.int64) @ INT8["codes"].T.astype(
        np.int64
    )
    scale = np.asarray(scale).astype(np.float64)
    inliers = sums * scale[:, None] * INT8["col_scale"] / 127**2
    theirs = int8_array(f"y_{threshold}", dtype)
    theirs = theirs - inliers * (6.200124e-05 * 127**2 - 1)

    levels = INT8["col_scale"][:, None].astype(np.float64) / 127 * INT8["codes"]
    terms = np.abs(x64 * columns) @ np.abs(levels.T)
    # Roundings on either side. Inliers: the sum to float32, and three products.
    # Outliers: three of a decoded weight, a sum of at most 4. One more adds the two.
    tolerance = 2 * 2**-24 * (5 * np.abs(inliers) + 8 * terms)
    if dtype != "float32":
        # A decoded weight may be the other side's neighbour. Both results are rounded,
        # and upstream rounds the inliers before it adds the outliers.
        half = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
        tolerance += half * (2 * terms + np.abs(inliers) + 2 * np.abs(theirs)) * 1.01
    assert np.all(np.abs(np.asarray(y).astype(np.float64) - theirs) <= tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0, 6])
def test_int8_gradient(threshold, dtype):
    x, dy = (jnp.asarray(INT8[key]).astype(dtype) for key in ("x", "dy"))
    q = int8_weight()
    (dx,) = jax.vjp(
        lambda x: jaxbnb.matmul(x, q, outlier_threshold=float(threshold)), x
    )[1](dy)
    assert dx.dtype == dtype
    theirs = int8_array(f"dx_{threshold}", dtype)
    levels = INT8["col_scale"][:, None].astype(np.float64) / 127 * INT8["codes"]
    terms = np.abs(np.asarray(dy).astype(np.float64)) @ np.abs(levels)
    # Roundings on either side: two of a decoded weight, and a sum of 48.
    tolerance = 2 * 2**-24 * 50 * terms
    if dtype != "float32":
        half = 2.0 ** -(jnp.finfo(dtype).nmant + 1)
        tolerance += half * (2 * terms + 2 * np.abs(theirs)) * 1.01
    assert np.all(np.abs(np.asarray(dx).astype(np.float64) - theirs) <= tolerance)
