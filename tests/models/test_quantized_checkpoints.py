"""Checkpoints that other libraries quantised: loaded as they are stored, and trained.

The files are written here, by the definitions of the formats. What those libraries
decode themselves is compared in tests/convert/test_peers_compressed_tensors.py.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbnb
from jaxbnb import convert, models
from jaxbnb.convert import safetensors_files
from jaxbnb.models import load_pretrained

GROUP = 32


def levels_of(q):
    """Codes ``(rows, size)`` of a quantised weight ``(rows, size)``."""
    codes = np.asarray(q.codes)
    if codes.shape[-1] == q.axis_size:
        return codes
    return np.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1)


def pack(codes, bits):
    """Packs codes along the last axis, the first in the lowest bits."""
    parts = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    words = np.zeros(parts.shape[:-1], np.uint32)
    for i in range(32 // bits):
        words |= parts[..., i] << np.uint32(bits * i)
    return words.view(np.int32)


def gptq(w, bits=4, sym=False, order=False, version="gptq", **_):
    q = jaxbnb.quantize(
        w, f"int{bits}_scaled" if sym else f"uint{bits}", block_size=GROUP
    )
    zeros = (
        np.full(q.absmax.shape, 2 ** (bits - 1)) if sym else np.asarray(q.zero_point)
    )
    codes, scales = levels_of(q), np.asarray(q.absmax)
    groups = np.arange(w.shape[1]) // GROUP
    if order:
        groups = np.random.default_rng(0).permutation(groups)
        codes = codes[:, np.argsort(np.argsort(groups, kind="stable"), kind="stable")]
    stored = zeros - 1 & 2**bits - 1 if version == "gptq" else zeros
    tensors = {
        "qweight": pack(codes, bits).T,
        "qzeros": pack(stored.T, bits),
        "scales": scales.T.astype(np.float16),
        "g_idx": groups.astype(np.int32),
    }
    scales = scales.astype(np.float16).astype(np.float32)
    decoded = (codes - zeros[:, groups].astype(np.float32)) * scales[:, groups]
    return tensors, decoded


def awq(w, **_):
    q = jaxbnb.quantize(w, "uint4", block_size=GROUP)
    codes, zeros = levels_of(q), np.asarray(q.zero_point)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(x):
        return pack(x.reshape(len(x), -1, 8)[..., order].reshape(x.shape), 4)

    scales = np.asarray(q.absmax).astype(np.float16)
    tensors = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T}
    spread = lambda x: np.repeat(x.astype(np.float32), GROUP, 1)  # noqa: E731
    return tensors, (codes - spread(zeros)) * spread(scales)


def fp8(w, **_):
    q = jaxbnb.quantize(w, "fp8_scaled", block_size=64)
    scales = np.asarray(q.absmax)[::16]
    codes = np.asarray(q.codes).view(ml_dtypes.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv": scales}
    spread = np.repeat(np.repeat(scales, 64, 1), 16, 0)[: len(w), : w.shape[1]]
    return tensors, codes.astype(np.float32) * spread


def nvfp4(w, **_):
    q = jaxbnb.quantize(w, "nvfp4")
    codes = levels_of(q)
    tensors = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": np.asarray(q.absmax).view(ml_dtypes.float8_e4m3fn),
        "weight_global_scale": np.asarray(q.nested_absmax),
        "input_global_scale": np.ones(1, np.float32),
    }
    return tensors, np.asarray(q.dequantize())


NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16},
        }
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
METHODS = {
    "gptq": (gptq, GPTQ, {}, "uint4"),
    "gptq v2, symmetric, 8 bits": (
        gptq,
        GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "sym": True},
        {"version": "gptq_v2", "bits": 8, "sym": True},
        "int8_scaled",
    ),
    "gptq, act-order": (gptq, GPTQ | {"desc_act": True}, {"order": True}, None),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        {},
        "uint4",
    ),
    "fp8": (
        fp8,
        {"quant_method": "fp8", "weight_block_size": [16, 64]},
        {},
        "fp8_scaled",
    ),
    "nvfp4": (nvfp4, NVFP4, {}, "nvfp4"),
}


def test_the_page_says_how_each_is_kept():
    page = Path(__file__).parents[2] / "docs" / "checkpoints_in.md"
    pattern = r"^\| (?:GPTQ|AWQ|DeepSeek, Qwen) \| `(.*?)`.* \| `?(\w+)`? \|$"
    said = dict(re.findall(pattern, page.read_text(), re.MULTILINE))
    kept = {name: row[-1] or "decoded" for name, row in METHODS.items()}
    # The library of these has rows of its own, for the peers' tests.
    del kept["nvfp4"]
    assert said == kept


def write(folder, tensors, config):
    """Writes tensors of any dtype, as safetensors' own library does not."""
    folder.mkdir()
    infos = {n: convert.TensorInfo(x.shape, x.dtype) for n, x in tensors.items()}
    header, starts = safetensors_files.layout(infos)
    with (folder / "model.safetensors").open("wb", buffering=0) as file:
        safetensors_files.write_bytes(file, header)
        for name in starts:
            safetensors_files.write_bytes(file, tensors[name])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_as(toy, tmp_path, name):
    """Writes a toy model twice: as a method stores it, and decoded."""
    make, fields, options, _ = METHODS[name]
    source = convert.open_checkpoint(
        toy.save(
            toy.model(num_hidden_layers=2, intermediate_size=128), tmp_path / "toy"
        )
    )
    stored, decoded = {}, {}
    for key in source.tensors:
        x = source.read(key)
        if key.split(".")[-2].endswith("_proj"):
            tensors, decoded[key] = make(x, **options)
            module = key.removesuffix("weight")
            stored |= {module + end: part for end, part in tensors.items()}
        else:
            stored[key] = decoded[key] = x
    config = {**source.config, "dtype": "float32"}
    write(tmp_path / "decoded", decoded, config)
    return write(tmp_path / "q", stored, config | {"quantization_config": fields})


def train_step(model, tokens):
    """Returns the loss before and after a step on adapters."""
    jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(r=4), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(tokens[:, :-1])
            targets = tokens[:, 1:]
            return jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            )

        value, grads = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(3)]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_loaded_as_it_is_stored(toy, tmp_path, name):
    folder, quant_type = save_as(toy, tmp_path, name), METHODS[name][-1]
    models.check_pretrained(folder)
    if quant_type is None:
        with pytest.warns(UserWarning, match="14 quantised weights are decoded"):
            model = load_pretrained(folder)
    else:
        model = load_pretrained(folder)
    want = load_pretrained(tmp_path / "decoded")
    layers, others = (m.model.layers.layer for m in (model, want))
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = layer.split(".")
        kernel = getattr(getattr(layers, a), b).kernel.get_value()
        plain = getattr(getattr(others, a), b).kernel.get_value()
        assert getattr(kernel, "quant_type", None) == quant_type
        decoded = kernel if quant_type is None else kernel.dequantize()
        np.testing.assert_array_equal(decoded, plain)
    if quant_type is not None:
        assert quant_type in jaxbnb.summary(model)


@pytest.mark.parametrize("name", ["gptq", "nvfp4"])
def test_adapters_are_trained_on_it(toy, tmp_path, name):
    model = load_pretrained(save_as(toy, tmp_path, name))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 89, (2, 12)))
    losses = train_step(model, tokens)
    assert losses[-1] < losses[0]


def test_inputs_are_rounded_too(toy, tmp_path):
    source = toy.save(toy.model(num_hidden_layers=1), tmp_path / "toy")
    quant = jaxbnb.QuantConfig("llm_int8", outlier_threshold=0)
    model = load_pretrained(source, quant=quant)
    models.save_pretrained(
        model, tmp_path / "q", source=source, to="compressed-tensors"
    )
    again = load_pretrained(tmp_path / "q")
    assert again.model.layers.layer.mlp.up_proj.config == quant
    tokens = np.arange(8)[None]
    # A scale is a 127th of an absmax, which it gives back within a rounding. Decoded,
    # the weights would give logits that are off by a hundredth.
    want = model(tokens)
    np.testing.assert_allclose(again(tokens), want, rtol=1e-4, atol=1e-4)


def test_what_is_decoded_can_be_quantised(toy, tmp_path):
    folder = save_as(toy, tmp_path, "gptq, act-order")
    model = load_pretrained(folder, quant="nf4")
    want = load_pretrained(tmp_path / "decoded", quant="nf4")
    for mine, theirs in zip(
        jax.tree.leaves(nnx.state(model)),
        jax.tree.leaves(nnx.state(want)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_it_is_copied_as_it_is_stored_or_decoded(toy, tmp_path):
    folder = save_as(toy, tmp_path, "fp8")
    convert.convert_checkpoint(folder, tmp_path / "copy")
    copied, source = map(convert.open_checkpoint, (tmp_path / "copy", folder))
    assert copied.quantized == source.quantized
    convert.convert_checkpoint(folder, tmp_path / "plain", dtype="float32")
    plain = convert.open_checkpoint(tmp_path / "plain")
    assert not plain.quantized
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(plain.read(name), copied.read(name))
    with pytest.raises(ValueError, match=r"is quantised already, .* got 'nf4'"):
        load_pretrained(folder, quant="nf4")


# --- Files that contradict themselves.

M = "model.layers.0.mlp.up_proj."
W = np.asarray(np.random.default_rng(0).standard_normal((16, 64)), np.float32)


def refusal(tmp_path, tensors, fields, error=convert.CheckpointError):
    """The message of the error that a folder is refused with."""
    named = {M + end: x for end, x in tensors.items()}
    config = {"model_type": "llama", "quantization_config": fields}
    folder = write(tmp_path / "bad", named, config)
    read = lambda: convert.open_checkpoint(folder).read(f"{M}weight")  # noqa: E731
    with pytest.raises(error) as caught:
        read()
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": None}, None),
        (
            {"qzeros": None},
            r"up_proj.qzeros' must be int32 of shape \[2, 2\].* missing",
        ),
        (
            {"scales": np.ones((3, 16), np.float16)},
            r"shape \[2, 16\], .* float16\[3, 16",
        ),
        ({"scales": np.ones((2, 16), np.int32)}, r"or float16 of shape .* it is int32"),
        ({"g_idx": np.zeros(64, np.int32)}, "g_idx that is out of order, although"),
        ({"g_idx": np.zeros(63, np.int32)}, r"g_idx' must be int32 of shape \[64\]"),
        ({"weight": W}, "up_proj.weight' both quantised and not"),
    ],
)
def test_arrays_that_contradict(tmp_path, changes, message):
    tensors = {**gptq(W)[0], **changes}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if message is None:
        message = "no tensor 'model.layers.0.mlp.up_proj.weight'"
    assert re.search(message, refusal(tmp_path, tensors, GPTQ))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GPTQ | {"bits": 3}, r"gptq in 3 bits; jaxbnb reads \[4, 8\]"),
        (GPTQ | {"group_size": 0}, "group_size of gptq must be a positive even"),
        (GPTQ | {"group_size": 64}, r"qzeros' must be int32 of shape \[1, 2\]"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' of GPTQ"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "'dynamic'.*gptqmodel loads it"),
        (GPTQ | {"sym": True}, "zero points other than 8, although"),
        (GPTQ | {"quant_method": "hqq"}, "method 'hqq'; jaxbnb reads .* with hqq"),
        (
            GPTQ | {"quant_method": "new"},
            r"method 'new'; jaxbnb reads \['bitsandbytes'",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of version 'gemv' in 4 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 of the format 'e5m2'"),
        (
            {"quant_method": "fp8", "weight_block_size": [1]},
            "two positive even numbers",
        ),
        ({"quant_method": "compressed-tensors"}, "needs config_groups"),
        (NVFP4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse format"),
    ],
)
def test_configs_that_are_not_read(tmp_path, fields, message):
    assert re.search(message, refusal(tmp_path, gptq(W)[0], fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["re:("]}, "'re:\\(' of compressed-tensors is not a regular"),
        ({"targets": ["lm_head"]}, None),
        ({"format": "marlin-24"}, "format 'marlin-24' of compressed-tensors; jaxbnb"),
        ({"weights": None}, "'nvfp4-pack-quantized' of compressed-tensors; jaxbnb"),
    ],
)
def test_groups_that_are_not_read(tmp_path, change, message):
    group = NVFP4["config_groups"]["group_0"] | change
    fields = NVFP4 | {"config_groups": {"group_0": group}}
    message = message or "but no group in the config of compressed-tensors targets it"
    assert re.search(message, refusal(tmp_path, nvfp4(W)[0], fields))


def test_two_methods(tmp_path):
    tensors = gptq(W)[0] | {
        "weight": np.ones((2, 3), np.int8),
        "SCB": np.ones(2, np.float32),
    }
    message = refusal(tmp_path, tensors, GPTQ, NotImplementedError)
    assert re.search("has weights that bitsandbytes .* by 'gptq'", message)
