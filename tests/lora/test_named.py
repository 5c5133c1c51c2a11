"""Several adapters over one base: switched, disabled, combined, one for each row."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.lora import (
    LoraConfig,
    adapter_names,
    adapter_params,
    adapter_rows,
    add_adapter,
    combine_adapters,
    disable_adapters,
    set_adapter,
)
from jaxbnb.nnx import LayerStack, QuantLinear

POLICY = LoraConfig(r=2, init_lora_weights=False)
REWARD = LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, target_modules=["head"])


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Net(nnx.Module):
    """A stack of quantised layers, and a layer that is not."""

    def __init__(self, rngs):
        self.layers = LayerStack(
            lambda rngs: QuantLinear(
                32, 32, config=QuantConfig("int8", block_size=16), rngs=rngs
            ),
            3,
            rngs=rngs,
        )
        self.head = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layers(lambda layer, x, _: jnp.tanh(layer(x)), x))


def make(reward=REWARD):
    model = Net(nnx.Rngs(0))
    add_adapter(model, POLICY, name="policy", rngs=nnx.Rngs(1))
    add_adapter(model, reward, name="reward", rngs=nnx.Rngs(2))
    return model


@nnx.jit
def run(model, x):
    return model(x)


X = normal((4, 5, 32))
# Sums of 32 float32 numbers of about 1, three layers deep; adapters do 1e5 times more.
CLOSE = {"rtol": 0, "atol": 2e-5}


def test_switching():
    model = make()
    assert adapter_names(model) == ["policy", "reward"]
    assert model.head.active == model.layers.layer.active == ("policy",)
    with disable_adapters(model):
        base = run(model, X)
    np.testing.assert_allclose(base, run(Net(nnx.Rngs(0)), X), **CLOSE)
    policy = run(model, X)
    set_adapter(model, "reward")
    reward = run(model, X)
    set_adapter(model, ["policy", "reward"])
    both = run(model, X)
    set_adapter(model, [])
    np.testing.assert_array_equal(run(model, X), base)
    # The reward's only layer is the last one, after which nothing is nonlinear.
    hidden = model.layers(lambda layer, x, _: jnp.tanh(layer.base(x)), X)
    adapter = model.head.adapters["reward"]
    update = hidden @ adapter.lora_a[...] @ adapter.lora_b[...] * adapter.scale[...]
    np.testing.assert_allclose(reward - base, update, **CLOSE)
    for one, other in ((base, policy), (policy, reward), (both, policy)):
        assert np.abs(one - other).max() > 0.1


def test_it_is_restored_after_an_error():
    model = make()
    set_adapter(model, "reward")
    graphdef = nnx.graphdef(model)

    def fail(context):
        with pytest.raises(RuntimeError, match="midway"), context:
            raise RuntimeError("midway")

    fail(disable_adapters(model))
    fail(adapter_rows(model, ["policy"], jnp.array([0])))
    assert nnx.graphdef(model) == graphdef


def test_each_row_has_its_own():
    """The policy and the reward model of one base, in one batch; nothing recompiled."""
    model = make()
    want = {}
    for name in ("policy", "reward"):
        set_adapter(model, name)
        want[name] = run(model, X)
    set_adapter(model, [])
    want[None] = run(model, X)
    traced = []

    @nnx.jit
    def mixed(model, x, index):
        traced.append(1)
        with adapter_rows(model, ["policy", "reward"], index):
            return model(x)

    graphdef = nnx.graphdef(model)
    for names in (["policy", "reward", None, "policy"], [None, None, "reward", None]):
        numbers = {"policy": 0, "reward": 1, None: -1}
        got = mixed(model, X, jnp.array([numbers[name] for name in names]))
        for i, name in enumerate(names):
            np.testing.assert_allclose(got[i], want[name][i], **CLOSE)
    assert len(traced) == 1
    assert nnx.graphdef(model) == graphdef


def test_gradients_of_a_mixed_batch():
    """Rows of the one adapter teach the other nothing."""
    model = make()

    @nnx.jit
    def gradient(model, x):
        def loss(model):
            with adapter_rows(model, ["policy", "reward"], jnp.array([0, 0, -1, 0])):
                return jnp.sum(model(x) ** 2)

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    grads = nnx.to_flat_state(gradient(model, X))
    for path, grad in grads:
        assert np.any(grad[...]) == ("policy" in path), path


def test_one_is_trained():
    model = make()
    set_adapter(model, "reward")
    wrt = adapter_params("reward")
    optimizer = nnx.Optimizer(model, jaxbnb.adamw8bit(1e-2, weight_decay=0.1), wrt=wrt)
    before = jax.tree.map(np.asarray, nnx.state(model))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.sum(model(X) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

    step(model, optimizer)
    for path, old in nnx.to_flat_state(before):
        value = nnx.state(model)
        for part in path:
            value = value[part]
        same = jax.tree.map(np.array_equal, value.get_value(), old.get_value())
        trained = "reward" in path and path[-1] != "scale"
        assert all(jax.tree.leaves(same)) != trained, path


def test_combined():
    model = make(LoraConfig(r=3, lora_alpha=4, init_lora_weights=False))
    combine_adapters(model, ["policy", "reward"], [0.75, -2.0], name="both")
    assert model.head.active == ("policy",)
    for layer in (model.head, model.layers.layer):
        adapter = {name: layer.adapters[name] for name in layer.adapters}
        weight = jnp.zeros(layer.base.kernel.shape)
        changes = {name: a.change(weight) for name, a in adapter.items()}
        want = 0.75 * changes["policy"] - 2.0 * changes["reward"]
        # Products have five terms of at most 2, with factors that were scaled again.
        np.testing.assert_allclose(changes["both"], want, rtol=0, atol=16 * 2**-23)
        assert adapter["both"].ranks == (5,) * len(adapter["policy"].ranks)


def test_a_stack_of_different_ranks_trains_only_its_own():
    """The padding of a lower rank stays zero, and other layers stay unchanged."""
    model = Net(nnx.Rngs(0))
    config = LoraConfig(
        r=3,
        target_modules=["layers.0", "layers.2"],
        rank_pattern={"layers.2": 1},
        init_lora_weights=False,
    )
    assert add_adapter(model, config, rngs=nnx.Rngs(1)) == ["layers.layer"]
    adapter = model.layers.layer.adapters["default"]
    assert adapter.ranks == (3, 0, 1)
    optimizer = nnx.Optimizer(
        model, jaxbnb.adamw8bit(1e-2, weight_decay=0.1), wrt=nnx.LoRAParam
    )
    loss = lambda model: jnp.sum(model(X) ** 2)  # noqa: E731
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    used = np.arange(3) < np.array([[3], [0], [1]])
    a, b = np.asarray(adapter.lora_a[...]), np.asarray(adapter.lora_b[...])
    assert np.all((a != 0) == used[:, None, :])
    assert np.all((b != 0) == used[:, :, None])


def test_orbax(tmp_path):
    """Saved with all its adapters, and restored into another model."""
    model = make(LoraConfig(r=2, use_dora=True, target_modules=["head"]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        other = nnx.eval_shape(
            lambda: make(LoraConfig(r=2, use_dora=True, target_modules=["head"]))
        )
        graphdef, abstract = nnx.split(other)
        state = checkpointer.restore(tmp_path / "state", abstract)
    restored = nnx.merge(graphdef, state)
    set_adapter(restored, "reward")
    set_adapter(model, "reward")
    np.testing.assert_array_equal(run(restored, X), run(model, X))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: set_adapter(m, "other"), r"adapters \['policy', 'reward'\]; got"),
        (lambda m: set_adapter(m, ["policy"] * 2), "each adapter once"),
        (lambda m: set_adapter(m.layers.layer.base, "policy"), "has the adapters"),
        (
            lambda m: adapter_rows(m, ["policy"], jnp.array([0, 1])).__enter__(),
            r"must be in \[-1, 1\).*got 0 to 1",
        ),
        (
            lambda m: adapter_rows(m, ["policy"], jnp.zeros(2)).__enter__(),
            r"int for each row of the batch; got float32 of shape \(2,\)",
        ),
        (
            lambda m: combine_adapters(m, ["policy"], [1.0, 2.0], name="new"),
            "finite weight for each name",
        ),
        (
            lambda m: combine_adapters(m, ["policy"], [np.nan], name="new"),
            "finite weight for each name",
        ),
        (
            lambda m: combine_adapters(m, ["policy"], [1.0], name="reward"),
            "has an adapter 'reward' already",
        ),
        (
            lambda m: add_adapter(m, POLICY, name="a.b", rngs=nnx.Rngs(0)),
            "str without dots",
        ),
        (
            lambda m: add_adapter(
                m, LoraConfig(init_lora_weights="pissa"), name="c", rngs=nnx.Rngs(0)
            ),
            r"change the weights that the adapters \['policy', 'reward'\] were made",
        ),
    ],
)
def test_bad_input(call, match):
    model = make()
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match=match):
        call(model)
    assert nnx.graphdef(model) == graphdef


def test_rows_of_another_batch():
    model = make()
    with (
        pytest.raises(ValueError, match=r"3 rows; a layer got .* \(4, 5, 32\)"),
        adapter_rows(model, ["policy"], jnp.array([0, 0, 0])),
    ):
        model(X)


def test_dora_is_not_combined():
    model = make(LoraConfig(use_dora=True, target_modules=["head"]))
    with pytest.raises(ValueError, match="head has a DoRA adapter"):
        combine_adapters(model, ["policy", "reward"], [1.0, 1.0], name="both")
    assert adapter_names(model) == ["policy", "reward"]
