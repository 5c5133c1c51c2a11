"""Adapters in PEFT's files: round trips, and files that are not what they seem."""

import copy
import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.lora import (
    AdapterError,
    LoraAdapter,
    LoraConfig,
    add_adapter,
    load_adapter,
    save_adapter,
)
from jaxbnb.lora._layer import LoraLinear
from jaxbnb.lora._peft_config import KNOWN_FIELDS
from jaxbnb.models import Llama, LlamaConfig, save_pretrained
from jaxbnb.nnx import quantize_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def normal(shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(np.float32(scale) * x)


def fill(make):
    """A module without its initializers, which take longer to compile than all else."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(lambda x: normal(x.shape, scale=1 / 4), state)
    return nnx.merge(graphdef, state)


def llama(quantized=False):
    model = fill(lambda: Llama(LlamaConfig(**SIZES), rngs=nnx.Rngs(0)))
    if quantized:
        quantize_model(model, QuantConfig("int8", block_size=16))
    return model


def two_linears():
    """Makes a small model with short paths."""
    return fill(lambda: nnx.Dict(a=make_linear(), b=make_linear(), norm=make_norm()))


def make_linear():
    return nnx.Linear(16, 12, rngs=nnx.Rngs(0))


def make_norm():
    return nnx.LayerNorm(4, rngs=nnx.Rngs(0))


def adapted(model, **options):
    """With adapters as training leaves them, all of them different."""
    add_adapter(model, LoraConfig(**{"r": 4, **options}), rngs=nnx.Rngs(1))
    for i, (_, variable) in enumerate(lora_variables(model)):
        variable[...] = normal(variable.shape, 10 + i, scale=1 / 8)
    # Padding with zeros stays zero in training.
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoraAdapter) and min(module.ranks) < max(module.ranks):
            used = np.arange(max(module.ranks)) < np.array(module.ranks)[:, None]
            module.lora_a[...] = jnp.where(used[:, None], module.lora_a[...], 0)
            module.lora_b[...] = jnp.where(used[..., None], module.lora_b[...], 0)
    return model


def lora_variables(model):
    return nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))


def assert_same_adapters(got, want):
    got, want = lora_variables(got), lora_variables(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter of `two_linears`, and what may be changed in it."""
    folder = tmp_path / "adapter"
    save_adapter(adapted(two_linears()), folder)
    return folder


def rewrite(folder, **changes):
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, **changes}))


def assert_refused(folder, error, match, model=None):
    """Checks the error, and that the model is unchanged to the bit."""
    model = two_linears() if model is None else model
    graphdef, state = nnx.split(model)
    state = jax.tree.map(np.asarray, state)
    with pytest.raises(error, match=match):
        load_adapter(model, folder)
    new_graphdef, new_state = nnx.split(model)
    assert new_graphdef == graphdef
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


# --- Round trips.


@pytest.mark.parametrize(
    ("quantized", "options"),
    [
        (True, {}),
        (False, {"lora_alpha": 5, "use_rslora": True}),
        (True, {"target_modules": ["q_proj", "down_proj"]}),
        (False, {"target_modules": r".*\.self_attn\.[qv]_proj|lm_head"}),
        (
            True,
            {
                "target_modules": r".*layers\.[02]\..*_proj",
                "rank_pattern": {"q_proj": 2},
            },
        ),
        (True, {"use_dora": True, "rank_pattern": {"layers.1.mlp.up_proj": 6}}),
        (
            False,
            {
                "alpha_pattern": {"layers.layer.mlp.*": 2},
                "init_lora_weights": False,
            },
        ),
    ],
    ids=str,
)
def test_what_was_saved_is_loaded(tmp_path, quantized, options):
    model = adapted(llama(quantized), **options)
    save_adapter(model, tmp_path / "new" / "folder")
    loaded = llama(quantized)
    config = load_adapter(loaded, tmp_path / "new" / "folder")
    assert_same_adapters(loaded, model)
    want = LoraConfig(**{"r": 4, **options})
    assert (config.r, config.scaling) == (want.r, want.scaling)
    (_, got, rest), (_, expected, same) = (
        nnx.split(m, nnx.LoRAParam, ...) for m in (loaded, model)
    )
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, rest, same)


def test_an_adapter_of_the_plain_model_fits_the_quantised_one(tmp_path):
    model = adapted(llama(), target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    quantized = llama(quantized=True)
    load_adapter(quantized, tmp_path)
    assert_same_adapters(quantized, model)


def test_the_tensors_are_pefts(tmp_path):
    """A (r, in) and B (out, r) of each layer, numbered as PEFT numbers them."""
    model = adapted(llama(), target_modules=["q_proj", "down_proj"])
    save_adapter(model, tmp_path, base_model_name_or_path="of/somebody")
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * 2 * 3
    layer = model.model.layers.layer
    for i in range(3):
        for name, module in (
            ("self_attn.q_proj", layer.self_attn.q_proj),
            ("mlp.down_proj", layer.mlp.down_proj),
        ):
            prefix = f"base_model.model.model.layers.{i}.{name}"
            a, b = (tensors[f"{prefix}.lora_{kind}.weight"] for kind in "AB")
            np.testing.assert_array_equal(a, module.adapters["default"].lora_a[i].T)
            np.testing.assert_array_equal(b, module.adapters["default"].lora_b[i].T)
            assert a.dtype == b.dtype == np.float32
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["base_model_name_or_path"] == "of/somebody"
    assert fields["target_modules"] == ["down_proj", "q_proj"]
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_saved_twice_it_is_replaced(saved):
    model = adapted(two_linears(), r=2)
    save_adapter(model, saved)
    loaded = two_linears()
    assert load_adapter(loaded, saved).r == 2
    assert_same_adapters(loaded, model)


def test_16_bit_tensors(saved):
    """As PEFT saves the adapters of a 16-bit model; ours stay float32."""
    tensors = load_file(saved / WEIGHTS)
    narrow = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    save_file(narrow, saved / WEIGHTS)
    model = two_linears()
    load_adapter(model, saved)
    assert model["a"].adapters["default"].lora_a.dtype == jnp.float32
    want = narrow["base_model.model.a.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(model["a"].adapters["default"].lora_a[...], want)


def test_a_list_of_layers_is_numbered_as_it_is(tmp_path):
    def make():
        return fill(lambda: nnx.Dict(layers=nnx.List([make_linear(), make_linear()])))

    model = adapted(make())
    save_adapter(model, tmp_path)
    names = {
        f"base_model.model.layers.{i}.lora_{k}.weight" for i in (0, 1) for k in "AB"
    }
    assert set(load_file(tmp_path / WEIGHTS)) == names
    loaded = make()
    load_adapter(loaded, tmp_path)
    assert_same_adapters(loaded, model)


def test_one_of_two_layers_of_the_same_name(tmp_path):
    """A layer targeted by a longer name is not targeted by its last part."""

    def make():
        block = lambda: nnx.Dict(proj=make_linear())  # noqa: E731
        return fill(lambda: nnx.Dict(a=block(), b=block()))

    model = adapted(make(), target_modules=["a.proj"])
    save_adapter(model, tmp_path)
    loaded = make()
    load_adapter(loaded, tmp_path)
    assert_same_adapters(loaded, model)


def test_a_model_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="Dict has no adapters to save; add_adapter"):
        save_adapter(two_linears(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- A disk that fills up.


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_full_disk(saved, tmp_path, monkeypatch, file, existing):
    """Nothing half-written under a final name; what was there is still there."""
    folder = saved if existing else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def write_half(write):
        def write_until_full(path, data, *args, **kwargs):
            if file not in path.name:
                return write(path, data, *args, **kwargs)
            write(path, data[: len(data) // 2], *args, **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")

        return write_until_full

    for name in ("write_bytes", "write_text"):
        write = getattr(pathlib.Path, name)
        monkeypatch.setattr(pathlib.Path, name, write_half(write))
    with pytest.raises(OSError, match="No space left on device") as error:
        save_adapter(adapted(two_linears(), r=2), folder)
    monkeypatch.undo()
    assert error.value.filename == str(folder / file)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == (before if existing else {})


@pytest.mark.parametrize("step", [0, 1])
def test_a_kill_does_not_mix_two_adapters(saved, monkeypatch, step):
    steps, replace = [], os.replace

    def kill(*paths):
        if len(steps) == step:
            raise KeyboardInterrupt
        steps.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapted(two_linears(), r=2), saved)
    monkeypatch.undo()
    assert_refused(saved, AdapterError, f"has no {CONFIG}")
    save_adapter(adapted(two_linears(), r=2), saved)
    assert load_adapter(two_linears(), saved).r == 2


# --- Files that are missing, damaged, or of something else.


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file(saved, file):
    (saved / file).unlink()
    assert_refused(saved, AdapterError, f"adapter has no {file}")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -100])
def test_truncated_weights(saved, kept):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:kept])
    assert_refused(saved, AdapterError, f"{WEIGHTS} is truncated or damaged")


def test_weights_of_another_kind(saved):
    (saved / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(1000))
    assert_refused(saved, AdapterError, f"{WEIGHTS} is truncated or damaged")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "is not JSON"),
        (b'{"r": 4', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"r": ' + b"4" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not an adapter's configuration"),
        (b'{"peft_type": "LORA"}', "is not an adapter's configuration: it has no 'r'"),
    ],
)
def test_a_damaged_configuration(saved, text, match):
    (saved / CONFIG).write_bytes(text)
    assert_refused(saved, AdapterError, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "4"},
        {"r": None},
        {"r": 4.5},
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"target_modules": 5},
        {"target_modules": [1, 2]},
        {"target_modules": "(("},
        {"exclude_modules": "(("},
        {"exclude_modules": 5},
        {"layers_to_transform": "0", "target_modules": ["a"]},
        {"layers_to_transform": [-1], "target_modules": ["a"]},
        {"layers_to_transform": [0], "target_modules": ".*"},
        {"layers_pattern": "layers", "target_modules": ["a"]},
        {"layers_pattern": 5, "layers_to_transform": 1, "target_modules": ["a"]},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(saved, changes):
    rewrite(saved, **changes)
    assert_refused(saved, AdapterError, "adapter_config.json")


def test_a_folder_that_does_not_exist(saved):
    match = r"is not a folder with adapter_config\.json"
    assert_refused(saved / "absent", AdapterError, match)
    assert_refused(saved / WEIGHTS, AdapterError, match)
    run = saved.parent / "run"
    shutil.copytree(saved, run / "adapter")
    assert_refused(run, AdapterError, r"has no adapter_config\.json; .*adapter has one")
    (saved / CONFIG).unlink()
    assert_refused(saved, AdapterError, r"has no adapter_config\.json$")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_bias": True},
        {"monteclora_config": {"sample_scaler": 1e-4}},
        {"layer_replication": [[0, 1]]},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
        {"target_parameters": ["a"]},
        {"use_qalora": True},
        # They change the base model, or what an adapter computes.
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "corda"},
        {"alora_invocation_tokens": [1, 2]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_peft_has_and_we_have_not(saved, changes):
    rewrite(saved, **changes)
    (name,) = changes
    assert_refused(saved, NotImplementedError, name)


def test_settings_that_change_nothing_here(saved):
    """They concern training or other versions, or are unknown."""
    rewrite(
        saved,
        lora_dropout=0.1,
        inference_mode=False,
        peft_version="0.99.0",
        init_lora_weights="gaussian",
        runtime_config={"ephemeral_gpu_offload": False},
        a_field_of_the_future=None,
    )
    model = two_linears()
    load_adapter(model, saved)
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 4


def test_a_field_that_nobody_knows_is_told(saved):
    rewrite(saved, a_field_of_the_future=True)
    with pytest.warns(UserWarning, match="does not know: {'a_field_of_the_future"):
        load_adapter(two_linears(), saved)


@pytest.mark.parametrize("init", ["eva", "orthogonal"])
def test_how_factors_started_says_nothing_of_them(saved, init):
    rewrite(saved, init_lora_weights=init, eva_config={"rho": 2.0})
    assert load_adapter(two_linears(), saved).init_lora_weights is True


@pytest.mark.peers
def test_every_field_of_pefts_is_read_or_refused():
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= KNOWN_FIELDS


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.a.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(KEY), r"in 1 tensor:\n  .*a\.lora_A\.weight is missing"),
        (lambda t: t.clear(), r"in 4 tensors:(\n.*is missing){4}"),
        (
            lambda t: t.update({KEY: np.zeros((16, 4), np.float32)}),
            r"in 1 tensor:\n  .*a\.lora_A\.weight is \(16, 4\), not \(4, 16\)",
        ),
        (
            lambda t: t.update({KEY: np.zeros(64, np.float32)}),
            r"is \(64,\), not \(4, 16\)",
        ),
        (
            lambda t: t.update({"base_model.model.c.lora_A.weight": t[KEY]}),
            r"in 1 tensor:\n  .*c\.lora_A\.weight belongs to no adapted layer",
        ),
        (
            lambda t: t.update(
                {f"base_model.model.c.{i}.lora_A.weight": t[KEY] for i in range(22)}
            ),
            r"in 22 tensors:(\n.* belongs to no adapted layer){20}\n  and 2 more$",
        ),
        (
            lambda t: t.update({"base_model.model.a.lora_magnitude_vector": t[KEY]}),
            "lora_magnitude_vector belongs to no adapted layer",
        ),
    ],
    ids=["missing", "none", "transposed", "flat", "of another layer", "many", "DoRA"],
)
def test_tensors_that_do_not_fit(saved, change, match):
    change_tensors(saved, change)
    assert_refused(saved, AdapterError, match)


def test_another_rank_than_the_tensors(saved):
    rewrite(saved, r=2)
    assert_refused(saved, AdapterError, r"in 4 tensors.*(\n.*is .*not.*){4}")


def test_another_depth_than_the_model(tmp_path):
    save_adapter(adapted(llama(), target_modules=["q_proj"]), tmp_path)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
    shallow = fill(lambda: Llama(config, rngs=nnx.Rngs(0)))
    match = r"layers\.2\.self_attn\.q_proj\.lora_A\.weight belongs to no adapted layer"
    assert_refused(tmp_path, AdapterError, match, shallow)


def test_another_model(saved):
    match = r"names none of the linear layers of CausalLM"
    assert_refused(saved, AdapterError, match, llama())


def test_a_model_that_has_adapters(saved):
    """Only another name goes."""
    model = adapted(two_linears(), target_modules=["a"])
    match = "Dict has an adapter 'default' already"
    assert_refused(saved, AdapterError, match, model)
    before = np.asarray(model["a"].adapters["default"].lora_a[...])
    load_adapter(model, saved, name="other")
    assert model["a"].active == model["b"].active == ("default",)
    np.testing.assert_array_equal(model["a"].adapters["default"].lora_a[...], before)
    assert list(model["b"].adapters) == ["other"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"rank_pattern": {"a": 2}}, r"a.lora_A.weight is \(4, 16\), not \(2, 16\)"),
        ({"init_lora_weights": "loftq"}, "give the format as quant"),
        ({"init_lora_weights": "pissa", "r": 14}, "which has 12; lower r"),
    ],
    ids=str,
)
def test_a_configuration_of_another_adapter(saved, changes, match):
    rewrite(saved, **changes)
    assert_refused(saved, AdapterError, match)


def test_target_modules_that_this_model_has_not(saved):
    """PEFT's lists serve several models; the tensors say what is adapted."""
    rewrite(saved, target_modules=["a", "b", "c_attn", "norm"])
    model = two_linears()
    assert load_adapter(model, saved).target_modules == ("a", "b", "c_attn", "norm")
    assert_same_adapters(model, adapted(two_linears()))


def test_float8_tensors(saved):
    header = json.dumps(
        {KEY: {"dtype": "F8_E4M3", "shape": [4, 16], "data_offsets": [0, 64]}}
    ).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (saved / WEIGHTS).write_bytes(data)
    assert_refused(saved, AdapterError, WEIGHTS)


def test_tensors_that_are_not_floating(saved):
    change_tensors(saved, lambda t: t.update({KEY: np.ones((4, 16), np.int8)}))
    assert_refused(saved, AdapterError, "int8")


# --- PEFT itself.


@pytest.fixture(scope="module")
def torch_llama(tmp_path_factory):
    """A toy Llama of transformers: its folder, and itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder, model


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.float().numpy()


def logits(model):
    return np.asarray(nnx.jit(lambda model: model(jnp.asarray(TOKENS)))(model))


PEFT_OPTIONS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {r"1\.mlp\.up_proj": 5, "q_proj": 2},
        "alpha_pattern": {"down_proj": 7, r"layers\.2\..*k_proj": 2},
    },
    {"target_modules": r".*\.[02]\..*(q|up)_proj"},
    {"use_dora": True, "lora_dropout": 0.1, "target_modules": ["k_proj", "down_proj"]},
    {"init_lora_weights": "pissa", "r": 4, "target_modules": ["o_proj", "gate_proj"]},
    {"init_lora_weights": "olora", "lora_alpha": 4, "target_modules": ["v_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "1.mlp.up_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.[02]\..*"},
    {"target_modules": r".*_proj", "exclude_modules": r".*layers\.1\..*|.*o_proj"},
    {
        "target_modules": ["o_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1, 2],
        "exclude_modules": ["layers.2.self_attn.o_proj"],
    },
    {
        "target_modules": ["v_proj"],
        "layers_to_transform": 2,
        "layers_pattern": ["blocks", "layers"],
    },
    {"target_modules": ["lm_head", "up_proj"], "rank_pattern": {"lm_head": 2}},
    {"target_modules": ["lm_head"], "use_dora": True},
]


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", PEFT_OPTIONS, ids=str)
def test_peft_opens_what_we_save(torch_llama, tmp_path, options):
    import peft

    ours, model = jaxbnb.load_pretrained(torch_llama[0]), copy.deepcopy(torch_llama[1])
    base = torch_logits(model)
    save_adapter(adapted(ours, **options), tmp_path)
    ours.eval()
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    got, want = logits(ours), torch_logits(theirs)
    # A hundred products an element and more, in float32; the adapter does much more.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(got - base).max() > 0.05


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", PEFT_OPTIONS, ids=str)
def test_we_open_what_peft_saves(torch_llama, tmp_path, options):
    import peft
    import torch

    ours, model = jaxbnb.load_pretrained(torch_llama[0]), copy.deepcopy(torch_llama[1])
    base = torch_logits(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    start = torch_logits(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    config = load_adapter(ours, tmp_path)
    want = LoraConfig(**options)
    assert (config.r, config.scaling) == (want.r, want.scaling)
    got = logits(ours)
    np.testing.assert_allclose(got, torch_logits(theirs), rtol=0, atol=1e-4)
    assert np.abs(got - base).max() > 0.05
    adapts_head = "lm_head" in options["target_modules"]
    assert type(ours.lm_head) is (LoraLinear if adapts_head else nnx.Linear)
    # Nothing but what it starts from was taken out of the weights.
    np.testing.assert_allclose(start, base, rtol=0, atol=1e-4)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_adapter_of_a_tied_head(tmp_path, family):
    """The embedding stays as it is; here the head becomes a copy of it."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    kind = {"llama": "LlamaConfig", "gpt_neox": "GPTNeoXConfig"}[family]
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    config = getattr(transformers, kind)(**sizes, tie_word_embeddings=True)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    base.save_pretrained(tmp_path / "base")
    before = torch_logits(base)
    options = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = jaxbnb.load_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "theirs")
    got = logits(ours)
    np.testing.assert_allclose(got, torch_logits(theirs), rtol=0, atol=1e-4)
    assert np.abs(got - before).max() > 0.05
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    np.testing.assert_allclose(got, torch_logits(again.eval()), rtol=0, atol=1e-4)
    # Merged, the folder has a head of its own.
    jaxbnb.lora.merge(ours)
    save_pretrained(ours, tmp_path / "merged", source=tmp_path / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(got, torch_logits(merged.eval()), rtol=0, atol=1e-4)
    # An adapter of another base does not load, and the model does not change.
    path = tmp_path / "theirs" / WEIGHTS
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"][0] += 1
    save_file(tensors, path)
    ours = jaxbnb.load_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="differs from the model's embedding"):
        load_adapter(ours, tmp_path / "theirs")
    assert ours.lm_head is None
    assert ours.config.tie_word_embeddings
