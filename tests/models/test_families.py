"""Every family against what transformers computed: tests/goldens/make_families.py."""

import dataclasses
import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb.finetune import next_token_loss
from jaxbnb.models import (
    DecoderConfig,
    KVCache,
    RopeScaling,
    _blocks,
    attention,
    load_pretrained,
    save_pretrained,
)
from jaxbnb.models._rope import rope_frequencies
from jaxbnb.models.families import FAMILIES
from jaxbnb.models.families._fields import read_rope

FILE = "model.safetensors"
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))

TOKENS, MASK = jnp.asarray(made.TOKENS, jnp.int32), jnp.asarray(made.MASK)


@pytest.fixture(scope="module")
def goldens():
    return dict(np.load(GOLDENS / "families.npz"))


@pytest.fixture(scope="module")
def save(goldens, tmp_path_factory):
    """``save(family)`` is a folder as transformers wrote it, made once."""
    folders = {}

    def save(family, seed=0, change=str, dtype=np.float32):
        key = family, seed, change, dtype
        if key not in folders:
            about = json.loads(goldens[f"{family}_json"].tobytes())
            folder = tmp_path_factory.mktemp(family)
            (folder / "config.json").write_text(json.dumps(about["config"]))
            tensors = {
                change(name): made.seeded_tensor(family, name, shape, seed).astype(
                    dtype
                )
                for name, shape in about["shapes"].items()
            }
            save_file(tensors, folder / FILE)
            folders[key] = folder
        return folders[key]

    return save


def exhaustive(*families):
    return [pytest.param(name, marks=pytest.mark.exhaustive) for name in families]


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@jax.jit(static_argnums=0)
def run_whole(graphdef, state):
    """Logits of padded rows, all tokens at once."""
    return nnx.merge(graphdef, state)(TOKENS, attention_mask=MASK)


@jax.jit(static_argnums=0)
def run_parts(graphdef, state):
    """The same in parts, with a cache."""
    return run_cached(nnx.merge(graphdef, state))


@jax.jit(static_argnums=0)
def run_beyond(graphdef, state):
    """Both ways; the first part is longer than the 8 tokens where LongRoPE changes."""
    model = nnx.merge(graphdef, state)
    cache, parts = KVCache.empty(model.config, 2, 12, jnp.float32), []
    for part in (np.s_[:, :9], np.s_[:, 9:]):
        mask = jnp.asarray(MASK)[part]
        logits, cache = model(TOKENS[part], attention_mask=mask, cache=cache)
        parts.append(logits)
    return model(TOKENS, attention_mask=MASK), jnp.concatenate(parts, axis=1)


def run_cached(model, dtype=jnp.float32):
    """Logits of padded rows, two tokens at a time."""

    def step(cache, part):
        logits, cache = model(part[0], attention_mask=part[1], cache=cache)
        return cache, logits

    parts = [x.reshape(2, 5, 2).swapaxes(0, 1) for x in (TOKENS, MASK)]
    _, steps = jax.lax.scan(step, KVCache.empty(model.config, 2, 12, dtype), parts)
    return steps.swapaxes(0, 1).reshape(2, 10, -1)


@pytest.mark.parametrize("family", made.FAMILIES)
def test_logits(goldens, save, family):
    model = nnx.split(load_pretrained(save(family)))
    # Shorter parts of LongRoPE would have other frequencies: test_generate.py has them.
    results = run_beyond(*model) if family == "phi3" else [run_parts(*model)]
    want = goldens[f"{family}_logits"]
    for logits in results:
        assert error(np.asarray(logits)[made.MASK], want[made.MASK]) < 1e-4


# Without a cache masks and positions are made in one place for all families: one has
# windows and rope, the other learned positions.
@pytest.mark.parametrize(
    "family",
    [
        *("gemma3_text", "opt"),
        *exhaustive(*sorted({*made.FAMILIES} - {"gemma3_text", "opt", "phi3"})),
    ],
)
def test_logits_without_a_cache(goldens, save, family):
    logits = run_whole(*nnx.split(load_pretrained(save(family))))
    want = goldens[f"{family}_logits"]
    assert error(np.asarray(logits)[made.MASK], want[made.MASK]) < 1e-4


# Windows in some layers, with caps; slopes. The rest: two ropes; windows in all layers;
# learned positions.
@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        "bloom",
        *exhaustive(*sorted({*made.FAMILIES} - {"gemma2", "bloom", "phi3"})),
    ],
)
def test_logits_in_blocks(goldens, save, family, monkeypatch):
    """Without a cache and with one, in blocks of 4 tokens, and rings for windows."""
    monkeypatch.setattr(attention, "DENSE_SCORES", 0)
    monkeypatch.setattr(attention, "DENSE_SLOTS", 0)
    monkeypatch.setattr(_blocks, "BLOCKS", {"default": 4})
    model = load_pretrained(save(family))

    @jax.jit
    def run():
        cache = KVCache.empty(model.config, 2, 12, part=2)
        in_parts, _ = model(TOKENS, attention_mask=MASK, cache=cache)
        return model(TOKENS, attention_mask=MASK), in_parts

    want = goldens[f"{family}_logits"][made.MASK]
    for logits in run():
        assert error(np.asarray(logits)[made.MASK], want) < 1e-4


# Sliding windows and heads that share keys; experts have nothing to do with a cache.
@pytest.mark.parametrize("family", ["gemma2", *exhaustive("qwen3", "mixtral")])
def test_an_int8_cache(goldens, save, family, monkeypatch):
    """It reads the rounded values, and only this changes the logits."""
    model, write = load_pretrained(save(family)), KVCache.write

    def round_and_write(self, is_near, index, keys, values):
        rounded = (jaxbnb.quantize(x, "int8").dequantize() for x in (keys, values))
        return write(self, is_near, index, *rounded)

    # Not NNX's jit, which would keep the compiled function for both.
    got = jax.jit(lambda: run_cached(model, jnp.int8))()[MASK]
    monkeypatch.setattr(KVCache, "write", round_and_write)
    want = jax.jit(lambda: run_cached(model))()[MASK]
    # Only the order of sums in float32 differs.
    assert error(got, want) < 1e-5
    assert error(goldens[f"{family}_logits"][made.MASK], want) > 1e-4


@pytest.mark.parametrize("family", made.FAMILIES)
def test_what_was_loaded_is_saved(save, family, tmp_path):
    folder = save(family)
    save_pretrained(load_pretrained(folder), tmp_path / "out", source=folder)
    got, want = load_file(tmp_path / "out" / FILE), load_file(folder / FILE)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_documents_of_a_family_with_slopes(save):
    """Positions start again in each document, and with them the bias of its keys."""
    model = load_pretrained(save("bloom"))
    ids = jnp.asarray(np.repeat([[0, 2]], [4, 6], axis=1), jnp.int32)

    @jax.jit
    def run(tokens):
        together = model(tokens, segment_ids=ids)
        return together, [model(x) for x in jnp.split(tokens, [4], axis=1)]

    together, apart = run(TOKENS[:1])
    assert error(together, np.concatenate(apart, axis=1)) < 1e-5


@jax.jit(static_argnums=0)
def loss_and_slope(graphdef, state, direction):
    """The loss, and how it changes along a direction of all weights."""
    merge = nnx.merge
    loss, grads = jax.value_and_grad(
        lambda state: next_token_loss(merge(graphdef, state), TOKENS)
    )(state)
    return loss, sum(map(jnp.vdot, *map(jax.tree.leaves, (grads, direction))))


# Each kind of norm, of MLP and of attention; those of the rest are among them too.
@pytest.mark.parametrize(
    "family",
    ["gemma2", "gpt2", "mixtral", "gptj", *exhaustive("mistral", "bloom", "falcon")],
)
def test_gradients(goldens, save, family):
    graphdef, state = nnx.split(load_pretrained(save(family)))
    direction = nnx.state(load_pretrained(save(family, seed=1)))
    loss, slope = loss_and_slope(graphdef, state, direction)
    np.testing.assert_allclose(loss, goldens[f"{family}_loss"], rtol=1e-5)
    np.testing.assert_allclose(slope, goldens[f"{family}_slope"], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "rope", "length"),
    [
        *((name, rope, 1) for name, rope in made.SCALED_ROPE.items()),
        ("longrope_short", made.LONGROPE, 8),
        ("longrope_long", made.LONGROPE, 9),
    ],
)
def test_scaled_rope(goldens, name, rope, length):
    fields = {"max_position_embeddings": 64, "rope_parameters": rope}
    if name.startswith("longrope"):
        fields["original_max_position_embeddings"] = 8
    read = read_rope(fields, 8, part=1.0)
    scaling, theta = read["rope_scaling"], read["rope_theta"]
    got = rope_frequencies(read["rotary_dim"], theta, scaling, length)
    # Theirs are float32 throughout: a few roundings of 2^-24.
    want = goldens[f"rope_{name}"]
    np.testing.assert_allclose(got, want[:-1], rtol=1e-6)
    traced = rope_frequencies(read["rotary_dim"], theta, scaling, jnp.int32(length))
    np.testing.assert_array_equal(np.float32(traced), np.float32(got))
    np.testing.assert_allclose(scaling.attention_factor, want[-1], rtol=1e-6)


@pytest.mark.peers
def test_dynamic_ntk():
    """A base for each length; up to the length in the file nothing changes."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    config = transformers.LlamaConfig(**made.SIZES, rope_parameters=rope)
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"]
    read = DecoderConfig.from_huggingface(config.to_dict())
    assert read.max_position_embeddings == 4 * config.max_position_embeddings
    scaling = read.rope_scaling
    for length in (1, 64, 65, 200):
        want, factor = theirs(config, "cpu", seq_len=torch.tensor(length))
        for known in (length, jnp.int32(length)):
            got = rope_frequencies(read.head_dim, read.rope_theta, scaling, known)
            np.testing.assert_allclose(got, want, rtol=1e-6)
        assert factor == scaling.attention_factor == 1.0
    unscaled = rope_frequencies(read.head_dim, read.rope_theta)
    got = rope_frequencies(read.head_dim, read.rope_theta, scaling, jnp.int32(64))
    np.testing.assert_array_equal(got, unscaled.astype(np.float32))


def test_an_unknown_kind_of_scaling():
    with pytest.raises(ValueError, match=r"kind must be one of .*'llama3'.* got 'ntk'"):
        RopeScaling("ntk", 2.0)


def test_a_bfloat16_file(goldens, save):
    model = load_pretrained(save("gemma2", dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    want = goldens["gemma2_logits"][made.MASK]
    logits = run_parts(*nnx.split(model))
    assert logits.dtype == jnp.float32
    # Some 20 roundings of 2^-9 each, of logits with this spread; of weights too.
    difference = np.abs(np.asarray(logits)[made.MASK] - want).max()
    assert difference < 40 * 2**-9 * want.std() * 3


def without(prefix):
    return lambda name: name.removeprefix(prefix)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", without("transformer.")),
        ("opt", without("model.")),
        ("llama", without("model.")),
        ("bloom", without("transformer.")),
        ("gpt_neox", lambda name: name.replace("embed_out.", "lm_head.")),
        ("gpt_neox", lambda name: name.replace("lm_head.", "embed_out.")),
    ],
)
def test_names_of_other_versions(save, family, change):
    want = load_pretrained(save(family))
    got = load_pretrained(save(family, change=change))
    assert_same(got, want)


def test_the_text_model_of_gemma3(save, tmp_path):
    """The rest of the model is left out, and defaults are filled in."""
    folder = save("gemma3_text")
    fields = json.loads((folder / "config.json").read_text())
    del fields["num_attention_heads"]
    about = {"model_type": "gemma3", "text_config": fields}
    tensors = {f"language_model.{n}": t for n, t in load_file(folder / FILE).items()}
    tensors["vision_tower.vision_model.head.weight"] = np.zeros(1, np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(1, np.float32)
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(tensors, tmp_path / FILE)
    config = load_pretrained(folder).config
    heads = {"num_attention_heads": 8}
    want = dataclasses.replace(config, model_type="gemma3", **heads)
    assert DecoderConfig.from_huggingface(about) == want
    about["text_config"]["num_attention_heads"] = config.num_attention_heads
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert_same_leaves(load_pretrained(tmp_path), load_pretrained(folder))


def assert_same(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    assert_same_leaves(a, b)


def assert_same_leaves(a, b):
    leaves = [jax.tree.leaves(nnx.state(model)) for model in (a, b)]
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": None}
            | {"sliding_window_pattern": 2, "rope_parameters": None},
        ),
        (
            "gpt_neox",
            {"rope_parameters": None, "rotary_emb_base": 100, "rotary_pct": 0.5},
        ),
        (
            "phi3",
            {
                "rope_parameters": None,
                "rope_scaling": {**made.LONGROPE, "type": "su", "rope_type": None},
            },
        ),
        ("mistral", {"head_dim": None}),
        (
            "bloom",
            {"n_embed": 24, "hidden_size": None, "n_inner": None, "seq_length": 2048}
            | {"num_attention_heads": 6, "n_head": None},
        ),
        ("falcon", {"rope_theta": 100.0, "rope_parameters": None}),
        ("falcon_rw", {"multi_query": False, "num_kv_heads": None}),
        ("qwen2", {"layer_types": None}),
        ("smollm3", {"no_rope_layers": None, "layer_types": None}),
    ],
)
def test_configs_of_transformers_4(goldens, family, changes):
    fields = json.loads(goldens[f"{family}_json"].tobytes())["config"]
    changed = {k: v for k, v in (fields | changes).items() if v is not None}
    read = FAMILIES[fields["model_type"]].read_config
    assert read(changed) == read(fields)


QUANT = jaxbnb.QuantConfig("nf4", block_size=16)


@pytest.fixture(scope="module", params=["gpt2", "mixtral"])
def quantised(request, save):
    """A folder, and its model in NF4: fused and 3-D kernels."""
    folder = save(request.param)
    return folder, load_pretrained(folder, quant=QUANT)


def test_quantised(quantised):
    folder, model = quantised
    afterwards = load_pretrained(folder)
    names = jaxbnb.nnx.quantize_model(afterwards, QUANT)
    assert_same(model, afterwards)
    assert len([n for n in names if "mlp" in n]) == (2 if "gpt2" in str(folder) else 3)
    assert not [n for n in names if n.endswith("gate")]
    jaxbnb.nnx.dequantize_model(afterwards)
    got, want = (
        np.asarray(run_parts(*nnx.split(each)))[made.MASK]
        for each in (model, afterwards)
    )
    assert error(got, want) < 1e-4


def test_adapters(quantised, tmp_path):
    _, model = quantised
    model = nnx.clone(model)
    config = jaxbnb.lora.LoraConfig(r=2)
    fresh = nnx.clone(model)
    adapted = jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))

    @nnx.jit
    @nnx.grad(argnums=nnx.DiffState(0, nnx.LoRAParam))
    def gradients(model):
        # Less to compile than the loss.
        return jnp.sum(model.model(TOKENS)[..., :8])

    grads = nnx.to_flat_state(gradients(model))
    assert len(grads) == 2 * len(adapted)
    for path, grad in grads:
        # In every layer and expert. A gets no gradient at first, since B is zero.
        moves = jnp.abs(grad[...]).max(axis=(-2, -1)) > 0
        assert moves.all() == moves.any() == (path[-1] == "lora_b")
    jaxbnb.lora.save_adapter(model, tmp_path)
    jaxbnb.lora.load_adapter(fresh, tmp_path)
    assert_same_leaves(fresh, model)


# Fused layers, slopes and a norm of the embedding; one norm for attention and MLP, and
# a head with a bias.
@pytest.mark.parametrize("family", ["bloom", "codegen"])
def test_training_lowers_the_loss(save, family):
    """Adapters over NF4, on two documents in a row."""
    model = load_pretrained(save(family), quant=QUANT)
    config = jaxbnb.lora.LoraConfig(r=2)
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    ids = jnp.asarray(np.repeat([[0, 1]], [4, 6], axis=1).repeat(2, axis=0), jnp.int32)

    def loss(adapters):
        model = nnx.merge(graphdef, adapters, rest)
        return next_token_loss(model, TOKENS, segment_ids=ids)

    @jax.jit
    def train(adapters):
        def step(adapters, _):
            value, grads = jax.value_and_grad(loss)(adapters)
            return jax.tree.map(lambda p, g: p - 0.5 * g, adapters, grads), value

        return jax.lax.scan(step, adapters, length=8)[1]

    losses = train(adapters)
    assert losses[-1] < 0.9 * losses[0]
