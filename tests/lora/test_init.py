"""What adapters start from: the weight, its norms, dropout's streams."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, LoraLinear, add_adapter
from jaxbnb.nnx import LayerStack, QuantLinear

NF4 = QuantConfig("nf4")
FAN_IN, FAN_OUT, RANK = 64, 24, 4
EPS = 2.0**-23


def normal(shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x)


def make(quant=None, **options):
    """A layer in a holder, its weight, and what `add_adapter` made of it."""
    model = nnx.Dict(a=nnx.Linear(FAN_IN, FAN_OUT, rngs=nnx.Rngs(0)))
    weight = np.asarray(model["a"].kernel[...], np.float64)
    config = LoraConfig(r=RANK, **options)
    add_adapter(model, config, quant=quant, rngs=nnx.Rngs(1))
    return model["a"], weight


def product(layer):
    adapter = layer.adapters["default"]
    a, b = (np.asarray(x[...], np.float64) for x in (adapter.lora_a, adapter.lora_b))
    return float(adapter.scale[...]) * a @ b


def base_of(layer):
    kernel = layer.base.kernel[...]
    if isinstance(layer.base, QuantLinear):
        kernel = kernel.dequantize()
    return np.asarray(kernel, np.float64)


def test_gaussian():
    layer = LoraLinear(
        nnx.Linear(256, 8, rngs=nnx.Rngs(0)),
        LoraConfig(r=16, init_lora_weights="gaussian"),
        rngs=nnx.Rngs(0),
    )
    a = np.asarray(layer.adapters["default"].lora_a[...])
    # The deviation of 4,096 draws is known to 1.1 %; three sigma are 3.4 %.
    assert abs(16 * a.std() - 1) < 0.034
    assert not np.any(layer.adapters["default"].lora_b[...])


def test_both_uniform():
    """PEFT's False: each factor as ``torch.nn.Linear`` starts."""
    layer, _ = make(init_lora_weights=False)
    adapter = layer.adapters["default"]
    for factor, fan in ((adapter.lora_a, FAN_IN), (adapter.lora_b, RANK)):
        largest = np.abs(factor[...]).max()
        # The largest of 96 and of 256 uniform draws; each misses it in 1e-2 of cases.
        assert 0.95 / math.sqrt(fan) < largest <= 1 / math.sqrt(fan)


def test_pissa():
    """The best approximation of the rank, halved; and the weight without it."""
    layer, weight = make(init_lora_weights="pissa", lora_alpha=6)
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    # Float32 decompositions err by some eps of the largest singular value.
    bound = 64 * EPS * s[0]
    np.testing.assert_allclose(product(layer), best, rtol=0, atol=bound)
    np.testing.assert_allclose(base_of(layer), weight - best, rtol=0, atol=bound)
    adapter = layer.adapters["default"]
    norms = np.linalg.norm(adapter.lora_a[...], axis=0)
    np.testing.assert_allclose(norms, np.sqrt(s[:RANK] / 1.5), rtol=64 * EPS)
    np.testing.assert_allclose(
        np.linalg.norm(adapter.lora_b[...], axis=1), norms, rtol=64 * EPS
    )


def test_olora():
    layer, weight = make(init_lora_weights="olora", lora_alpha=6)
    q, r = np.linalg.qr(weight.T)
    want = 1.5 * (q[:, :RANK] @ r[:RANK]).T
    bound = 64 * EPS * np.linalg.norm(weight, 2)
    np.testing.assert_allclose(product(layer), want, rtol=0, atol=bound)
    np.testing.assert_allclose(base_of(layer), weight - want, rtol=0, atol=bound)
    b = layer.adapters["default"].lora_b[...]
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_of_a_quantised_weight(init):
    """The rest is quantised again, to exactly the same bytes and in its format."""
    model = nnx.Dict(a=QuantLinear(FAN_IN, FAN_OUT, config=NF4, rngs=nnx.Rngs(0)))
    weight = np.asarray(model["a"].kernel[...].dequantize(), np.float64)
    config = LoraConfig(r=RANK, init_lora_weights=init)
    add_adapter(model, config, rngs=nnx.Rngs(1))
    layer = model["a"]
    left = np.float32(weight - product(layer))
    want = np.asarray(NF4.quantize_kernel(jnp.asarray(left)).dequantize())
    # The product is summed in another order: an element in a thousand may be as near
    # to the next level.
    different = np.abs(base_of(layer) - want) > 8 * EPS * np.abs(left).max()
    assert np.mean(different) < 2e-3
    assert layer.base.kernel[...].quant_type == "nf4"


def test_pissa_before_quantising_loses_less():
    """Why there is ``quant``: the paper's figure 4, in small."""
    weight_of = lambda layer: base_of(layer) + product(layer)  # noqa: E731
    errors = {}
    for init in (True, "pissa", "loftq"):
        layer, weight = make(quant=NF4, init_lora_weights=init)
        assert isinstance(layer.base, QuantLinear)
        errors[init] = np.linalg.norm(weight - weight_of(layer))
    assert errors["pissa"] < 0.95 * errors[True]
    assert errors["loftq"] < 0.9 * errors[True]


@pytest.mark.parametrize("alpha", [RANK, 6])
def test_loftq(alpha):
    """The algorithm of the paper, in NumPy."""
    layer, weight = make(
        quant=NF4, init_lora_weights="loftq", loftq_iter=3, lora_alpha=alpha
    )
    rest = weight
    for _ in range(3):
        stored = NF4.quantize_kernel(jnp.asarray(rest, jnp.float32)).dequantize()
        stored = np.asarray(stored, np.float64)
        u, s, vh = np.linalg.svd(weight - stored, full_matrices=False)
        low_rank = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        rest = weight - low_rank
    different = np.abs(base_of(layer) - stored) > 8 * EPS * np.abs(weight).max()
    assert np.mean(different) < 2e-3
    if not different.any():
        np.testing.assert_allclose(
            product(layer), low_rank, rtol=0, atol=64 * EPS * np.linalg.norm(weight, 2)
        )


def test_a_stack_is_decomposed_layer_by_layer():
    def stack():
        return LayerStack(
            lambda rngs: nnx.Linear(16, 8, rngs=rngs), 3, rngs=nnx.Rngs(0)
        )

    model = stack()
    weights = np.asarray(model.layer.kernel[...], np.float64)
    config = LoraConfig(
        r=4, init_lora_weights="pissa", rank_pattern={"1": 2}, use_dora=True
    )
    add_adapter(model, config, rngs=nnx.Rngs(1))
    adapter = model.layer.adapters["default"]
    assert adapter.ranks == (4, 2, 4)
    for i, rank in enumerate(adapter.ranks):
        u, s, vh = np.linalg.svd(weights[i], full_matrices=False)
        left = weights[i] - u[:, :rank] * s[:rank] @ vh[:rank]
        bound = 64 * EPS * s[0]
        kernel = np.asarray(model.layer.base.kernel[i])
        np.testing.assert_allclose(kernel, left, rtol=0, atol=bound)
        norms = np.linalg.norm(weights[i], axis=0)
        np.testing.assert_allclose(adapter.magnitude[i], norms, rtol=0, atol=8 * bound)


@pytest.mark.parametrize(
    ("options", "quant", "match"),
    [
        ({"init_lora_weights": "loftq"}, None, "give the format as quant, and the"),
        ({"r": 25, "init_lora_weights": "pissa"}, None, r"r = 25 .* \(64, 24\), which"),
        ({"target_modules": ["a", "norm"]}, None, "'norm' means {'norm': 'LayerNorm'}"),
        ({"target_modules": "no.*"}, None, "'no.*' means {'norm': 'LayerNorm'}"),
        ({"target_modules": ["a", "b"]}, None, "'b' names none of the linear layers"),
        ({"target_modules": ["q"]}, NF4, "q is quantised already"),
        (
            {"target_modules": ["odd"], "use_dora": True},
            None,
            "that multiplies by its kernel",
        ),
        ({"target_modules": ["s.0"], "use_dora": True}, None, "leaves out some of s.l"),
    ],
    ids=str,
)
def test_bad_input(options, quant, match):
    """Says what was got; and nothing is changed."""

    class Odd(nnx.Linear):
        pass

    model = nnx.Dict(
        a=nnx.Linear(FAN_IN, FAN_OUT, rngs=nnx.Rngs(0)),
        norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        odd=Odd(4, 4, rngs=nnx.Rngs(0)),
        q=QuantLinear(64, 4, config=NF4, rngs=nnx.Rngs(0)),
        s=LayerStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 2, rngs=nnx.Rngs(0)),
    )
    graphdef, state = nnx.split(model)
    options = {"target_modules": ["a"], **options}
    with pytest.raises(ValueError, match=match):
        add_adapter(model, LoraConfig(**options), quant=quant, rngs=nnx.Rngs(0))
    after, new_state = nnx.split(model)
    assert after == graphdef
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


# --- DoRA.


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantised"])
def test_dora(quantized):
    """The formula, and its gradients, for which the norm is a constant."""
    layer, _ = make(
        quant=NF4 if quantized else None,
        use_dora=True,
        lora_alpha=8,
        target_modules="a",
    )
    layer.base.bias[...] = normal(FAN_OUT, 5)
    x, dy = normal((5, FAN_IN), 1), normal((5, FAN_OUT), 2)
    # It starts as its base: the magnitudes are the norms.
    np.testing.assert_allclose(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)
    adapter = layer.adapters["default"]
    adapter.lora_b[...] = normal((RANK, FAN_OUT), 3, 1 / 8)
    adapter.magnitude[...] = 1 + normal(FAN_OUT, 4, 1 / 8)
    weight = base_of(layer) + product(layer)
    factor = np.asarray(adapter.magnitude[...]) / np.linalg.norm(weight, axis=0)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    want = x64 @ weight * factor + np.asarray(layer.base.bias[...])
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=2e-5)
    grads = nnx.grad(
        lambda layer: jnp.sum(dy * layer(x)), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(layer)["adapters"]["default"]
    norms = np.linalg.norm(weight, axis=0)
    want = np.sum(dy64 * (x64 @ weight), axis=0) / norms
    np.testing.assert_allclose(grads["magnitude"][...], want, rtol=0, atol=1e-4)
    want = 2 * (x64 @ np.asarray(adapter.lora_a[...])).T @ (dy64 * factor)
    np.testing.assert_allclose(grads["lora_b"][...], want, rtol=0, atol=1e-4)


# --- Dropout.


def test_dropout_is_of_the_updates_input():
    layer, _ = make(lora_dropout=0.5, init_lora_weights=False)
    x = normal((7, FAN_IN))
    dropped, again = layer(x), layer(x)
    assert not np.array_equal(dropped, again)
    layer.eval()
    whole = layer(x)
    update = x @ product(layer).astype(np.float32)
    np.testing.assert_allclose(whole - layer.base(x), update, rtol=0, atol=1e-4)
    # Half of the inputs, doubled: as good as none of the 49 x 2 sums is the whole one.
    assert np.abs(dropped - whole).min(axis=1).max() > 0
    # Its mean over many masks is the update; 1,024 of them know it to 3 %.
    layer.train()
    many = layer(jnp.tile(x[:1], (1024, 1))) - layer.base(x[:1])
    error = np.asarray(many.mean(axis=0) - update[0])
    deviation = np.asarray(many.std(axis=0)) / 32
    assert np.all(np.abs(error) < 5 * deviation)


def test_each_layer_and_each_call_drops_another():
    stack = LayerStack(lambda rngs: nnx.Linear(16, 16, rngs=rngs), 2, rngs=nnx.Rngs(0))
    config = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
    add_adapter(stack, config, rngs=nnx.Rngs(1))
    adapter = stack.layer.adapters["default"]
    keys = jax.random.key_data(adapter.dropout.rngs.key[...])
    assert not np.array_equal(keys[0], keys[1])
    x = normal((3, 16))
    run = nnx.jit(lambda m, x: m(lambda layer, x, _: layer(x), x, remat=True))
    assert not np.array_equal(run(stack, x), run(stack, x))
    np.testing.assert_array_equal(adapter.dropout.rngs.count[...], [2, 2])
    stack.eval()
    np.testing.assert_array_equal(run(stack, x), run(stack, x))
