"""per_parameter: settings of each parameter; state_table: the state of each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbnb
from jaxbnb.optim import per_parameter, state_table
from jaxbnb.optim._clipping import percentile_clipping


def params_and_gradients(steps=3):
    """Returns three leaves of 4096 elements or more, and a small one."""

    def normal(seed):
        generator = np.random.default_rng(seed)

        def leaf(*shape):
            return jnp.asarray(generator.standard_normal(shape), jnp.float32)

        return {
            "embed": {"embedding": leaf(64, 64)},
            "layers": [
                {"kernel": leaf(64, 128), "bias": leaf(128)},
                {"kernel": leaf(128, 64)},
            ],
        }

    return normal(0), [normal(1 + t) for t in range(steps)]


def train(tx, params, gradients):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    assert step._cache_size() == 1
    return params, state


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def labels_of(tx, params):
    """Returns the label of each parameter's `optax.trace`."""
    found = {}
    for label, group in tx.init(params).inner_states.items():
        for path, _ in jax.tree_util.tree_flatten_with_path(group.inner_state.trace)[0]:
            found[jax.tree_util.keystr(path, simple=True, separator=".")] = label
    return found


# --- Settings.


@pytest.mark.parametrize("as_dict", [True, False])
def test_each_leaf_is_trained_as_by_its_own_optimizer(as_dict):
    params, gradients = params_and_gradients()
    rules = [
        (("embedding",), {"min_quantized_size": 2**60, "learning_rate": 1e-3}),
        (r"layers\..*\.kernel", {"weight_decay": 0.5}),
    ]
    tx = per_parameter(
        jaxbnb.adamw8bit, dict(rules) if as_dict else rules, learning_rate=1e-2, b1=0.8
    )
    got, state = train(tx, params, gradients)

    def alone(pick, **options):
        options = {"learning_rate": 1e-2, "b1": 0.8, **options}
        return train(jaxbnb.adamw8bit(**options), pick(params), map(pick, gradients))[0]

    embed = alone(lambda p: p["embed"], min_quantized_size=2**60, learning_rate=1e-3)
    kernels = alone(lambda p: [q["kernel"] for q in p["layers"]], weight_decay=0.5)
    bias = alone(lambda p: p["layers"][0]["bias"])
    # The same operations round differently when compiled with others.
    for a, b in (
        (got["embed"], embed),
        ([layer["kernel"] for layer in got["layers"]], kernels),
        (got["layers"][0]["bias"], bias),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2**-21), a, b
        )
    mu = state.inner_states["rule_0"].inner_state[0].mu
    assert mu["embed"]["embedding"].dtype == jnp.float32
    assert isinstance(mu["layers"][1]["kernel"], optax.MaskedNode)
    mu = state.inner_states["rule_1"].inner_state[0].mu
    assert mu["layers"][1]["kernel"].dtype == jnp.uint8


def test_the_first_match_wins():
    params, _ = params_and_gradients(0)
    rules = [
        (["layers.0.kernel"], {"decay": 0.1}),
        (["kernel", "bias"], {"decay": 0.2}),
        (".*", {"decay": 0.3}),
    ]
    assert labels_of(per_parameter(optax.trace, rules, decay=0.9), params) == {
        "embed.embedding": "rule_2",
        "layers.0.bias": "rule_1",
        "layers.0.kernel": "rule_0",
        "layers.1.kernel": "rule_1",
    }


def test_the_same_settings_are_one_transformation():
    params, _ = params_and_gradients(0)
    rules = [
        (["embedding"], {"decay": 0.5}),
        (["bias"], {}),
        (["layers.1.kernel"], {"decay": 0.5, "nesterov": False}),
        (["layers.0.kernel"], {"nesterov": False}),
    ]
    tx = per_parameter(optax.trace, rules, decay=0.9, nesterov=False)
    assert labels_of(tx, params) == {
        "embed.embedding": "rule_0",
        "layers.0.bias": "default",
        "layers.0.kernel": "default",
        "layers.1.kernel": "rule_0",
    }
    # Arrays and functions are not compared by value, and 1 does not equal True.
    rate = jnp.ones(())
    rules = [(["bias"], {"decay": rate}), (["kernel"], {"decay": jnp.ones(())})]
    made = per_parameter(
        optax.trace, [*rules, (["embedding"], {"decay": rate})], decay=1
    )
    assert sorted(made.init(params).inner_states) == ["default", "rule_0", "rule_1"]
    made = per_parameter(
        optax.trace, [(["bias"], {"nesterov": True})], decay=1, nesterov=1
    )
    assert sorted(made.init(params).inner_states) == ["default", "rule_0"]


def test_without_rules_it_is_the_optimizer():
    params, gradients = params_and_gradients()
    got, _ = train(
        per_parameter(jaxbnb.adamw8bit, [], learning_rate=1e-2), params, gradients
    )
    want, _ = train(jaxbnb.adamw8bit(1e-2), params, gradients)
    assert_same(got, want)


def test_a_bare_array_has_the_empty_path():
    tx = per_parameter(optax.trace, [(".*", {"decay": 0.1})], decay=0.9)
    assert labels_of(tx, jnp.ones(3)) == {"": "rule_0"}


def test_a_mask_in_the_defaults():
    params, gradients = params_and_gradients(1)
    zeros = jax.tree.map(jnp.zeros_like, gradients[0])
    for mask in (
        jax.tree.map(lambda p: p.ndim > 1, params),
        lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree),
    ):
        tx = per_parameter(
            jaxbnb.adamw8bit,
            [(["layers.0.kernel"], {"weight_decay": 0.0})],
            learning_rate=1.0,
            weight_decay=0.5,
            mask=mask,
        )
        got, _ = train(tx, params, [zeros])
        np.testing.assert_array_equal(
            got["embed"]["embedding"], params["embed"]["embedding"] / 2
        )
        assert_same(got["layers"][0], params["layers"][0])


# --- With parts of JAX, Optax and Flax.


RULES = [(["embedding"], {"min_quantized_size": 2**60}), (["bias"], {"b1": 0.5})]


def test_init_of_shapes():
    params, _ = params_and_gradients(0)
    tx = per_parameter(jaxbnb.adamw8bit, RULES, learning_rate=1e-2)
    want = tx.init(params)
    assert_same(tx.init(jax.eval_shape(lambda: params)), want)
    assert_same(jax.jit(tx.init)(params), want)


def test_tree_map_params():
    params, _ = params_and_gradients(0)
    tx = per_parameter(jaxbnb.adamw8bit, RULES, learning_rate=1e-2)
    labels = optax.tree_map_params(
        tx,
        lambda _: "of a parameter",
        tx.init(params),
        transform_non_params=lambda _: "other",
    )
    leaves = jax.tree.leaves(labels)
    # Four parameters have two moments and their absmax; three groups have a count.
    assert sorted(leaves) == ["of a parameter"] * 16 + ["other"] * 3


def test_inside_of_others():
    params, gradients = params_and_gradients()
    tx = per_parameter(jaxbnb.adamw8bit, RULES, learning_rate=1e-2)
    want, _ = train(tx, params, gradients)
    chain = optax.chain(optax.identity(), optax.masked(tx, True))
    assert_same(train(chain, params, gradients)[0], want)
    # A mask hides a parameter from the rules.
    mask = {"embed": False, "layers": True}
    with pytest.raises(ValueError, match="rule 0"):
        optax.masked(tx, mask).init(params)
    # Paged state is committed, so these must be: see test_paged.
    params, gradients = jax.device_put((params, gradients), jax.devices()[0])
    paged, state = train(jaxbnb.optim.paged(tx), params, gradients)
    assert_same(paged, want)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}


def test_settings_that_are_part_of_the_state():
    """optax.inject_hyperparams keeps the signature."""
    params, gradients = params_and_gradients(1)
    tx = per_parameter(
        optax.inject_hyperparams(optax.sgd),
        [(["bias"], {"learning_rate": 0.0})],
        learning_rate=1.0,
    )
    got, state = train(tx, params, gradients)
    np.testing.assert_array_equal(got["layers"][0]["bias"], params["layers"][0]["bias"])
    np.testing.assert_array_equal(
        got["layers"][1]["kernel"],
        params["layers"][1]["kernel"] - gradients[0]["layers"][1]["kernel"],
    )
    group = state.inner_states["rule_0"].inner_state
    assert group.hyperparams["learning_rate"] == 0


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_nnx_optimizer():
    """It calls init with variables, and update with their values."""
    model = Model(nnx.Rngs(0))
    tx = per_parameter(
        jaxbnb.adamw8bit,
        [
            (["layers.0.kernel"], {"min_quantized_size": 2**60}),
            (r".*\.bias", {"learning_rate": 0.0}),
        ],
        learning_rate=1e-2,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((8, 64))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert not np.any(model.layers[1].bias[...])
    groups = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]["inner_states"]
    mu = groups["rule_0"]["inner_state"][0]["mu"]["layers"]
    assert mu[0]["kernel"].dtype == jnp.float32
    mu = groups["default"]["inner_state"][0]["mu"]["layers"]
    assert mu[1]["kernel"].dtype == jnp.uint8


def test_variables_of_which_a_mask_hides_some():
    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    tx = per_parameter(optax.trace, [(["0.kernel"], {"decay": 0.1})], decay=0.9)
    masked = optax.masked(tx, lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree))
    state = masked.init(params)
    _, state = masked.update(jax.tree.map(jnp.ones_like, params), state)
    grads, state = masked.update(jax.tree.map(jnp.ones_like, params), state)
    means = jax.tree.map(
        lambda g: round(float(jnp.mean(g)), 4), nnx.to_pure_dict(grads)
    )
    assert means["layers"][0] == {"kernel": 1.1, "bias": 1.0}
    assert means["layers"][1] == {"kernel": 1.9, "bias": 1.0}


def test_linen_parameters_with_names_of_axes():
    init = nn.with_partitioning(nn.initializers.ones, ("x", "y"))
    layer = nn.Dense(4, kernel_init=init)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    tx = per_parameter(optax.trace, [(["kernel"], {"decay": 0.1})], decay=0.9)
    table = state_table(tx, params).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["bias", "kernel", "total"]


# --- Errors.


def test_a_rule_that_matches_nothing():
    params, _ = params_and_gradients(0)
    tx = per_parameter(
        optax.trace, [(["bias"], {}), ("bias", {"decay": 1.0})], decay=0.9
    )
    message = (
        "rule 1, 'bias', matches none of the parameters 'embed.embedding', "
        "'layers.0.bias', 'layers.0.kernel', 'layers.1.kernel'. A string is a regular "
        "expression for the whole path; a list has names"
    )
    for call in (tx.init, jax.jit(tx.init), lambda p: jax.eval_shape(tx.init, p)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(params)
    many = {f"w{i}": jnp.ones(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"'w5' and 3 more\. A string"):
        per_parameter(optax.trace, [(["bias"], {})], decay=0.9).init(many)


def test_a_rule_that_earlier_ones_leave_nothing():
    params, _ = params_and_gradients(0)
    rules = [(".*kernel", {"decay": 0.1}), (["layers.1.kernel"], {"decay": 0.2})]
    tx = per_parameter(optax.trace, rules, decay=0.9)
    message = r"rule 1, \['layers.1.kernel'\], decides for no parameter: earlier rules"
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    ("make", "rules", "defaults", "message"),
    [
        (
            optax.trace,
            [(["bias"], {"momentum": 0.5})],
            {"decay": 0.9},
            "trace takes no argument 'momentum', of rule 0, ['bias']; it takes decay, "
            "nesterov, accumulator_dtype",
        ),
        (
            optax.trace,
            [],
            {"decay": 0.9, "lr": 1},
            "trace takes no argument 'lr', of the defaults: chain it with",
        ),
        (
            jaxbnb.adamw8bit,
            [(["bias"], {"blocksize": 64})],
            {"learning_rate": 1},
            "adamw8bit takes no argument 'blocksize', of rule 0",
        ),
        (optax.trace, [(["bias"], {})], {}, "missing 1 required positional argument"),
    ],
)
def test_arguments_that_make_does_not_take(make, rules, defaults, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        per_parameter(make, rules, **defaults)


def test_a_factory_of_any_arguments_judges_for_itself():
    def make(**options):
        return optax.trace(**options)

    per_parameter(make, [(["bias"], {"nesterov": True})], decay=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        per_parameter(make, [(["bias"], {"momentum": 1.0})], decay=0.9)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*.bias", {})], "pattern of rule 0, '*.bias', is not a regular expression"),
        ([(".*", {}), ((), {})], "pattern of rule 1 must be a list of names or one"),
        ([("", {})], "pattern of rule 0 must be a list of names or one regular"),
        ([([""], {})], "pattern of rule 0 must be"),
        ([([re.compile("a")], {})], "pattern of rule 0 must be"),
        ([(3, {})], "expression; got 3"),
        (
            [(".*", 0.5)],
            "overrides of rule 0, '.*', must be a dict of keyword arguments",
        ),
        ([".*"], "rule 0 must be a pair of a pattern and its overrides; got '.*'"),
        ([(".*", {}, 1)], "rule 0 must be a pair"),
    ],
    ids=str,
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        per_parameter(optax.trace, rules, decay=0.9)


# --- The table.


def cells(table):
    """Parses each path's state, bytes and bytes per element, two spaces apart."""
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert rows[0] == ["parameter", "shape", "dtype", "state", "bytes", "per element"]
    return {row[0]: row[1:] for row in rows[1:]}


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def rules_tx():
    return per_parameter(jaxbnb.adamw8bit, RULES, learning_rate=1e-2)


@pytest.mark.parametrize(
    ("tx", "want"),
    [
        # 64 x 64 elements have two codes each, and 16 blocks of 256 two absmax each. An
        # unquantised leaf has two times one absmax.
        (
            jaxbnb.adamw8bit(1e-2),
            [("uint8, float32", 8192 + 128), ("float32", 1024 + 8)],
        ),
        (rules_tx(), [("float32", 32768 + 8), ("float32", 1024 + 8)]),
        (
            optax.adam(1e-2, mu_dtype=jnp.bfloat16),
            [("bfloat16, float32", 6 * 4096), ("bfloat16, float32", 6 * 128)],
        ),
        (optax.sgd(1e-2), [("-", 0), ("-", 0)]),
        (optax.sgd(1e-2, momentum=0.9), [("float32", 4 * 4096), ("float32", 4 * 128)]),
        (
            optax.masked(optax.trace(0.9), {"embed": True, "layers": False}),
            [("float32", 4 * 4096), ("-", 0)],
        ),
        (
            optax.chain(percentile_clipping(), optax.trace(0.9)),
            [("float32", 4 * 4096), ("float32", 4 * 128)],
        ),
        (
            optax.MultiSteps(optax.trace(0.9), 4).gradient_transformation(),
            [("float32", 8 * 4096), ("float32", 8 * 128)],
        ),
        (
            jaxbnb.optim.paged(jaxbnb.adam8bit(1e-2)),
            [("uint8, uint32", 8192 + 128), ("uint32", 1024 + 8)],
        ),
        (
            optax.adafactor(1e-2),
            [("float32", 4 * (4096 + 1 + 1)), ("float32", 4 * (128 + 1 + 1))],
        ),
        (optax.add_noise(1.0, 0.5, 0), [("-", 0), ("-", 0)]),
    ],
    ids=[
        "adamw8bit",
        "rules",
        "adam",
        "sgd",
        "momentum",
        "masked",
        "clipping",
        "MultiSteps",
        "paged",
        "adafactor",
        "noise",
    ],
)
def test_table(tx, want):
    """It has the rows of two parameters, and the total of the state's bytes."""
    params, _ = params_and_gradients(0)
    table = cells(state_table(tx, params))
    for (path, p), (dtypes, size) in zip(
        {
            "embed.embedding": params["embed"]["embedding"],
            "layers.0.bias": params["layers"][0]["bias"],
        }.items(),
        want,
        strict=True,
    ):
        row = [str(p.shape), "float32", dtypes, str(size), f"{size / p.size:.2f}"]
        assert table[path] == row
    state = tx.init(params)
    total = nbytes(state)
    elements = sum(p.size for p in jax.tree.leaves(params))
    assert table["total"] == [str(total), f"{total / elements:.2f}"]
    in_rows = sum(
        int(row[-2]) for path, row in table.items() if path not in ("other", "total")
    )
    others = {path: row for path, row in table.items() if path == "other"}
    assert in_rows + sum(int(row[-1]) for row in others.values()) == total
    assert list(table)[:4] == [
        "embed.embedding",
        "layers.0.bias",
        "layers.0.kernel",
        "layers.1.kernel",
    ]


def test_table_of_a_bare_array():
    table = cells(state_table(jaxbnb.adam8bit(1e-2), jnp.ones((64, 64))))
    assert table[""] == ["(64, 64)", "float32", "uint8, float32", "8320", "2.03"]
    assert table["other"] == ["int32", "4"]


def test_table_of_a_tuple_in_a_chain_that_is_a_tuple():
    params = (jnp.ones((64, 64)), jnp.ones(3))
    tx = optax.chain(jaxbnb.adam8bit(1e-2), optax.trace(0.9))
    table = cells(state_table(tx, params))
    assert table["0"][2:] == ["uint8, float32", str(8320 + 4 * 4096), "6.03"]
    assert table["1"][2:] == ["float32", "44", "14.67"]
    assert table["other"] == ["int32", "4"]


def test_table_of_an_nnx_state_and_of_shapes():
    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    tx = per_parameter(jaxbnb.adamw8bit, [(["bias"], {"b1": 0.5})], learning_rate=1e-2)
    table = state_table(tx, params)
    assert state_table(tx, jax.eval_shape(lambda: params)) == table
    assert state_table(tx, nnx.to_pure_dict(params)) == table
    assert cells(table)["layers.1.kernel"][2:] == ["uint8, float32", "8320", "2.03"]


def test_table_of_no_parameters_and_of_empty_ones():
    assert cells(state_table(optax.trace(0.9), {})) == {"total": ["0"]}
    table = cells(state_table(optax.trace(0.9), {"w": jnp.ones((0, 3))}))
    assert table["w"] == ["(0, 3)", "float32", "-", "0"]
