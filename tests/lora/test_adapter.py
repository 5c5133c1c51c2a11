"""LoraConfig, LoraLinear and add_adapter: what is adapted, and to what."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbnb import QuantConfig
from jaxbnb.lora import LoraConfig, LoraLinear, add_adapter
from jaxbnb.models import Llama, LlamaConfig
from jaxbnb.nnx import LayerStack, QuantLinear, QuantParam, quantize_model


def normal(shape, dtype=jnp.float32, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x, dtype)


def fill(make, seed=0):
    """A module without its initializers, which take longest to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    generator = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(generator.standard_normal(x.shape) / 8, x.dtype), state
    )
    return nnx.merge(graphdef, state)


def linear(fan_in=64, fan_out=48, quantized=False, **options):
    layer = fill(lambda: nnx.Linear(fan_in, fan_out, rngs=nnx.Rngs(0), **options))
    if quantized:
        layer = QuantLinear.from_linear(layer, QUANTIZED)
    return layer


def llama(quantized=False, **changes):
    config = LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            **changes,
        }
    )
    model = fill(lambda: Llama(config, rngs=nnx.Rngs(0)))
    if quantized:
        quantize_model(model, QUANTIZED)
    return model


QUANTIZED = QuantConfig("int8", block_size=16)
TOKENS = jnp.arange(10).reshape(2, 5)
LINEARS = [
    *(f"model.layers.layer.mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"model.layers.layer.self_attn.{name}_proj" for name in "qkvo"),
]

plain_and_quantized = pytest.mark.parametrize(
    "quantized", [False, True], ids=["plain", "quantised"]
)


def train_b(layer, seed=5):
    """Adapters as training leaves them: B is zeros at first."""
    for _, variable in nnx.to_flat_state(nnx.state(layer, nnx.LoRAParam)):
        variable[...] = normal(variable.shape, seed=seed, scale=1 / 8)
    return layer


# --- LoraConfig.


def test_defaults_are_pefts():
    assert dataclasses.asdict(LoraConfig()) == {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "loftq_iter": 1,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
        "ensure_weight_tying": False,
    }


def test_scaling():
    assert LoraConfig().scaling == 1.0
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0
    assert LoraConfig(r=3, lora_alpha=1.5, use_rslora=True).scaling == 1.5 / math.sqrt(
        3
    )


def test_it_is_a_value():
    config = LoraConfig(target_modules=["q_proj", "v_proj"])
    assert config == LoraConfig(target_modules=("q_proj", "v_proj"))
    assert hash(config) == hash(LoraConfig(target_modules=("q_proj", "v_proj")))
    ranks = {"q_proj": 2}
    config = LoraConfig(rank_pattern=ranks)
    ranks["q_proj"] = 3
    assert config == LoraConfig(rank_pattern={"q_proj": 2})
    assert hash(config) == hash(LoraConfig(rank_pattern={"q_proj": 2}))
    assert config != LoraConfig(rank_pattern=ranks)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4


def test_validation():
    for r in (0, -1, 8.0, True, "8", None):
        with pytest.raises(ValueError, match=f"r must be a positive int; got {r!r}"):
            LoraConfig(r=r)
    for modules in ([], "", ()):
        with pytest.raises(ValueError, match="target_modules must name something"):
            LoraConfig(target_modules=modules)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\); got 1.0"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be in"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be one of .*'loftq'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be one of"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a posit"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dict"),
        ({"rank_pattern": {"((": 1}}, r"rank_pattern '\(\(' is not a regular expr"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.* must be a number"),
        ({"loftq_iter": 0}, "loftq_iter must be a positive int"),
        ({"r": 2**31}, "r must be a positive int; got 2147483648, more than int32"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number in float32; got 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be .* float32; got nan"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "divides by the scale"),
    ],
    ids=str,
)
def test_more_validation(options, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**options)


def test_patterns_are_pefts():
    """The end of a path; of several, the first."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={r"0\.mlp\.up_proj": 2, "up_proj": 4},
        alpha_pattern={"mlp.*": 2},
    )
    of = [config.rank_of(f"m.{i}.{n}") for i in "01" for n in ("mlp.up_proj", "up")]
    assert of == [2, 8, 4, 8]
    assert config.rank_of("m.10.mlp.up_proj") == 4
    assert config.scaling_of("m.0.mlp.up_proj") == 2 / 2
    assert config.scaling_of("m.0.up_proj") == 16 / 4


@pytest.mark.parametrize(
    ("target_modules", "targeted"),
    [
        ("all-linear", LINEARS),
        (["q_proj", "v_proj"], [LINEARS[3], LINEARS[5]]),
        (["mlp.up_proj"], [LINEARS[1]]),
        (["lm_head"], ["lm_head"]),
        ([LINEARS[0]], [LINEARS[0]]),
        (["proj", "up", "no_such"], []),
        (r".*\.mlp\.\w+", LINEARS[:3]),
        (r".*_proj|lm_head", [*LINEARS, "lm_head"]),
        ("mlp", []),
    ],
    ids=str,
)
def test_targets(target_modules, targeted):
    config = LoraConfig(target_modules=target_modules)
    assert [p for p in [*LINEARS, "lm_head"] if config.targets(p)] == targeted


# --- LoraLinear.


@plain_and_quantized
def test_it_starts_as_its_base(quantized):
    base = linear(quantized=quantized)
    layer = LoraLinear(base, LoraConfig(r=4), rngs=nnx.Rngs(0))
    x = normal((5, 64))
    np.testing.assert_array_equal(layer(x), base(x))
    assert layer.base is base
    assert (
        layer.adapters["default"].lora_a.shape,
        layer.adapters["default"].lora_b.shape,
    ) == ((64, 4), (4, 48))
    assert not np.any(layer.adapters["default"].lora_b[...])


def test_a_is_drawn_as_peft_draws_it():
    """Uniform within one over the root of fan-in; another key, another draw."""
    base = linear(64, 8)
    layer = LoraLinear(base, LoraConfig(r=64), rngs=nnx.Rngs(0))
    a = np.asarray(layer.adapters["default"].lora_a[...])
    assert np.abs(a).max() <= 1 / 8
    # 4,096 draws: the deviation of a uniform is known to 1 %, its mean to 0.0012.
    assert abs(a.std() * 8 * math.sqrt(3) - 1) < 0.03
    assert abs(a.mean()) < 0.005
    other = LoraLinear(base, LoraConfig(r=64), rngs=nnx.Rngs(1))
    assert not np.array_equal(other.adapters["default"].lora_a[...], a)


@pytest.mark.parametrize("use_rslora", [False, True])
@plain_and_quantized
def test_the_formula(quantized, use_rslora):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=use_rslora)
    layer = LoraLinear(linear(quantized=quantized), config, rngs=nnx.Rngs(0))
    train_b(layer)
    x = normal((2, 5, 64))
    scale = 6 / (2 if use_rslora else 4)
    kernel = layer.base.kernel[...]
    kernel = kernel.dequantize() if quantized else kernel
    x64, w, bias, a, b = (
        np.asarray(v, np.float64)
        for v in (
            x,
            kernel,
            layer.base.bias[...],
            layer.adapters["default"].lora_a[...],
            layer.adapters["default"].lora_b[...],
        )
    )
    want = x64 @ w + bias + scale * (x64 @ a @ b)
    # The most that float32 sums of 64 and of 64 x 4 terms can be off.
    size = np.abs(x64) @ np.abs(w) + np.abs(bias)
    size = size + scale * (np.abs(x64) @ np.abs(a) @ np.abs(b))
    y = layer(x)
    assert y.shape == want.shape
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= 72 * 2**-24 * size)


@plain_and_quantized
def test_16_bit_computation(quantized):
    """Computes in the dtype of the base's result; the adapter stays float32."""
    base = linear(quantized=quantized, dtype=jnp.bfloat16)
    layer = LoraLinear(base, LoraConfig(r=4), rngs=nnx.Rngs(0))
    x = normal((5, 64))
    np.testing.assert_array_equal(layer(x), base(x))
    train_b(layer)
    assert layer(x).dtype == jnp.bfloat16
    assert (
        layer.adapters["default"].lora_a.dtype
        == layer.adapters["default"].lora_b.dtype
        == jnp.float32
    )
    grads = nnx.grad(
        lambda layer: jnp.sum(layer(x).astype(jnp.float32)),
        argnums=nnx.DiffState(0, nnx.LoRAParam),
    )(layer)
    assert grads["adapters"]["default"]["lora_a"].dtype == jnp.float32


def test_gradients():
    config = LoraConfig(r=4, lora_alpha=8)
    layer = LoraLinear(linear(quantized=True), config, rngs=nnx.Rngs(0))
    x, dy = normal((5, 64)), normal((5, 48), seed=1)

    def gradient(layer):
        trained = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda layer: jnp.sum(dy * layer(x)), argnums=trained)(layer)

    grads = gradient(layer)
    # B is zeros, so A does not matter yet.
    assert not np.any(grads["adapters"]["default"]["lora_a"][...])
    want = 2 * (x @ layer.adapters["default"].lora_a[...]).T @ dy
    np.testing.assert_allclose(
        grads["adapters"]["default"]["lora_b"][...], want, rtol=1e-4, atol=1e-4
    )
    grads = gradient(train_b(layer))
    want = 2 * x.T @ (dy @ layer.adapters["default"].lora_b[...].T)
    np.testing.assert_allclose(
        grads["adapters"]["default"]["lora_a"][...], want, rtol=1e-4, atol=1e-4
    )


def test_transforms():
    layer = LoraLinear(linear(quantized=True), LoraConfig(r=4), rngs=nnx.Rngs(0))
    x = normal((5, 64))
    want = train_b(layer)(x)
    merged = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(merged(x), want)
    got = nnx.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --- add_adapter.


def test_a_model_computes_the_same():
    model = llama(quantized=True)
    run = nnx.jit(lambda model: model(TOKENS))
    want = run(model)
    paths = add_adapter(model, LoraConfig(r=4), rngs=nnx.Rngs(0))
    assert sorted(paths) == sorted(LINEARS)
    assert type(model.lm_head) is nnx.Linear
    layer = model.model.layers.layer.mlp.down_proj
    assert type(layer) is LoraLinear
    assert type(layer.base) is QuantLinear
    assert (
        layer.adapters["default"].lora_a.shape,
        layer.adapters["default"].lora_b.shape,
    ) == ((2, 64, 4), (2, 4, 32))
    # The adapters of two layers differ, and so do those of two linears of a shape.
    assert not np.array_equal(
        layer.adapters["default"].lora_a[0], layer.adapters["default"].lora_a[1]
    )
    gate, up = (
        model.model.layers.layer.mlp.gate_proj,
        model.model.layers.layer.mlp.up_proj,
    )
    assert not np.array_equal(
        gate.adapters["default"].lora_a[...], up.adapters["default"].lora_a[...]
    )
    # Adding s x A B = 0.
    np.testing.assert_allclose(run(model), want, rtol=0, atol=1e-5)


def test_a_stack_gets_the_adapter_of_each_layer():
    def make():
        return LayerStack(
            lambda rngs: nnx.Linear(32, 32, use_bias=False, rngs=rngs),
            3,
            rngs=nnx.Rngs(0),
        )

    stack = fill(make)
    config = LoraConfig(r=4, lora_alpha=8)
    assert add_adapter(stack, config, rngs=nnx.Rngs(0)) == ["layer"]
    layer, x = train_b(stack.layer), normal((5, 32))
    got = stack(lambda layer, x, _: layer(x), x)
    for i in range(3):
        matrix = (
            layer.base.kernel[i]
            + 2
            * layer.adapters["default"].lora_a[i]
            @ layer.adapters["default"].lora_b[i]
        )
        x = x @ matrix
    # Three sums of 32 terms, and as many again through the adapter.
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_only_adapters_are_trained():
    model = llama(quantized=True, num_hidden_layers=1)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    add_adapter(model, config, rngs=nnx.Rngs(0))
    trained = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    assert {(path[-4], path[-1]) for path, _ in trained} == {
        (name, matrix)
        for name in ("q_proj", "up_proj")
        for matrix in ("lora_a", "lora_b")
    }
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)
    before = nnx.clone(model)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.sum(model(TOKENS) ** 2)

        trained = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(loss, argnums=trained)(model))

    for _ in range(2):
        step(model, optimizer)
    (_, new, rest), (_, old, old_rest) = (
        nnx.split(m, nnx.LoRAParam, ...) for m in (model, before)
    )
    assert len(jax.tree.leaves(new)) == 4
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.any(a != b)
    jax.tree.map(np.testing.assert_array_equal, rest, old_rest)
    assert len(nnx.to_flat_state(nnx.state(model, QuantParam))) == 7


def test_a_shared_layer_has_one_adapter():
    shared = linear()
    model = nnx.Dict(a=nnx.Dict(x=shared), b=nnx.Dict(x=shared))
    add_adapter(model, LoraConfig(), rngs=nnx.Rngs(0))
    assert type(model["a"]["x"]) is LoraLinear
    assert model["b"]["x"] is model["a"]["x"]


def test_nothing_is_targeted():
    model = llama()
    graphdef = nnx.graphdef(model)
    config = LoraConfig(target_modules=["c_attn"])
    message = r"'c_attn' names none of the linear layers of CausalLM: .*'lm_head'"
    with pytest.raises(ValueError, match=message):
        add_adapter(model, config, rngs=nnx.Rngs(0))
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"linear layers of LayerNorm: \[\]"):
        add_adapter(norm, LoraConfig(), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == graphdef


def test_what_is_excluded_is_not_what_is_missing():
    model = nnx.Dict(q=linear(), v=linear())
    config = LoraConfig(target_modules=["q"], exclude_modules=["q"])
    message = r"exclude_modules \('q',\) excludes every layer that target_modules .* \["
    with pytest.raises(ValueError, match=message + r"'q'\]"):
        add_adapter(model, config, rngs=nnx.Rngs(0))


def test_a_string_is_an_expression_of_the_whole_path():
    model = nnx.Dict(block=nnx.Dict(q=linear()))
    with pytest.raises(ValueError, match=r"whole path, so give names .*: \['q'\]"):
        add_adapter(model, LoraConfig(target_modules="q"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ({"lora_bias": False}, "leave it out: False is what it does"),
        ({"lora_bias": True}, "lora_bias=True is not supported, only False is"),
        ({"task_type": "CAUSAL_LM"}, "leave it out: it has no effect here"),
        ({"inference_mode": False}, "leave it out: it has no effect here"),
        ({"target_parameters": None}, "leave it out: None is what it does"),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] is not supp"),
        ({"fan_in_fan_out": True}, "leave it out: add_adapter knows"),
        ({"loftq_config": {}}, "give loftq_iter"),
        ({"target_module": ["q"]}, "perhaps target_modules"),
    ],
)
def test_fields_that_only_peft_has(field, hint):
    (name,) = field
    message = f"LoraConfig takes no argument '{name}': {hint}.*It takes r, lora_alpha"
    with pytest.raises(TypeError, match=message):
        LoraConfig(r=4, **field)


def test_an_unknown_field():
    with pytest.raises(TypeError, match="no argument 'zzz'; it takes r, lora_alpha"):
        LoraConfig(zzz=1)


@pytest.mark.peers
def test_a_config_of_pefts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["a"])
    with pytest.raises(TypeError, match=r"jaxbnb.lora.LoraConfig.*got peft.LoraConfig"):
        add_adapter(nnx.Dict(a=linear()), config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rngs", [0, jax.random.key(0), None])
def test_rngs_are_nnx_rngs(rngs):
    with pytest.raises(TypeError, match=r"rngs must be nnx.Rngs, e.g. nnx.Rngs\(0\)"):
        add_adapter(nnx.Dict(a=linear()), LoraConfig(), rngs=rngs)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_model_with_adapters(first):
    """Whichever of its layers has one of the name: nothing is changed."""
    model = nnx.Dict(a=linear(), b=linear())
    add_adapter(model, LoraConfig(target_modules=[first]), rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match="Dict has an adapter 'default' already"):
        add_adapter(model, LoraConfig(), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == graphdef


def test_subclasses_of_linear_are_adapted_as_they_are():
    """Whatever they compute, the update is added to it."""

    class Scaled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = fill(
        lambda: nnx.Dict(
            scaled=Scaled(64, 48, rngs=nnx.Rngs(0)),
            embed=nnx.Embed(8, 64, rngs=nnx.Rngs(0)),
            conv=nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)),
        )
    )
    x = normal((5, 64))
    want = model["scaled"](x)
    assert add_adapter(model, LoraConfig(), rngs=nnx.Rngs(0)) == ["scaled"]
    np.testing.assert_array_equal(model["scaled"](x), want)


def test_while_abstract():
    def make():
        model = llama(quantized=False)
        add_adapter(model, LoraConfig(r=4), rngs=nnx.Rngs(0))
        return model

    assert nnx.graphdef(nnx.eval_shape(make)) == nnx.graphdef(make())


def test_a_dense_base_in_bfloat16_computes_the_same():
    """Its product may be a native kernel's, with sums in another order."""
    base = nnx.Linear(70, 40, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    base.bias[...] = jnp.arange(40, dtype=jnp.bfloat16)
    layer = LoraLinear(base, LoraConfig(r=2), rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (3, 5, 70), jnp.bfloat16)
    want = np.asarray(base(x), np.float64)
    got = layer(x)
    assert got.dtype == jnp.bfloat16
    # One unit in the last place of the product, and one of its sum with the bias.
    product = want - np.asarray(base.bias[...], np.float64)
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 2.0**-7 * (np.abs(product) + np.abs(want)) + 1e-6)
