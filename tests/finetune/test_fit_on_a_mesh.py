"""fit on a mesh: the numbers of one device, and no device computes another's part."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.finetune import _loop, fit
from jaxbnb.finetune._config import ConfigError
from jaxbnb.finetune._mesh import make_mesh

ROWS = 8


def mesh_of(axis_type, *sizes):
    names = ("data", "model")[: len(sizes)]
    return mesh_named(names, axis_type, *sizes)


def mesh_named(names, axis_type, *sizes):
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def train(model, batches, make=jaxbnb.adamw8bit):
    result = fit(model, make(1e-2, min_quantized_size=0), batches)
    return result, jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))


@pytest.fixture(scope="module")
def batches(make):
    """The last has fewer rows than there are devices."""
    return [make.tokens(ROWS, 9), make.tokens(ROWS, 9, seed=1), make.tokens(3, 9)]


@pytest.fixture(scope="module")
def want(make, batches):
    return train(make.bigrams(), batches)


def assert_near(got, want):
    """Allows another order of sums: 1e-6 for adapters with elements below one."""
    (result, adapters), (want_result, want_adapters) = got, want
    steps = len(result.losses)
    np.testing.assert_allclose(result.losses, want_result.losses[:steps], rtol=1e-5)
    if steps < len(want_result.losses):
        return  # Does without compiling a step for the smaller last batch.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        adapters,
        want_adapters,
    )


def place(model, mesh, spec_of):
    state = nnx.state(model)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), state
        ),
    )


def everywhere(x):
    return P()


def last_axis(name):
    return lambda x: P(*[None] * (x.ndim - 1), name) if x.shape[-1:] == (16,) else P()


@pytest.fixture
def shapes(monkeypatch):
    """Records the shape of a device's tokens in each compiled step."""
    seen, compile_train_step = [], _loop.compile_train_step

    def compile_and_see(*args, batch_sharding, **kwargs):
        seen.append(batch_sharding.shard_shape(args[4]))
        return compile_train_step(*args, batch_sharding=batch_sharding, **kwargs)

    monkeypatch.setattr(_loop, "compile_train_step", compile_and_see)
    return seen


# Where the model is, whether the context has the mesh, and how batches are placed.
CASES = {
    "the context's mesh": (None, True, None),
    "a replicated model": (everywhere, False, None),
    "both": (everywhere, True, None),
    "batches on the mesh": (None, False, P("data")),
    "batches on another device": (everywhere, False, 3),
}


@pytest.mark.matrix
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("spec_of", "in_context", "how"), CASES.values(), ids=CASES)
def test_rows_are_divided(
    make, batches, want, shapes, axis_type, spec_of, in_context, how
):
    mesh, model = mesh_of(axis_type, 8), make.bigrams()
    if spec_of is not None:
        place(model, mesh, spec_of)
    if how is not None:
        to = jax.devices()[how] if how == 3 else NamedSharding(mesh, how)
        # JAX divides by eight what is divided by eight.
        batches = [*jax.device_put(batches[:2], to), batches[2]]
    before = nnx.state(model, nnx.LoRAParam)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        got = train(model, batches, jaxbnb.paged_adamw8bit)
    assert_near(got, want)
    # Five rows of the last batch count for nothing.
    assert shapes == [(1, 9)]
    after = nnx.state(model, nnx.LoRAParam)
    for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True):
        assert a.sharding == b.sharding
        assert a.committed == b.committed


def test_along_axes_that_divide_no_variable(make, batches, want, shapes):
    mesh, model = mesh_of(AxisType.Auto, 4, 2), make.bigrams()
    place(model, mesh, last_axis("model"))
    assert_near(train(model, batches[:2]), want)
    assert shapes == [(2, 9)]
    kernel = model.model.proj.kernel[...]
    assert kernel.sharding.spec == P(None, "model")


def test_a_model_that_is_divided_along_all_axes(make, batches, want, shapes):
    """It is asked whether batches are to be divided too; who places them says so."""
    mesh = mesh_named(("x",), AxisType.Auto, 8)
    message = r"divided along all axes of the mesh, \('x',\), .* place the batches"
    model = make.bigrams()
    place(model, mesh, last_axis("x"))
    with pytest.warns(UserWarning, match=message):
        got = train(model, batches[:2])
    assert_near(got, want)
    model = make.bigrams()
    place(model, mesh, last_axis("x"))
    placed = jax.device_put(batches[:2], NamedSharding(mesh, P("x")))
    assert_near(train(model, placed), want)
    assert shapes == [(8, 9), (1, 9)]


def test_fewer_rows_than_devices(make, batches):
    mesh = mesh_of(AxisType.Auto, 8)
    message = r"a batch of 3 rows is divided among 8 devices. .*PartitionSpec\('data'\)"
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match=message):
        train(make.bigrams(), batches[2:])


def test_a_batch_on_other_devices_than_the_model(make, batches):
    halves = np.asarray(jax.devices()).reshape(2, 4)
    first, second = (jax.sharding.Mesh(half, ("data",)) for half in halves)
    model = make.bigrams()
    place(model, first, everywhere)
    batch = jax.device_put(batches[0], NamedSharding(second, P("data")))
    with pytest.raises(ValueError, match=r"batch 1 is on the mesh .* Put both on one"):
        train(model, [batch])


def test_a_quantised_llama(make, batches):
    """Loaded onto automatic axes, trained in a context of explicit ones."""

    def model():
        return make.llama(quantized=True, adapters=["q_proj"], num_hidden_layers=1)

    want, got = model(), model()
    place(got, mesh_of(AxisType.Auto, 4, 2), everywhere)
    want = train(want, batches[:2])
    with jax.set_mesh(mesh_of(AxisType.Explicit, 4, 2)):
        got = train(got, batches[:2])
    assert_near(got, want)
    # Each device holds an eighth of the rows.
    assert got[0].peak_bytes < 0.6 * want[0].peak_bytes


@pytest.mark.parametrize("text", ["fsdp=16", "data=3,fsdp", "data=16,fsdp"])
def test_a_mesh_that_the_devices_do_not_make(text):
    with pytest.raises(ConfigError, match=rf"mesh is {text}, .* devices is 8"):
        make_mesh(text)


def test_16_bits_are_rounded_alike_on_any_mesh(make):
    """The bits depend on the element, not on the device that has it.

    Gradients of one, so that no other order of sums can make a difference.
    """

    def loss(model, batch):
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves), jnp.float32(1)

    def trained(mesh):
        model = make.bigrams(adapters=None)
        state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model))
        nnx.update(model, state)
        if mesh is not None:
            place(model, mesh, last_axis("model"))
        tx = jaxbnb.adamw8bit(1e-4, min_quantized_size=0)
        with jax.numpy_dtype_promotion("standard"):  # For Flax's layers.
            fit(model, tx, [make.tokens(ROWS, 9)] * 2, wrt=nnx.Param, loss_fn=loss)
        return jax.tree.map(np.asarray, nnx.state(model, nnx.Param))

    got, want = trained(mesh_of(AxisType.Auto, 4, 2)), trained(None)
    jax.tree.map(np.testing.assert_array_equal, got, want)
