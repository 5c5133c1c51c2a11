"""The optimizer goldens against their own definition, written out in NumPy.

`README.md` has the definition as a table. Here it is in float64, with the state in 8
bits as bitsandbytes keeps it. jaxbnb is not involved.
"""

import io
import json
import math
import pathlib
import pickle
import runpy
import types
import zipfile

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
TRAJECTORIES, STATE_DICT, ADAM, CODEBOOKS = (
    dict(np.load(HERE / f"{name}.npz"))
    for name in ("trajectories", "state_dict", "adam8bit", "codebooks")
)
GRADIENTS = types.SimpleNamespace(**runpy.run_path(str(HERE / "gradients.py")))
SHAPE, COLUMNS = (8, 512), slice(128, 384)
STORED = (1, 2, 5, 20, 50, 100, 200)

ADEMAMIX = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "decay": 1e-2}
ARGUMENTS = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "decay": 0.1},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "decay": 0.1},
    "sgd": {"lr": 1e-2, "momentum": 0.9, "decay": 1e-2},
    "ademamix": ADEMAMIX,
    "ademamix_scheduled": ADEMAMIX | {"t_alpha": 100, "t_beta3": 150},
    "rmsprop": {"lr": 1e-3, "alpha": 0.99, "decay": 0},
    "adagrad": {"lr": 1e-2, "decay": 0},
}
EVERY = pytest.mark.parametrize("name", ARGUMENTS)


# --- The definition.


def unsigned(name):
    """Returns, for each moment, whether its code is unsigned."""
    if name.startswith("ademamix"):
        return [False, False, True]
    return [False, True] if name.startswith("adam") else [False]


def step(name, a, t, g, p, old):
    """Takes a step: returns the parameter, and the moments before encoding."""
    lr, decay = a["lr"], a["decay"]
    if name.startswith("adam"):
        b1, b2 = a["betas"]
        m = b1 * old[0] + (1 - b1) * g
        v = b2 * old[1] + (1 - b2) * g * g
        denominator = np.sqrt(v) / math.sqrt(1 - b2**t) + 1e-8
        return p * (1 - lr * decay) - lr * m / (1 - b1**t) / denominator, [m, v]
    if name.startswith("ademamix"):
        b1, b2, b3 = a["betas"]
        alpha = a["alpha"] * min(t / a.get("t_alpha", t), 1)
        if "t_beta3" in a:
            part, x, y = t / a["t_beta3"], math.log(b1), math.log(b3)
            b3 = min(math.exp(x * y / ((1 - part) * y + part * x)), b3)
        m1 = b1 * old[0] + (1 - b1) * g
        m2 = b3 * old[1] + (1 - b3) * g
        v = b2 * old[2] + (1 - b2) * g * g
        denominator = np.sqrt(v) / math.sqrt(1 - b2**t) + 1e-8
        update = (m1 / (1 - b1**t) + alpha * m2) / denominator
        return p * (1 - lr * decay) - lr * update, [m1, m2, v]
    if name.startswith("lion"):
        b1, b2 = a["betas"]
        sign = np.sign(b1 * old[0] + (1 - b1) * g)
        return p * (1 - lr * decay) - lr * sign, [b2 * old[0] + (1 - b2) * g]
    g = g + decay * p
    if name.startswith("sgd"):
        m = a["momentum"] * old[0] + g
        return p - lr * m, [m]
    if name == "rmsprop":
        v = a["alpha"] * old[0] + (1 - a["alpha"]) * g * g
        return p - lr * g / (np.sqrt(v) + 1e-8), [v]
    v = old[0] + g * g
    return p - lr * g / (np.sqrt(v) + 1e-10), [v]


def blocks(x):
    flat = x.reshape(-1)
    return np.pad(flat, (0, -flat.size % 256)).reshape(-1, 256)


def levels(is_unsigned):
    return CODEBOOKS[f"dynamic_{'un' * is_unsigned}signed"].astype(np.float64)


def encode(moment, is_unsigned):
    """Returns codes in the moment's shape, and float32 absmax."""
    absmax = np.abs(blocks(moment)).max(axis=1).astype(np.float32)
    level = levels(is_unsigned)
    scaled = blocks(moment) / np.maximum(absmax, 1e-38)[:, None].astype(np.float64)
    codes = np.searchsorted((level[:-1] + level[1:]) / 2, scaled.clip(-1, 1))
    return codes.reshape(-1)[: moment.size].reshape(moment.shape), absmax


def decode(codes, absmax, is_unsigned):
    values = blocks(levels(is_unsigned)[codes]) * absmax[:, None].astype(np.float64)
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


@pytest.fixture(scope="module")
def defined():
    """Returns, for each run, parameters after 0, 1, 2, ... steps, codes and absmax."""
    runs = {}
    gradients = [GRADIENTS.gradient(t, SHAPE).astype(np.float64) for t in range(1, 201)]
    for name, arguments in ARGUMENTS.items():
        params, states = [GRADIENTS.initial(SHAPE).astype(np.float64)], [None]
        moments = [np.zeros(SHAPE)] * len(unsigned(name))
        for t, g in enumerate(gradients, start=1):
            p, moments = step(name, arguments, t, g, params[-1], moments)
            encoded = [encode(*x) for x in zip(moments, unsigned(name), strict=True)]
            moments = [
                decode(*e, u) for e, u in zip(encoded, unsigned(name), strict=True)
            ]
            params.append(p)
            states.append(encoded)
        runs[name] = np.stack(params), states
    return runs


# --- The trajectories.


def tolerance(name, params, t):
    """Returns how far apart parameters may be after t steps with equal codes.

    An unbiased moment is off by the relative error of 1 - b^t, if that is formed in
    float32, and by two roundings per step in the terms of its absmax. Upstream's decay
    rounds 1 - lr * decay and the product, and the sum rounds, there and here: 3.5 in
    units of 2^-24 |p|. The last one keeps its sign in every step as long as the update
    stays the same, as Lion's does, so it adds up like t, not like its root.
    """
    total = 0.0
    adam = name.startswith(("adamw", "ademamix"))
    decoupled = adam or name == "lion"
    for s in range(1, t + 1):
        before, after = params[s - 1], params[s]
        decay = ARGUMENTS[name]["lr"] * ARGUMENTS[name]["decay"] * decoupled
        relative = (s + 8) * 2**-24
        if adam:
            for b, power in ((0.9, 1), (0.999, 0.5)):
                of_power = (s / 2 * b**s + 2) * 2**-24
                relative += power * of_power / (1 - b**s)
        total += relative * np.abs(after - before + decay * before)
        total += (3.5 if decoupled else 2) * 2**-24 * np.abs(after)
    return total


@pytest.mark.parametrize("t", STORED)
@EVERY
def test_parameters(defined, name, t):
    """They agree within rounding unless a code differs; the README says how many do."""
    params, _ = defined[name]
    apart = np.abs(params[t][:, COLUMNS] - TRAJECTORIES[f"{name}_{t}"])
    beyond = apart > tolerance(name, params, t)[:, COLUMNS]
    assert beyond.sum() <= (0 if t <= 2 else 10)
    # A first moment lasts ten steps.
    assert apart[beyond].max(initial=0) <= 10 * ARGUMENTS[name]["lr"]


def state(name, t):
    """Returns stored codes and absmax of each moment; AdEMAMix stacks the first two."""
    pairs = []
    for i in range(1, 3):
        codes = TRAJECTORIES.get(f"{name}_state{i}_{t}")
        if codes is not None:
            absmax = TRAJECTORIES[f"{name}_absmax{i}_{t}"]
            stacked = codes.reshape(-1, *SHAPE), absmax.reshape(-1, 16)
            pairs += zip(*stacked, strict=True)
    return pairs


@pytest.mark.parametrize("t", [1, 200])
@EVERY
def test_state(defined, name, t):
    _, states = defined[name]
    for ours, theirs in zip(states[t], state(name, t), strict=True):
        # Each step rounds twice, by up to half a step of float32.
        np.testing.assert_allclose(ours[1], theirs[1], rtol=2 * t * 2**-24)
        differ = ours[0] != theirs[0]
        assert differ.sum() <= (0 if t == 1 else 10)
        assert np.all(np.abs(ours[0] - theirs[0]) <= 1)


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_the_signed_code_of_a_square(name):
    """Half of its levels are never used, and many squares are stored as zero."""
    ((codes, _),) = state(name, 200)
    assert codes.min() == 127
    gradients = [GRADIENTS.gradient(t, SHAPE) for t in range(1, 201)]
    lost = (codes == 127) & np.any(np.stack(gradients) != 0, axis=0)
    assert lost[GRADIENTS.UNDERFLOW_ROWS].mean() > 0.2


@pytest.mark.parametrize("t", [1, 2, 50])
def test_adamw_is_the_one_of_adam8bit(t):
    """Blocks are independent, so eight rows equal the first eight of 32."""
    want = ADAM[f"adamw_{t}"][:, COLUMNS]
    np.testing.assert_array_equal(TRAJECTORIES[f"adamw_{t}"], want)
    if t == 1:
        (m, m_absmax), (v, v_absmax) = state("adamw", t)
        np.testing.assert_array_equal(m, ADAM["m_codes_1"][:8])
        np.testing.assert_array_equal(v, ADAM["v_codes_1"][:8])
        np.testing.assert_array_equal(m_absmax, ADAM["m_absmax_1"][:16])
        np.testing.assert_array_equal(v_absmax, ADAM["v_absmax_1"][:16])


# --- The state_dicts.

WRAPPER = "__bnb_optimizer_quant_state__"
OPTIMIZERS = ("adamw8bit", "lion8bit", "sgd8bit")


class Unpickler(pickle.Unpickler):
    """Reads what `torch.save` wrote as NumPy arrays, without torch."""

    def __init__(self, archive):
        super().__init__(io.BytesIO(archive.read("archive/data.pkl")))
        self.archive = archive

    def find_class(self, module, name):
        return {
            "ByteStorage": np.uint8,
            "FloatStorage": np.float32,
            "OrderedDict": dict,
            "_rebuild_tensor_v2": self.rebuild,
        }[name]

    def persistent_load(self, pid):
        _, dtype, key, _, _ = pid
        return np.frombuffer(self.archive.read(f"archive/data/{key}"), dtype)

    @staticmethod
    def rebuild(storage, offset, shape, stride, *_):
        return storage[offset : offset + math.prod(shape)].reshape(shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_saved_file_is_what_was_flattened(name):
    with zipfile.ZipFile(HERE / f"state_dict_{name}.pt") as archive:
        saved = Unpickler(archive).load()
    assert saved.keys() == {"state", "param_groups"}
    flat = STATE_DICT[f"{name}.param_groups"].tobytes()
    assert json.loads(flat) == json.loads(json.dumps(saved["param_groups"]))
    found = {f"{name}.param_groups", f"{name}.next.weight", f"{name}.next.bias"}
    for index, entry in saved["state"].items():
        assert entry.keys() == {"step", WRAPPER}
        assert STATE_DICT[f"{name}.state.{index}.step"] == entry["step"] == 3
        found.add(f"{name}.state.{index}.step")
        for key, value in entry[WRAPPER].items():
            path = f"{name}.state.{index}.{WRAPPER}.{key}"
            assert STATE_DICT[path].dtype == value.dtype
            np.testing.assert_array_equal(STATE_DICT[path], value)
            found.add(path)
    assert found == {key for key in STATE_DICT if key.startswith(f"{name}.")}


@pytest.mark.parametrize(("index", "parameter"), [(0, "weight"), (1, "bias")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_after_the_saved_state(name, index, parameter):
    """The saved bytes mean what the README says, even in the short last block."""
    saved = {
        key.rsplit(".", 1)[1]: value
        for key, value in STATE_DICT.items()
        if key.startswith(f"{name}.state.{index}.")
    }
    groups = json.loads(STATE_DICT[f"{name}.param_groups"].tobytes())
    (group,) = (g for g in groups if index in g["params"])
    want = STATE_DICT[f"{name}.next.{parameter}"].astype(np.float64)
    moments = []
    for i, is_unsigned in enumerate(unsigned(name), start=1):
        stored = saved[f"state{i}"]
        assert stored.shape == want.shape
        if parameter == "weight":
            code = CODEBOOKS[f"dynamic_{'un' * is_unsigned}signed"]
            np.testing.assert_array_equal(saved[f"qmap{i}"], code)
            stored = decode(stored, saved[f"absmax{i}"], is_unsigned)
        moments.append(stored.astype(np.float64))
    arguments = group | {"decay": group["weight_decay"], "momentum": group["betas"][0]}
    before = GRADIENTS.initial(want.shape).astype(np.float64)
    g = GRADIENTS.away_from_zero(4, want.shape).astype(np.float64)
    got, _ = step(name, arguments, 4, g, before, moments)
    # Only upstream rounds: the terms of the update, the decay, and the sum.
    update = np.abs(got - before) + arguments["lr"]
    np.testing.assert_array_less(
        np.abs(got - want), 8 * 2**-24 * update + 2.5 * 2**-24 * np.abs(before) + 1e-12
    )
