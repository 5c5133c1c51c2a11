"""What adapters train besides factors: embeddings, rows of tokens, modules, biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.lora import (
    AdapterError,
    LoraConfig,
    TrainedModule,
    adapter_params,
    adapter_rows,
    add_adapter,
    combine_adapters,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from jaxbnb.models import CausalLM, DecoderConfig, resize_token_embeddings

TOKENS = jnp.array([[1, 5, 9, 2], [5, 0, 3, 60]])
EMBED = "model.embed_tokens"
FEW = {"r": 2, "target_modules": ["q_proj"]}


def normal(shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x)


def make(tied=True, quantized=False, **options):
    """A small model without its initializers, which take long to compile."""
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        **options,
    )
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    )
    flat = [
        (path, x.replace(normal(x.shape, i, 1 / 4)))
        for i, (path, x) in enumerate(nnx.to_flat_state(state))
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    if quantized:
        rules = [([EMBED], jaxbnb.QuantConfig("int8", block_size=16))]
        jaxbnb.nnx.quantize_model(model, "int8", rules=rules, skip=())
    return model


def adapt(model, name="default", seed=20, **options):
    """Adds an adapter as training leaves it."""
    add_adapter(model, LoraConfig(**FEW | options), name=name, rngs=nnx.Rngs(seed))
    state = nnx.state(model, adapter_params(name))
    for i, (_, x) in enumerate(nnx.to_flat_state(state)):
        x.set_value(x.get_value() + normal(x.shape, seed + i, 1 / 8))
    nnx.update(model, state)
    return model


def compute(model):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(TOKENS))(state))


def trained(model):
    return {
        ".".join(map(str, path)): tuple(x.shape)
        for path, x in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        if "q_proj" not in path or "biases" in path
    }


# Each with what it trains besides the factors of q_proj.
WAYS = {
    "an embedding": (
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {
            f"{EMBED}.adapters.default.lora_a": (61, 2),
            f"{EMBED}.adapters.default.lora_b": (2, 32),
        },
    ),
    "tokens": (
        {},
        {"trainable_token_indices": [9, 5]},
        {f"{EMBED}.adapters.default.tokens": (2, 32)},
    ),
    "tokens of a head": (
        {"tied": False},
        {"trainable_token_indices": {"lm_head": [60, 1], "embed_tokens": [3]}},
        {
            "lm_head.adapters.default.tokens": (2, 32),
            f"{EMBED}.adapters.default.tokens": (1, 32),
        },
    ),
    "an embedding and a head": (
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {
            "lm_head.adapters.default.kernel": (32, 61),
            f"{EMBED}.adapters.default.embedding": (61, 32),
        },
    ),
    "both as one": (
        {},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {f"{EMBED}.adapters.default.embedding": (61, 32)},
    ),
    "modules of a stack": (
        {},
        {"modules_to_save": ["mlp.down_proj", "model.norm"]},
        {
            "model.layers.layer.mlp.down_proj.adapters.default.kernel": (2, 48, 32),
            "model.norm.adapters.default.scale": (32,),
        },
    ),
    "biases of adapted layers": (
        {"attention_bias": True},
        {"bias": "lora_only"},
        {"model.layers.layer.self_attn.q_proj.biases.default": (2, 32)},
    ),
    "all biases": (
        {"mlp_bias": True, "norm": "layer"},
        {"bias": "all"},
        {
            **{
                f"model.layers.layer.mlp.{name}_proj.biases.default": (2, size)
                for name, size in (("gate", 48), ("up", 48), ("down", 32))
            },
            **{
                f"model.layers.layer.{name}_layernorm.adapters.default.bias": (2, 32)
                for name in ("input", "post_attention")
            },
            "model.norm.adapters.default.bias": (32,),
        },
    ),
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_what_is_trained(way):
    """At first nothing changes; all of these variables are trained, and no others."""
    sizes, options, want = WAYS[way]
    model = make(**sizes)
    base = compute(model)
    config = LoraConfig(**FEW | options)
    add_adapter(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(compute(model), base, rtol=0, atol=1e-5)
    assert trained(model) == want
    adapt(model := make(**sizes), **options)
    wanted = nnx.DiffState(0, nnx.LoRAParam)
    grads = jax.jit(
        lambda s: nnx.grad(lambda m: jnp.sum(m(TOKENS) ** 2), argnums=wanted)(
            nnx.merge(nnx.graphdef(model), s)
        )
    )(nnx.state(model))
    for path, grad in nnx.to_flat_state(grads):
        assert np.abs(grad.get_value()).max() > 0, path


@pytest.mark.parametrize(
    ("way", "quantized"),
    [
        *((way, False) for way in WAYS),
        *((way, True) for way in ("tokens", "an embedding and a head", "all biases")),
    ],
)
def test_files_and_merging(way, quantized, tmp_path):
    sizes, options, _ = WAYS[way]
    model = make(quantized=quantized, **sizes)
    base = compute(model)
    want = compute(adapt(model, **options))
    assert np.abs(want - base).max() > 0.01
    save_adapter(model, tmp_path)
    again = make(quantized=quantized, **sizes)
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(compute(again), want)
    with disable_adapters(model):
        # An embedding that became a head of its own is decoded.
        np.testing.assert_allclose(compute(model), base, rtol=0, atol=1e-4)
    if way == "an embedding":
        with pytest.raises(ValueError, match=r"head of CausalLM too.*untie_head\(\)"):
            merge(model)
        model.untie_head()
        want = compute(model)
    merged = merge(model)
    assert not nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    if not quantized:
        np.testing.assert_allclose(compute(model), want, rtol=0, atol=1e-4)
    unmerge(model, merged)
    np.testing.assert_array_equal(compute(model), want)


@pytest.mark.parametrize("way", ["tokens", "both as one", "all biases"])
def test_adapters_by_row(way):
    sizes, options, _ = WAYS[way]
    model = adapt(adapt(make(**sizes), **options), "other", seed=40, **options)
    alone = compute(model)
    set_adapter(model, "other")
    other = compute(model)
    with adapter_rows(model, ["default", "other"], jnp.array([1, 0])):
        rows = compute(model)
    # The bias of a row is added as a difference.
    np.testing.assert_allclose(rows[0], other[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows[1], alone[1], rtol=0, atol=1e-5)


def test_rows_of_tokens_are_those_of_the_embedding_and_of_a_tied_head():
    model = adapt(make(), target_modules=["q_proj"], trainable_token_indices=[9, 5])
    want = make()
    table = want.model.embed_tokens.embedding
    rows = model.model.embed_tokens.adapters["default"].tokens[...]
    table[...] = table[...].at[jnp.array([9, 5])].set(rows)
    add_adapter(want, LoraConfig(**FEW), rngs=nnx.Rngs(0))
    x, y = (m.model.layers.layer.self_attn.q_proj.adapters for m in (want, model))
    x["default"] = y["default"]
    np.testing.assert_allclose(compute(model), compute(want), rtol=0, atol=1e-5)
    # As in the base, an id counts from the end if it is negative.
    ids = jnp.array([9 - 61, 5 - 61, 9])
    got = model.model.embed_tokens(ids)
    np.testing.assert_allclose(got, rows[jnp.array([0, 1, 0])], rtol=0, atol=1e-6)


def test_a_copy_is_float32_and_computes_in_the_dtype_of_its_base():
    model = make()
    for _, x in nnx.to_flat_state(nnx.state(model)):
        x.set_value(x.get_value().astype(jnp.bfloat16))
    embed = model.model.embed_tokens
    embed.dtype = jnp.bfloat16
    add_adapter(
        model, LoraConfig(**FEW, modules_to_save=["embed_tokens"]), rngs=nnx.Rngs(0)
    )
    copy = model.model.embed_tokens
    assert isinstance(copy, TrainedModule)
    assert copy.embedding.dtype == jnp.float32
    assert copy(TOKENS).dtype == jnp.bfloat16
    np.testing.assert_array_equal(copy(TOKENS), embed(TOKENS))
    merge(adapt(make(), modules_to_save=["norm"]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modules_to_save": ["layers"]}, "contains a stack of layers"),
        ({"modules_to_save": ["layers.0.mlp"]}, "only some of the layers of a stack"),
        ({"modules_to_save": ["score"]}, "'score' names nothing in CausalLM"),
        ({"trainable_token_indices": [61]}, "id 61, and model.embed_tokens has 61 r"),
        ({"trainable_token_indices": {"norm": [1]}}, "'norm' must name one embedding"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "outside a stack"),
        (
            {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}},
            "must have the same ids for both",
        ),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "in modules_to_save, which trains all of its rows",
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "is in target_modules and in trainable_token_indices",
        ),
        (
            {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"},
            "an embedding, whose adapter cannot start from its weight",
        ),
        (
            {"target_modules": ["layers.1.self_attn.q_proj"], "bias": "lora_only"},
            "trains the biases of all layers of a stack",
        ),
    ],
)
def test_what_cannot_be_trained(options, match):
    model = make(attention_bias=True)
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=match):
        add_adapter(model, LoraConfig(**FEW | options), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bias": "some"}, "bias must be one of .*'lora_only'"),
        ({"modules_to_save": "lm_head"}, r"give \['lm_head'\]"),
        ({"trainable_token_indices": [1, 1]}, "1 occurs twice"),
        ({"trainable_token_indices": [-1]}, "ids of tokens, from 0"),
        ({"trainable_token_indices": {"lm_head": []}}, r"\['lm_head'\] must be ids"),
        ({"ensure_weight_tying": "yes"}, "must be True or False"),
    ],
)
def test_fields_that_make_no_sense(options, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**options)


def test_several_adapters():
    """Copies and rows cannot be added up; the switch then changes nothing."""
    for options, match in (
        ({"modules_to_save": ["norm"]}, "model.norm has a copy for each"),
        ({"trainable_token_indices": [3]}, "both replace the row of token 3"),
    ):
        model = adapt(adapt(make(), **options), "other", **options)
        with pytest.raises(ValueError, match=match):
            set_adapter(model, ["default", "other"])
        assert model.model.layers.layer.self_attn.q_proj.active == ("default",)
        with pytest.raises(ValueError, match="trains more than factors of model"):
            combine_adapters(model, ["default", "other"], [0.5, 0.5], name="both")
    # One of the two without a copy is added up.
    model = adapt(adapt(make(), modules_to_save=["norm"]), "other")
    set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match="q_proj, which has adapters"):
        adapt(model, "third", modules_to_save=["q_proj"])


def test_a_tied_head_that_an_adapter_trains_stays_tied():
    model = adapt(make(), trainable_token_indices=[3])
    with pytest.raises(ValueError, match="untie the head before adding it"):
        model.untie_head()


# --- New tokens.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens(tied, tmp_path):
    model = make(tied)
    before = compute(model)
    mean = np.asarray(model.model.embed_tokens.embedding[...]).mean(0)
    resize_token_embeddings(model, 64)
    after = compute(model)
    # The old rows are the same, and the logits of new ones are the mean.
    np.testing.assert_array_equal(after[..., :61], before)
    want = before.mean(-1, keepdims=True)
    np.testing.assert_allclose(after[..., 61:], np.repeat(want, 3, -1), atol=1e-4)
    rows = model.model.embed_tokens(jnp.array([61, 63]))
    np.testing.assert_allclose(rows, [mean, mean], rtol=0, atol=1e-6)
    adapt(model, trainable_token_indices=[62])
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=r"id 62.* has 61 rows; .*resize_token"):
        load_adapter(make(tied), tmp_path)
    # The rows that are not trained come from the file.
    again = make(tied)
    resize_token_embeddings(again, 64)
    again.model.embed_tokens.embedding[...] *= 0
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(compute(again), compute(model))


def test_what_cannot_be_resized():
    model = make()
    with pytest.raises(ValueError, match="at least 61, the model's vocab_size; got 60"):
        resize_token_embeddings(model, 60)
    with pytest.raises(TypeError, match=r"must be an int; got 62\.0"):
        resize_token_embeddings(model, 62.0)
    with pytest.raises(TypeError, match="must be a CausalLM; got Linear"):
        resize_token_embeddings(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), 2)
    with pytest.raises(NotImplementedError, match="QuantEmbed, which cannot get rows"):
        resize_token_embeddings(make(quantized=True), 64)
    adapt(model, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens has adapters; resize"):
        resize_token_embeddings(model, 64)
