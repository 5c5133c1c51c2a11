"""bitsandbytes' optimizer state, in and out, against what bitsandbytes itself saved.

The goldens and their definition are in tests/goldens/README.md.
"""

import copy
import functools
import json
import pathlib
import re
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb import optim
from jaxbnb.convert import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
    optimizer_state_from_bitsandbytes,
    optimizer_state_to_bitsandbytes,
)
from jaxbnb.convert._bitsandbytes_state import encode
from jaxbnb.optim import StateMismatchError, decode_state
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SAVED, TRAJECTORIES = (
    dict(np.load(GOLDENS / f"{name}.npz")) for name in ("state_dict", "trajectories")
)
GRADIENTS = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "gradients.py")))
WRAPPER = "__bnb_optimizer_quant_state__"
NO_QUANTIZED = {"min_quantized_size": 2**60}


def golden(name):
    """The state_dict that was flattened into the file."""
    state = {}
    for key, value in SAVED.items():
        if key.startswith(f"{name}.state."):
            index, *path = key.split(".")[2:]
            entry = state.setdefault(int(index), {})
            if len(path) == 1:
                entry[path[0]] = int(value)
            else:
                entry.setdefault(path[0], {})[path[1]] = value
    groups = json.loads(SAVED[f"{name}.param_groups"].tobytes())
    return {"state": state, "param_groups": groups}


def step(tx, grads, state, params):
    # Optax promotes counts.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(tx.update)(grads, state, params)
        return optax.apply_updates(params, updates), state


def assert_same(got, want):
    """Nested dicts and lists of arrays of NumPy, or anything else."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, np.ndarray):
        assert isinstance(got, np.ndarray)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want


# --- From the files.

OPTIMIZERS = {
    "adamw8bit": (jaxbnb.adamw8bit, {"learning_rate": 1e-3}),
    "lion8bit": (jaxbnb.lion8bit, {"learning_rate": 1e-4, "weight_decay": 0.1}),
    "sgd8bit": (jaxbnb.sgd8bit, {"learning_rate": 1e-2}),
}
SHAPES = {"kernel": (40, 120), "bias": (40,)}


def optimizer(name, **storage):
    make, options = OPTIMIZERS[name]
    if name == "adamw8bit":
        options = options | {
            "weight_decay": 0.1,
            "mask": {"kernel": True, "bias": False},
        }
    return make(**options, **storage)


def of_torch(values):
    """Arrays in the layout of the JAX model."""
    return {
        "kernel": jnp.asarray(values["kernel"].T),
        "bias": jnp.asarray(values["bias"]),
    }


def rounding(before, after, t):
    """Returns the tolerance of two steps, as in tests/goldens/test_trajectories.py: 8
    roundings of the update, 2.5 of the parameter, and 1 - b^t in float32 on both sides.
    """
    relative = 8 * 2**-24
    for b, power in ((0.9, 1), (0.999, 0.5)):
        relative += power * (t / 2 * b**t + 2) * 2**-24 / (1 - b**t)
    update = np.abs(after - before) + 0.1 * 1e-2 * np.abs(before)
    return 2 * relative * update + 5 * 2**-24 * np.abs(before) + 1e-12


@pytest.mark.parametrize("storage", [NO_QUANTIZED, {"state_bits": 32}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_after_loading(name, storage):
    """The one that bitsandbytes took, where nothing is rounded on the way."""
    tx = optimizer(name, **storage)
    before = {key: GRADIENTS.initial(shape) for key, shape in SHAPES.items()}
    grads = {key: GRADIENTS.away_from_zero(4, shape) for key, shape in SHAPES.items()}
    params = of_torch(before)
    state = optimizer_state_from_bitsandbytes(
        golden(name), tx, params, order=["kernel", "bias"]
    )
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    after, _ = step(tx, of_torch(grads), state, params)
    for key, theirs in (("kernel", "weight"), ("bias", "bias")):
        got = np.asarray(after[key]).T
        want = SAVED[f"{name}.next.{theirs}"]
        apart = np.abs(got.astype(np.float64) - want)
        np.testing.assert_array_less(apart, rounding(before[key], want, 4))


@pytest.mark.parametrize(
    ("storage", "half_gap"),
    [
        ({}, 0.0071),
        ({"state_bits": 4}, 0.1125),
        # Two steps of 448 in 448, and levels from 2^-9 up.
        ({"state_bits": "fp8"}, 1 / 28),
        ({"block_size": 64}, 0.0071),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rounding_where_the_blocks_are_others(name, storage, half_gap):
    """A moment is off by half the widest gap, that at -1, times the block's largest."""
    params = of_torch({key: GRADIENTS.initial(shape) for key, shape in SHAPES.items()})

    def load(**storage):
        tx = optimizer(name, **storage)
        state = optimizer_state_from_bitsandbytes(
            golden(name), tx, params, order=["kernel", "bias"]
        )
        return decode_state(tx, state, params)

    got, want = load(**storage), load(**NO_QUANTIZED)
    lost = 0.0
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        if "kernel" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(a, b)
            continue
        largest = np.abs(b).max()
        assert np.abs(a - b).max() <= (half_gap + 2**-20) * largest
        lost = max(lost, np.abs(a - b).max() / largest)
    assert lost > half_gap / 20


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_out_again_it_is_the_file(name):
    """In 32 bits values are exact, so that the codes come out as they went in."""
    params = of_torch({key: GRADIENTS.initial(shape) for key, shape in SHAPES.items()})
    tx, order = optimizer(name, **NO_QUANTIZED), ["kernel", "bias"]
    want = golden(name)
    state = optimizer_state_from_bitsandbytes(want, tx, params, order=order)
    got = optimizer_state_to_bitsandbytes(
        tx, state, params, order=order, param_groups=want["param_groups"]
    )
    assert got["param_groups"] == want["param_groups"]
    small = got["state"][1][WRAPPER]
    if name != "lion8bit":
        np.testing.assert_array_equal(small.pop("unorm_vec"), np.zeros(1, np.float32))
    assert_same(got["state"][1], want["state"][1])
    for i, levels in enumerate((DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED), start=1):
        held = want["state"][0][WRAPPER]
        if f"state{i}" not in held:
            continue
        values = got["state"][0][WRAPPER][f"state{i}"]
        absmax = np.repeat(held[f"absmax{i}"], 256)[:4800].reshape(40, 120)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, levels[held[f"state{i}"]] * absmax)


@pytest.mark.parametrize("form", ["wrapped", "flat", "torch steps"])
def test_forms_of_an_entry(form):
    """Without the inner dict, as older versions write; with a step as an array."""
    params = of_torch({key: GRADIENTS.initial(shape) for key, shape in SHAPES.items()})
    tx, order = optimizer("adamw8bit"), ["kernel", "bias"]
    want = optimizer_state_from_bitsandbytes(
        golden("adamw8bit"), tx, params, order=order
    )
    saved = golden("adamw8bit")
    for entry in saved["state"].values():
        if form == "flat":
            entry |= entry.pop(WRAPPER)
            entry["unorm_vec"] = np.zeros(1, np.float32)
        if form == "torch steps":
            entry["step"] = np.float32(3)
    before = copy.deepcopy(saved)
    got = optimizer_state_from_bitsandbytes(saved, tx, params, order=order)
    assert_same(saved, before)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got[0].count == 3


# --- Of every family, by bytes.

SHAPE, COLUMNS = (8, 512), slice(128, 384)
FAMILIES = {
    "adamw": jaxbnb.adamw8bit(1e-3, weight_decay=0.1),
    "lion": jaxbnb.lion8bit(1e-4, weight_decay=0.1),
    "sgd": optax.chain(optax.add_decayed_weights(1e-2), jaxbnb.sgd8bit(1e-2)),
    "ademamix": jaxbnb.ademamix8bit(1e-3, weight_decay=1e-2),
    "ademamix_scheduled": jaxbnb.ademamix8bit(
        1e-3,
        b3=lambda count: optim.ademamix_b3_schedule(0.9, 0.9999, 150)(count + 1),
        alpha=lambda count: 5.0 * jnp.minimum((count + 1) / 100, 1.0),
        weight_decay=1e-2,
    ),
}
# Their squares are in the signed map there and in the unsigned one here.
SQUARES = {
    "rmsprop": functools.partial(
        jaxbnb.rmsprop8bit, 1e-3, decay=0.99, eps_in_sqrt=False
    ),
    "adagrad": functools.partial(jaxbnb.adagrad8bit, 1e-2, eps=1e-20),
}
FAMILIES |= {name: make() for name, make in SQUARES.items()}


def trajectory(name, t=1):
    """A state_dict from what the trajectories hold of a run."""
    tensors = {"qmap1": DYNAMIC8_SIGNED}
    for i in (1, 2):
        if f"{name}_state{i}_{t}" in TRAJECTORIES:
            tensors[f"state{i}"] = TRAJECTORIES[f"{name}_state{i}_{t}"]
            tensors[f"absmax{i}"] = TRAJECTORIES[f"{name}_absmax{i}_{t}"]
    if "state2" in tensors:
        tensors["qmap2"] = DYNAMIC8_UNSIGNED
    return {
        "state": {0: {"step": t, WRAPPER: tensors}},
        "param_groups": [{"lr": 1e-3, "params": [0]}],
    }


def entry_of(name):
    """The tensors of its one parameter."""
    return trajectory(name)["state"][0][WRAPPER]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_step(name):
    """From codes after the first; from values where the map here is another."""
    tx = FAMILIES[name]
    if name in SQUARES:
        tx = SQUARES[name](**NO_QUANTIZED)
    first, second = (TRAJECTORIES[f"{name}_{t}"].astype(np.float64) for t in (1, 2))
    params = GRADIENTS.initial(SHAPE)
    params[:, COLUMNS] = TRAJECTORIES[f"{name}_1"]
    params = {"embedding": jnp.asarray(params)}
    state = optimizer_state_from_bitsandbytes(trajectory(name), tx, params)
    grads = {"embedding": jnp.asarray(GRADIENTS.gradient(2, SHAPE))}
    after, _ = step(tx, grads, state, params)
    got = np.asarray(after["embedding"], np.float64)[:, COLUMNS]
    np.testing.assert_array_less(np.abs(got - second), rounding(first, second, 2))


@pytest.mark.parametrize("t", [1, 200])
@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_in_and_out(name, t):
    """Every code and absmax, and RMSprop's and Adagrad's up to two roundings."""
    tx, saved = FAMILIES[name], trajectory(name, t)
    params = {"embedding": jnp.ones(SHAPE)}
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    back = optimizer_state_to_bitsandbytes(
        tx, state, params, param_groups=saved["param_groups"]
    )
    if name not in SQUARES:
        assert_same(back, saved)
        low_bit = state[-1][0] if name == "sgd" else state[0]
        assert low_bit.count == t
        first = low_bit[1]["embedding"]
        stored = saved["state"][0][WRAPPER]["state1"].reshape(-1, *SHAPE)[0]
        np.testing.assert_array_equal(first, stored)
        return
    got, want = back["state"][0][WRAPPER], saved["state"][0][WRAPPER]
    assert got.keys() == want.keys()
    np.testing.assert_array_equal(got["absmax1"], want["absmax1"])
    np.testing.assert_array_equal(got["state1"] == 127, want["state1"] == 127)
    apart = np.abs(got["state1"].astype(int) - want["state1"].astype(int))
    assert apart.max() <= 1


def test_blocks_of_2048_as_bitsandbytes_had_them_before_0_44():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (8, 1000), np.uint8)
    absmax = generator.uniform(1, 2, 4).astype(np.float32)
    saved = trajectory("lion")
    saved["state"][0][WRAPPER] |= {"state1": codes, "absmax1": absmax}
    tx = jaxbnb.lion8bit(1e-4, **NO_QUANTIZED)
    params = {"embedding": jnp.ones((8, 1000))}
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    want = DYNAMIC8_SIGNED[codes] * np.repeat(absmax, 2048)[:8000].reshape(8, 1000)
    np.testing.assert_array_equal(state[0].mu["embedding"], want)
    wide = jaxbnb.lion8bit(1e-4, block_size=2048)
    params = {"embedding": jnp.ones((2, 4096))}
    saved["state"][0][WRAPPER] |= {"state1": np.resize(codes, (2, 4096))}
    state = optimizer_state_from_bitsandbytes(saved, wide, params)
    np.testing.assert_array_equal(state[0].mu["embedding"], np.resize(codes, (2, 4096)))
    np.testing.assert_array_equal(state[0].mu_absmax["embedding"].reshape(-1), absmax)


def test_the_map_of_the_file_is_what_counts():
    """Here it is linear, so that its codes have no other meaning."""
    saved = trajectory("lion")
    levels = np.linspace(-1, 1, 256).astype(np.float32)
    saved["state"][0][WRAPPER]["qmap1"] = levels
    tx = jaxbnb.lion8bit(1e-4, **NO_QUANTIZED)
    params = {"embedding": jnp.ones(SHAPE)}
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    codes = saved["state"][0][WRAPPER]["state1"]
    absmax = saved["state"][0][WRAPPER]["absmax1"]
    want = levels[codes] * np.repeat(absmax, 256).reshape(SHAPE)
    np.testing.assert_array_equal(state[0].mu["embedding"], want)
    eight = jaxbnb.lion8bit(1e-4)
    state = optimizer_state_from_bitsandbytes(saved, eight, params)
    near = decode_state(eight, state, params)[0].mu["embedding"]
    assert np.abs(near - want).max() <= 0.0071 * np.abs(want).max()


# --- The parameters of both sides.


def some_state_dict(shapes, names=("state1", "state2"), steps=3):
    """A state in 32 bits with a parameter for each shape."""
    generator = np.random.default_rng(0)
    state = {
        i: {"step": steps}
        | {name: np.float32(generator.uniform(0, 1, shape)) for name in names}
        for i, shape in enumerate(shapes)
    }
    return {
        "state": state,
        "param_groups": [{"params": [0]}, {"params": list(range(1, len(shapes)))}],
    }


MODEL = {
    "conv": {"kernel": (3, 5, 8, 16), "bias": (16,)},
    "dense": {"kernel": (24, 4), "lora_a": (24, 2)},
    "embed": {"embedding": (7, 8)},
}
ORDER = [
    "embed.embedding",
    "conv.kernel",
    "conv.bias",
    "dense.kernel",
    "dense.lora_a",
]
IN_TORCH = [(7, 8), (16, 8, 3, 5), (16,), (4, 24), (2, 24)]


def model():
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(jnp.ones, MODEL, is_leaf=is_shape)


def test_order_and_orientation():
    params, tx = model(), jaxbnb.adamw8bit(1e-3)
    saved = some_state_dict(IN_TORCH)
    state = optimizer_state_from_bitsandbytes(saved, tx, params, order=ORDER)
    mu = state[0].mu
    want = [saved["state"][i]["state1"] for i in range(5)]
    np.testing.assert_array_equal(mu["embed"]["embedding"], want[0])
    np.testing.assert_array_equal(mu["conv"]["kernel"], want[1].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(mu["conv"]["bias"], want[2])
    np.testing.assert_array_equal(mu["dense"]["kernel"], want[3].T)
    np.testing.assert_array_equal(mu["dense"]["lora_a"], want[4].T)
    back = optimizer_state_to_bitsandbytes(tx, state, params, order=ORDER)
    assert back["param_groups"] == [{"params": [0, 1, 2, 3, 4]}]
    for i, entry in back["state"].items():
        assert entry["step"] == 3
        np.testing.assert_array_equal(entry[WRAPPER].pop("unorm_vec"), [0])
        assert_same({"step": 3} | entry[WRAPPER], saved["state"][i])
    for entry in back["state"].values():
        for array in entry[WRAPPER].values():
            assert array.flags.writeable
            assert array.flags.c_contiguous


@pytest.mark.parametrize("transposed", [["dense.kernel"], r"dense\.kernel"])
def test_names_and_patterns_of_what_is_transposed(transposed):
    shapes = [(7, 8), (3, 5, 8, 16), (16,), (4, 24), (24, 2)]
    tx = jaxbnb.adamw8bit(1e-3)
    state = optimizer_state_from_bitsandbytes(
        some_state_dict(shapes), tx, model(), order=ORDER, transposed=transposed
    )
    assert state[0].mu["dense"]["kernel"].shape == (24, 4)
    back = optimizer_state_to_bitsandbytes(
        tx, state, model(), order=ORDER, transposed=transposed
    )
    got = [back["state"][i][WRAPPER]["state2"].shape for i in range(5)]
    assert got == shapes


def test_leaves_in_their_own_order_and_keys_that_are_names():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    saved = some_state_dict([(2, 3), (4,)], ["state1"])
    saved["state"] = {"x.a": saved["state"][0], "x.b": saved["state"][1]}
    saved["param_groups"] = [{"params": ["x.a", "x.b"]}]
    tx = jaxbnb.lion8bit(1e-4)
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    np.testing.assert_array_equal(state[0].mu["b"], saved["state"]["x.b"]["state1"])
    back = optimizer_state_to_bitsandbytes(
        tx, state, params, param_groups=saved["param_groups"]
    )
    assert back["state"].keys() == {"x.a", "x.b"}
    assert back["param_groups"] == saved["param_groups"]
    assert back["param_groups"][0] is not saved["param_groups"][0]


def test_an_axis_of_one_element_does_not_count():
    """A head (in, 1) has the bytes of a weight (1, in)."""
    saved = trajectory("adamw")
    for i in (1, 2):
        tensors = saved["state"][0][WRAPPER]
        tensors[f"state{i}"] = tensors[f"state{i}"].reshape(1, 4096)
    tx, params = jaxbnb.adamw8bit(1e-3), {"kernel": jnp.ones((4096, 1))}
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    assert state[0].mu["kernel"].shape == (4096, 1)
    back = optimizer_state_to_bitsandbytes(
        tx, state, params, param_groups=saved["param_groups"]
    )
    assert_same(back, saved)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        optim.paged,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"embedding": True, "frozen": False}),
        lambda tx: optax.partition(
            {"a": tx, "b": optax.set_to_zero()}, {"embedding": "a", "frozen": "b"}
        ),
    ],
    ids=["alone", "paged", "chain", "MultiSteps", "masked", "partition"],
)
def test_wherever_the_state_is(wrap):
    """Finds the state and all counts, that of a schedule too."""
    schedule = optax.linear_schedule(1e-3, 0.0, 1000)
    tx = wrap(jaxbnb.adamw8bit(schedule))
    params = {"embedding": jnp.ones(SHAPE), "frozen": jnp.ones(3)}
    saved = trajectory("adamw", 200)
    state = optimizer_state_from_bitsandbytes(saved, tx, params, order=["embedding"])
    initial = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(initial)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(initial), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.memory_kind == want.sharding.memory_kind
    counts = [
        int(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
        if getattr(path[-1], "name", None) in ("count", "gradient_step")
    ]
    assert len(counts) >= 2
    assert set(counts) == {200}
    back = optimizer_state_to_bitsandbytes(
        tx,
        state,
        params,
        order=["embedding"],
        param_groups=saved["param_groups"],
    )
    assert_same(back, saved)


def test_what_had_no_gradient_has_no_entry():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    saved = some_state_dict([(3,), (3,)], ["state1"])
    del saved["state"][0]
    tx = jaxbnb.adagrad8bit(1e-2)
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    np.testing.assert_array_equal(state[0].sum_of_squares["a"], np.float32([0.1] * 3))
    assert state[0].count == 3
    saved["state"] = {}
    state = optimizer_state_from_bitsandbytes(saved, tx, params)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
    assert optimizer_state_to_bitsandbytes(tx, state, params)["state"] == {}


def test_counts_that_differ():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    saved = some_state_dict([(3,), (3,)])
    saved["state"][1]["step"] = 5
    tx = jaxbnb.adam8bit(1e-3)
    with pytest.raises(CheckpointError, match=re.escape("numbers of steps, [3, 5]")):
        optimizer_state_from_bitsandbytes(saved, tx, params)
    state = optimizer_state_from_bitsandbytes(saved, tx, params, count=5)
    assert state[0].count == 5
    back = optimizer_state_to_bitsandbytes(tx, state, params, count=7)
    assert [entry["step"] for entry in back["state"].values()] == [7, 7]


def test_a_state_without_a_count():
    """One step at least, or SGD would take its next for the first."""
    params, tx = {"a": jnp.ones(3)}, optax.sgd(1e-3, 0.9)
    state = optimizer_state_from_bitsandbytes(
        some_state_dict([(3,)], ["state1"]) | {"param_groups": [{"params": [0]}]},
        tx,
        params,
    )
    back = optimizer_state_to_bitsandbytes(tx, state, params)
    assert back["state"][0]["step"] == 1


# --- What is refused.


def changed(**tensors):
    saved = trajectory("adamw")
    for name, value in tensors.items():
        if value is None:
            del saved["state"][0][WRAPPER][name]
        else:
            saved["state"][0][WRAPPER][name] = value
    return saved


STACKED = {"state1": np.zeros((2, *SHAPE), np.uint8), "absmax1": np.zeros((2, 16))}
REFUSED = {
    "another shape": (
        changed(state1=np.zeros((512, 8), np.uint8)),
        CheckpointError,
        "state[0], for 'embedding': state1 has shape (512, 8), but tx requires (8, 512",
    ),
    "of AdEMAMix": (changed(**STACKED), CheckpointError, "AdEMAMix has two moments"),
    "no state1": (changed(state1=None), MissingTensorError, "has no tensor state1"),
    "no absmax": (changed(absmax2=None), MissingTensorError, "has no tensor absmax2"),
    "no map": (changed(qmap1=None), MissingTensorError, "has no tensor qmap1"),
    "another absmax": (
        changed(absmax1=np.zeros(15, np.float32)),
        CheckpointError,
        "absmax1 has 15 elements for one moment, but must have 16 or 2",
    ),
    "another map": (
        changed(qmap2=np.zeros(16, np.float32)),
        CheckpointError,
        "qmap2 has shape (16,), not (256,)",
    ),
    "another dtype": (
        changed(state1=np.zeros(SHAPE, np.int64)),
        UnsupportedCheckpointError,
        "state1 is int64",
    ),
    "one moment": (
        changed(state2=None),
        CheckpointError,
        "has state1, like another optimizer, but tx keeps a ScaleByAdamState, which "
        "needs state1 and state2",
    ),
    "tensor-wise": (
        changed(max1=np.zeros(1, np.float32)),
        UnsupportedCheckpointError,
        "has max1",
    ),
    "of torch": (
        {
            "state": {0: {"step": 1, "exp_avg": np.zeros(SHAPE)}},
            "param_groups": [{"params": [0]}],
        },
        UnsupportedCheckpointError,
        "state[0] has ['exp_avg', 'step'], so it does not belong to an optimizer of",
    ),
    "no step": (
        {
            "state": {0: {"state1": np.zeros(SHAPE)}},
            "param_groups": [{"params": [0]}],
        },
        MissingTensorError,
        "state[0] has no step",
    ),
    "two parameters": (
        trajectory("adamw") | {"param_groups": [{"params": [0, 1]}]},
        CheckpointError,
        "the file has 2 parameters, but params has 1",
    ),
    "twice": (
        trajectory("adamw") | {"param_groups": [{"params": [0]}, {"params": [0]}]},
        CheckpointError,
        "param_groups have a parameter twice",
    ),
    "no group": (
        trajectory("adamw") | {"param_groups": [{"lr": 1}]},
        CheckpointError,
        "param_groups[0] must be a dict with 'params'",
    ),
    "groups that are no list": (
        trajectory("adamw") | {"param_groups": 2.5},
        CheckpointError,
        "param_groups must be a list of dicts; got 2.5",
    ),
    "keys that are lists": (
        trajectory("adamw") | {"param_groups": [{"params": [[0]]}]},
        CheckpointError,
        "param_groups[0] must be a dict with 'params', a list of numbers or names",
    ),
    "states that are no dict": (
        trajectory("adamw") | {"state": [1.5]},
        CheckpointError,
        "'state' must be a dict of the parameters' states; got [1.5]",
    ),
    **{
        f"{name} {value!r:.20}": (
            trajectory("adamw")
            | {"state": {0: {"step": 1} | {**entry_of("adamw"), name: value}}},
            CheckpointError,
            message,
        )
        for name, value, message in (
            (WRAPPER, 5, "state[0] must be a dict of tensors, and so must its entry"),
            ("step", -1, "state[0] must have a step from 0 to 2**31 - 1; got -1"),
            ("step", 2**31, "must have a step from 0"),
            ("step", float("nan"), "must have a step from 0"),
            ("step", np.ones(2), "must have a step from 0"),
            ("step", "3", "state[0]['step'] must be a tensor of numbers; got '3'"),
            ("state1", {}, "state[0]['state1'] must be a tensor of numbers; got {}"),
            ("state1", np.full(SHAPE, None), "must be a tensor of numbers"),
        )
    },
    "unknown": (
        trajectory("adamw") | {"param_groups": [{"params": [1]}]},
        CheckpointError,
        "state has entries for [0], which are not in any of param_groups",
    ),
    "a model": ({"weight": 1}, CheckpointError, "the result of optimizer.state_dict()"),
}


@pytest.mark.parametrize(
    ("saved", "error", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_a_file_that_is_not_of_this_optimizer(saved, error, message):
    params = {"embedding": jnp.ones(SHAPE)}
    with pytest.raises(error, match=re.escape(message)) as raised:
        optimizer_state_from_bitsandbytes(saved, jaxbnb.adamw8bit(1e-3), params)
    assert isinstance(raised.value, CheckpointError)


@pytest.mark.parametrize(
    ("tx", "run", "message"),
    [
        (jaxbnb.lion8bit(1), "adamw", "like Adam, AdamW, LAMB or AdEMAMix, but tx"),
        (jaxbnb.ademamix8bit(1), "adamw", "AdEMAMix has two moments in it"),
        (jaxbnb.rmsprop8bit(1), "lion", "state1 has negative values, which nu of"),
        (jaxbnb.muon8bit(1), "lion", "tx keeps none of them"),
        (
            jaxbnb.rmsprop8bit(1, momentum=0.9),
            "rmsprop",
            "tx keeps ScaleByRmsState and TraceState of them",
        ),
        (jaxbnb.rmsprop8bit(1, centered=True), "rmsprop", "tx keeps none of them"),
        (jaxbnb.lars8bit(1e-2), "sgd", "tx accumulates updates, which include the"),
        (optax.lars(1e-2), "sgd", "use sgd8bit"),
        (optax.sgd(1e-2), "sgd", "tx keeps none of them"),
        (
            optax.flatten(jaxbnb.lion8bit(1e-2)),
            "lion",
            "in a tree that differs from the parameters'",
        ),
    ],
)
def test_a_file_of_another_family(tx, run, message):
    params = {"embedding": jnp.ones(SHAPE)}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        optimizer_state_from_bitsandbytes(trajectory(run), tx, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["b"]}, "order must have each parameter once; got ['b']"),
        ({"order": ["a", "a"]}, "order must have each parameter once"),
        ({"transposed": ["weight"]}, "transposed has 'weight', which matches none"),
        ({"transposed": r"w.*"}, "transposed has 'w.*', which matches none"),
        ({"param_groups": [{"params": [0, 1]}]}, "have 2 parameters, but params has 1"),
    ],
)
def test_arguments_that_are_not_of_the_parameters(options, message):
    tx, params = jaxbnb.lion8bit(1), {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_state_to_bitsandbytes(tx, tx.init(params), params, **options)


@pytest.mark.parametrize("paged", [False, True])
def test_a_state_of_something_else(paged):
    tx, params = jaxbnb.lion8bit(1), {"a": jnp.ones(3)}
    tx = optim.paged(tx) if paged else tx
    other = jaxbnb.adam8bit(1).init(params)
    with pytest.raises(StateMismatchError):
        optimizer_state_to_bitsandbytes(tx, other, params)


# --- With torch and bitsandbytes.

PEERS = {
    "Adam8bit": ({"lr": 1e-3}, jaxbnb.adam8bit(1e-3)),
    "AdamW8bit": (
        {"lr": 1e-3, "weight_decay": 0.1},
        jaxbnb.adamw8bit(1e-3, weight_decay=0.1),
    ),
    "AdamW32bit": (
        {"lr": 1e-3, "weight_decay": 0.1},
        jaxbnb.adamw8bit(1e-3, weight_decay=0.1, state_bits=32),
    ),
    "AdEMAMix8bit": (
        {"lr": 1e-3, "weight_decay": 0.1},
        jaxbnb.ademamix8bit(1e-3, weight_decay=0.1),
    ),
    "Lion8bit": (
        {"lr": 1e-4, "weight_decay": 0.1},
        jaxbnb.lion8bit(1e-4, weight_decay=0.1),
    ),
    "SGD8bit": ({"lr": 1e-2, "momentum": 0.9}, jaxbnb.sgd8bit(1e-2)),
    "LARS8bit": ({"lr": 1e-2, "momentum": 0.9}, jaxbnb.sgd8bit(1e-2)),
    "LAMB8bit": ({"lr": 1e-3}, jaxbnb.adam8bit(1e-3)),
    "RMSprop8bit": ({"lr": 1e-3}, SQUARES["rmsprop"](**NO_QUANTIZED)),
    "Adagrad8bit": ({"lr": 1e-2}, SQUARES["adagrad"](**NO_QUANTIZED)),
}
PEER_SHAPES = {"embedding": (16, 512), "kernel": (6, 10), "bias": (40,)}


def to_torch(tree):
    import torch
    from torch.utils import _pytree

    return _pytree.tree_map(
        lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree
    )


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "options", "tx"), [(k, *v) for k, v in PEERS.items()])
def test_bitsandbytes_goes_on_where_we_were(name, options, tx):
    """From its state after three steps both take the fourth; from ours, the fifth."""
    import bitsandbytes
    import torch

    def ours(x):
        return {k: jnp.asarray(v.T if k == "kernel" else v) for k, v in x.items()}

    def fresh(values):
        parameters = [
            torch.nn.Parameter(torch.from_numpy(value.copy()))
            for value in values.values()
        ]
        return parameters, getattr(bitsandbytes.optim, name)(parameters, **options)

    def take(optimizer, parameters, t):
        for p in parameters:
            gradient = GRADIENTS.away_from_zero(t, tuple(p.shape))
            p.grad = torch.from_numpy(gradient)
        optimizer.step()
        arrays = (p.detach().numpy().copy() for p in parameters)
        return dict(zip(PEER_SHAPES, arrays, strict=True))

    def assert_near(got, want, before, t):
        # LAMB and LARS limit the updates of what has 32-bit state, and only those.
        limited = name in ("LAMB8bit", "LARS8bit")
        for key in ["embedding"] if limited else PEER_SHAPES:
            value = ours(want)[key]
            tolerance = rounding(np.asarray(ours(before)[key]), value, t)
            np.testing.assert_array_less(np.abs(got[key] - value), tolerance)

    start = {k: GRADIENTS.initial(shape) for k, shape in PEER_SHAPES.items()}
    parameters, optimizer = fresh(start)
    for t in (1, 2, 3):
        third = take(optimizer, parameters, t)
    saved = optimizer.state_dict()
    order, params = list(PEER_SHAPES), ours(third)
    state = optimizer_state_from_bitsandbytes(saved, tx, params, order=order)

    fourth = take(optimizer, parameters, 4)
    grads = {k: GRADIENTS.away_from_zero(4, s) for k, s in PEER_SHAPES.items()}
    params, state = step(tx, ours(grads), state, params)
    assert_near(params, fourth, third, 4)

    parameters, optimizer = fresh({k: np.asarray(ours_back(params)[k]) for k in order})
    written = optimizer_state_to_bitsandbytes(
        tx,
        state,
        params,
        order=order,
        param_groups=optimizer.state_dict()["param_groups"],
    )
    optimizer.load_state_dict(to_torch(written))
    fifth = take(optimizer, parameters, 5)
    before = ours_back(params)
    grads = {k: GRADIENTS.away_from_zero(5, s) for k, s in PEER_SHAPES.items()}
    params, _ = step(tx, ours(grads), state, params)
    assert_near(params, fifth, before, 5)


def ours_back(params):
    return {k: np.asarray(v).T if k == "kernel" else v for k, v in params.items()}


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_file_that_torch_reads(name):
    import torch

    params = of_torch({key: GRADIENTS.initial(shape) for key, shape in SHAPES.items()})
    saved = torch.load(GOLDENS / f"state_dict_{name}.pt", weights_only=True)
    tx, order = optimizer(name), ["kernel", "bias"]
    got = optimizer_state_from_bitsandbytes(saved, tx, params, order=order)
    want = optimizer_state_from_bitsandbytes(golden(name), tx, params, order=order)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("is_signed", [True, False])
def test_no_positive_square_is_written_as_zero(is_signed):
    """Adam would divide by its root."""
    moment = types.SimpleNamespace(is_signed=is_signed, can_be_negative=False)
    codes, absmax = encode(np.float32([1, 1e-9, 0]), moment)
    levels = DYNAMIC8_SIGNED if is_signed else DYNAMIC8_UNSIGNED
    largest, smallest, zero = levels[codes] * absmax
    assert largest == 1
    assert 0 < smallest < 1e-6
    assert zero == 0
