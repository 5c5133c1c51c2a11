"""quantize_tree, decode_tree and lora_tree: any function of parameters in 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbnb
from jaxbnb import QuantConfig, QuantizedArray, decode_tree, quantize_tree
from jaxbnb.core import tree_nbytes, tree_report
from jaxbnb.lora import lora_tree


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def make(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "mlp/~/linear_0": {"w": make(64, 128) / 8, "b": make(128)},
        "mlp/~/linear_1": {"w": make(128, 64, dtype=jnp.bfloat16) / 8, "b": make(64)},
        "heads": {"w": make(2, 64, 64) / 8},
        "embed": {"embeddings": make(100, 64)},
        "small": make(8, 8),
        "steps": jnp.arange(8192).reshape(64, 128),
        "key": jax.random.key(0),
        "none": None,
    }


def apply(params, x):
    first, second = params["mlp/~/linear_0"], params["mlp/~/linear_1"]
    h = jax.nn.relu(x @ first["w"] + first["b"])
    return h @ second["w"].astype(jnp.float32) + second["b"]


def test_weights_become_what_quantize_makes(params):
    tree = quantize_tree(params, "nf4")
    report = tree_report(tree)
    # In the order of the tree; Haiku's slashes are dots.
    assert report == ["heads.w", "mlp.~.linear_0.w", "mlp.~.linear_1.w"]
    assert report.left_alone == {"embed.embeddings": (100, 64)}
    decoded = decode_tree(tree)
    assert jax.tree.structure(decoded) == jax.tree.structure(params)
    for name in ("mlp/~/linear_0", "mlp/~/linear_1", "heads"):
        weight = params[name]["w"]
        want = jaxbnb.quantize(weight, "nf4", axis=-2).dequantize()
        assert decoded[name]["w"].dtype == weight.dtype
        np.testing.assert_array_equal(decoded[name]["w"], want)
    for name in ("small", "steps", "key"):
        assert decoded[name] is params[name]
    # Codes and a float32 absmax for each block of 64.
    assert tree_nbytes(tree["heads"]) == 2 * 64 * 64 // 2 + 4 * 2 * 64


def test_rules_skip_and_axis(params):
    rules = [(["embeddings"], "int8"), (["linear_1.w"], None)]
    tree = quantize_tree(params, QuantConfig("fp4", block_size=32), rules=rules)
    assert tree["embed"]["embeddings"].quant_type == "int8"
    assert tree["heads"]["w"].quant_type == "fp4"
    assert not isinstance(tree["mlp/~/linear_1"]["w"], QuantizedArray)
    transposed = quantize_tree({"w": params["heads"]["w"]}, "int8", axis=-1)["w"]
    want = jaxbnb.quantize(params["heads"]["w"], "int8", axis=-1).dequantize()
    np.testing.assert_array_equal(transposed.dequantize(), want)
    again = quantize_tree(tree, "nf4", rules=[(["linear_1.w"], "nf4")])
    assert again["heads"]["w"] is tree["heads"]["w"]
    abstract = quantize_tree(jax.eval_shape(lambda: params["heads"]), "nf4")
    assert tree_nbytes(abstract) == tree_nbytes(quantize_tree(params["heads"], "nf4"))


def test_adapters_train_over_it(params):
    tree = quantize_tree(params, "nf4")
    adapters = lora_tree(tree, r=4, key=jax.random.key(1), target_modules=r"mlp.*w")
    assert set(adapters) == {"mlp.~.linear_0.w", "mlp.~.linear_1.w"}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 64)), jnp.float32)
    target = jnp.roll(x, 1, axis=1)
    before = apply(decode_tree(tree), x)
    at_start = apply(decode_tree(tree, adapters), x)
    np.testing.assert_array_equal(before, at_start)

    @jax.checkpoint
    def loss(adapters):
        y = apply(decode_tree(tree, adapters, scaling=2.0), x)
        return jnp.mean((y - target) ** 2)

    tx = optax.sgd(0.05)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(20):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]


def test_no_decoded_weight_is_kept():
    """Under jax.checkpoint, what the backward pass keeps is small."""
    weights = {"w": jnp.ones((64, 64, 64), jnp.float32)}
    tree = quantize_tree(weights, "nf4")
    adapters = lora_tree(tree, r=1, key=jax.random.key(0))

    def loss(adapters, tree):
        return jnp.sum(decode_tree(tree, adapters)["w"] ** 2)

    def kept(function):
        _, back = jax.eval_shape(lambda a, t: jax.vjp(function, a, t), adapters, tree)
        return sum(x.size for x in jax.tree.leaves(back) if x.dtype == jnp.float32)

    assert kept(jax.checkpoint(loss)) < weights["w"].size < kept(loss)


def test_on_haiku():
    """DeepMind's Haiku: parameters are a dict of dicts of arrays."""
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 64])(x)))
    x = jnp.ones((2, 64))
    params = model.init(jax.random.key(0), x)
    tree = quantize_tree(params, "nf4")
    assert tree_report(tree) == ["mlp.~.linear_0.w", "mlp.~.linear_1.w"]
    got = model.apply(decode_tree(tree), x)
    want = params
    for name in want:
        q = jaxbnb.quantize(params[name]["w"], "nf4", axis=-2)
        want = {**want, name: {**want[name], "w": q.dequantize()}}
    np.testing.assert_array_equal(got, model.apply(want, x))


def test_on_equinox():
    """A model is its own tree, with kernels ``(out, in)``."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(64, 64, 128, depth=1, key=jax.random.key(0))
    tree = quantize_tree(model, "nf4", axis=-1)
    assert tree_report(tree) == ["layers.0.weight", "layers.1.weight"]
    x = jnp.ones(64)
    want = model
    for i in range(2):
        q = jaxbnb.quantize(model.layers[i].weight, "nf4", axis=-1)
        want = eqx.tree_at(lambda m, i=i: m.layers[i].weight, want, q.dequantize())
    np.testing.assert_array_equal(decode_tree(tree)(x), want(x))


# The package and TensorFlow have warnings of their own.
@pytest.mark.filterwarnings("ignore")
@jax.numpy_dtype_promotion("standard")
def test_on_gemma():
    """DeepMind's package, with einsums of its own that layers cannot replace."""
    # The package imports it.
    pytest.importorskip("tensorflow")
    pytest.importorskip("gemma")
    from gemma.gm.nn import _config, _modules, _transformer

    config = _config.TransformerConfig(
        num_embed=64,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[_modules.AttentionType.GLOBAL],
    )
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    tokens = jnp.arange(8)[None]
    params = model.init(jax.random.key(0), tokens)
    tree = quantize_tree(params, "nf4")
    assert len(tree_report(tree)) == 4
    adapters = lora_tree(tree, r=4, key=jax.random.key(1))

    @jax.checkpoint
    def loss(adapters):
        logits = model.apply(decode_tree(tree, adapters), tokens).logits
        labels = jnp.roll(tokens, -1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.jit(jax.value_and_grad(loss))
    tx = optax.adam(1e-2)
    state, losses = tx.init(adapters), []
    for _ in range(10):
        value, grads = step(adapters)
        updates, state = tx.update(grads, state)
        adapters = optax.apply_updates(adapters, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]


WRONG = {
    "no weights": (
        lambda p: quantize_tree({"a": jnp.ones(3)}),
        "no weight to quantise",
    ),
    "a rule": (
        lambda p: quantize_tree(p, rules=[(["linear_9"], "nf4")]),
        "no weight of the tree is called .*mlp.~.linear_0.w",
    ),
    "quantised already": (
        lambda p: quantize_tree(quantize_tree(p, "nf4"), "int8"),
        r"quantised already: heads.w, .* decode it first",
    ),
    "adapters of another tree": (
        lambda p: decode_tree(
            p["heads"],
            lora_tree(quantize_tree({"w": jnp.ones((64, 128))}), key=jax.random.key(0)),
        ),
        r"w has shape \(2, 64, 64\), and the update of its adapters \(64, 128\)",
    ),
    "an axis": (lambda p: quantize_tree(p, axis=0), "axis must be -2 or -1"),
    "a format": (lambda p: quantize_tree(p, "nf5"), "nf5"),
    "a rank": (
        lambda p: lora_tree(p, 0, key=jax.random.key(0)),
        "r must be a positive int",
    ),
    "targets": (
        lambda p: lora_tree(p, key=jax.random.key(0)),
        "selects no weight of the tree",
    ),
    "adapters": (
        lambda p: decode_tree(p, {"nowhere": {}}),
        "the tree has no leaves nowhere",
    ),
}


class Tensor:
    """An array with a dtype of its own, like PyTorch's."""

    dtype, shape = "torch.float32", (64, 64)


def test_arrays_of_others(params):
    with pytest.raises(TypeError, match=r"^here.w is a .*Tensor; leaves are arrays of"):
        quantize_tree({**params, "here": {"w": Tensor()}})


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_bad_inputs(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)
