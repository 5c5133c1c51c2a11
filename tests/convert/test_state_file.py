"""save_state and load_state: any tree, back on other devices; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb import optim
from jaxbnb.convert import (
    CheckpointError,
    UnsupportedCheckpointError,
    load_state,
    safetensors_files,
    save_state,
)
from jaxbnb.convert._checkpoint import TensorInfo

OPTIMIZERS = {
    "adamw8bit": lambda: jaxbnb.adamw8bit(1e-3),
    "4 bits": lambda: optim.adamw4bit(1e-3),
    "fp8": lambda: optim.adamw_fp8(1e-3),
    "paged": lambda: jaxbnb.paged_adamw8bit(1e-3),
}


def make_tree(make):
    """Everything that a run has, with values that are not zero."""
    kernel = jnp.sin(jnp.arange(64 * 128, dtype=jnp.float32)).reshape(64, 128)
    params = {"kernel": kernel, "bias": jnp.ones(128, jnp.bfloat16)}
    tx = make()
    # Optax' own transformations promote dtypes.
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(params, tx.init(params), params)
    return {
        "frozen": jaxbnb.quantize(kernel, "nf4", axis=-2, double_quant=True),
        "model": nnx.state(nnx.Linear(4, 8, rngs=nnx.Rngs(0))),
        "optimizer": state,
        "key": jax.random.key(7),
        "step": 3,
    }


def values(tree):
    return [
        np.asarray(
            jax.random.key_data(x)
            if isinstance(x, jax.Array)
            and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_round_trip(make, tmp_path):
    tree, path = make_tree(make), tmp_path / "state.safetensors"
    save_state(tree, path)
    like = jax.tree.map(
        lambda x: x * 0 if getattr(x, "dtype", None) == jnp.float32 else x, tree
    )
    found = load_state(path, like)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for got, want in zip(values(found), values(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    for got, want in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
        assert type(got) is type(want)
        assert getattr(got, "sharding", None) == getattr(want, "sharding", None)


def test_onto_another_mesh(tmp_path):
    x = jnp.arange(64.0).reshape(8, 8)
    eight, four = (
        jax.make_mesh((n,), ("data",), devices=jax.devices()[:n]) for n in (8, 4)
    )
    path = tmp_path / "state.safetensors"
    save_state({"x": jax.device_put(x, NamedSharding(eight, P("data")))}, path)
    sharding = NamedSharding(four, P(None, "data"))
    found = load_state(
        path, {"x": jax.ShapeDtypeStruct((8, 8), "float32", sharding=sharding)}
    )["x"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, x)


def test_what_does_not_fit(tmp_path):
    path = tmp_path / "state.safetensors"
    x = jnp.ones((64, 2))
    save_state({"a": x, "q": jaxbnb.quantize(x, "nf4", axis=0)}, path)
    fp4 = {"a": x, "q": jaxbnb.quantize(x, "fp4", axis=0)}
    with pytest.raises(CheckpointError, match=r"q is nf4, .*, not fp4"):
        load_state(path, fp4)
    with pytest.raises(CheckpointError, match=r"missing: b\n.*unexpected: a"):
        load_state(path, {"b": x, "q": jaxbnb.quantize(x, "nf4", axis=0)})
    wide = {"a": jnp.ones((64, 2), jnp.bfloat16), "q": fp4["q"]}
    with pytest.raises(CheckpointError, match=r"a is float32\[64, 2\], not bfloat16"):
        load_state(path, wide)
    with pytest.raises(ValueError, match=r"the name 'a\.b'"):
        save_state({"a": {"b": x}, "a.b": x}, path)


def test_other_versions_and_files(tmp_path):
    path, array = tmp_path / "state.safetensors", np.ones(2, np.float32)
    infos = {"a": TensorInfo((2,), array.dtype)}
    for metadata, error, message in (
        (
            {"version": "2"},
            UnsupportedCheckpointError,
            "version 2, .* up to 1: a newer",
        ),
        ({"version": "x"}, CheckpointError, "its format version is 'x'"),
        ({"format": "pt"}, CheckpointError, "not written by jaxbnb.convert.save_state"),
    ):
        metadata = {"format": "jaxbnb.state", **metadata}
        header, _ = safetensors_files.layout(infos, metadata)
        assert safetensors_files.write_file(path, header, iter([array])) is None
        with pytest.raises(error, match=message):
            load_state(path, {"a": array})
