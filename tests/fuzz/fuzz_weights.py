"""Readers of weights: safetensors, bitsandbytes' forms, torch's, PEFT's and Orbax's."""

import contextlib
import functools
import io
import json
import pickle
import runpy
import tempfile
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import mutators
import numpy as np
from flax import nnx
from fuzzing import ROOT, Reader
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import jaxbnb
from jaxbnb import convert, lora, models
from jaxbnb.convert import safetensors_files
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, NF4

# The builders of small files, byte by byte.
BUILD = runpy.run_path(str(ROOT / "tests" / "convert" / "conftest.py"))
TOY = runpy.run_path(str(ROOT / "tests" / "models" / "conftest.py"))


def entry(dtype, shape, offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@contextlib.contextmanager
def in_little_memory(limit=4 * 2**20):
    """Checks that reading a small file takes little memory, whatever it says."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, f"{peak:,} bytes"


def read_all(path):
    """Every tensor of a checkpoint; checks that each is what the header says."""
    with in_little_memory():
        checkpoint = convert.open_checkpoint(path)
        arrays = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name, array in arrays.items():
        info = checkpoint.tensors[name]
        assert (array.shape, array.dtype) == (info.shape, info.dtype)
    for name in checkpoint.packable:
        assert checkpoint.read_quantized(name).shape == arrays[name].shape[::-1]
    return checkpoint, arrays


def names_the_file(read):
    """Checks that an error of a checkpoint names its file."""

    @functools.wraps(read)
    def checked(folder):
        try:
            return read(folder)
        except convert.CheckpointError as error:
            if str(folder) not in str(error):
                raise AssertionError("it does not name the file") from error
            raise

    return checked


def make_safetensors(rng, damaged):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("U8", [5], [24, 29]),
        "e": entry("I16", [0, 4], [29, 29]),
    }
    data = BUILD["safetensors_bytes"](header, bytes(range(29)))
    return {"config.json": b"{}", "model.safetensors": data}


@names_the_file
def read_safetensors(folder):
    _, arrays = read_all(folder)
    # The library is the judge of what the file says.
    try:
        with safe_open(folder / "model.safetensors", framework="np") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise AssertionError("the library refuses it") from error
    assert set(arrays) == set(theirs)
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (theirs[name].shape, theirs[name].dtype)
        assert array.tobytes() == theirs[name].tobytes()


def make_shards(rng, damaged):
    shards = {
        "one-1.safetensors": {"a": np.arange(6, dtype=np.float32), "b": np.ones(3)},
        "two-2.safetensors": {"c": np.zeros((2, 2), np.int8), "b": np.ones(2)},
    }
    weight_map = {"a": "one-1.safetensors", "c": "two-2.safetensors"}
    weight_map["b"] = rng.choice(list(shards))
    index = {"metadata": {"total_size": 52}, "weight_map": weight_map}
    return {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
    } | {name: save(tensors) for name, tensors in shards.items()}


def make_quantized(rng, damaged):
    """A doubly quantised weight, a plain one, and one of 8 bits."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 64]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    arrays = {
        "w.absmax": np.arange(4, dtype=np.uint8),
        "w.quant_map": NF4,
        "w.nested_absmax": np.ones(1, np.float32),
        "w.nested_quant_map": DYNAMIC8_SIGNED,
        "w.quant_state.bitsandbytes__nf4": _text(state | nested),
        "w": np.arange(128, dtype=np.uint8).reshape(128, 1),
        "p.absmax": np.arange(4, dtype=np.float32),
        "p.quant_map": NF4,
        "p.quant_state.bitsandbytes__nf4": _text(state),
        "p": np.arange(128, dtype=np.uint8).reshape(128, 1),
        "m.weight": np.ones((2, 3), np.int8),
        "m.SCB": np.ones(2, np.float32),
        "m.weight_format": np.zeros((), np.uint8),
    }
    quantization = jaxbnb.QuantConfig("nf4", double_quant=True).to_huggingface()
    config = {"model_type": "toy", "quantization_config": quantization}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(arrays),
    }


def make_methods(rng, damaged):
    """A weight of each method of other libraries; one of the methods in the config."""
    words = np.arange(32, dtype=np.int32).reshape(8, 4) << 24
    codes = np.arange(128, dtype=np.uint8).reshape(4, 32)
    f8 = ml_dtypes.float8_e4m3fn
    by_method = {
        "gptq": {
            "m.qweight": words.reshape(8, 4),
            "m.qzeros": words[:2, :1],
            "m.scales": np.ones((2, 4), np.float16),
            "m.g_idx": np.arange(64, dtype=np.int32) // 32,
        },
        "awq": {
            "m.qweight": words.reshape(32, 1),
            "m.qzeros": words[:1, :1],
            "m.scales": np.ones((1, 8), np.float16),
        },
        "fp8": {
            "m.weight": codes.view(f8),
            "m.weight_scale_inv": np.ones((2, 2), np.float32),
        },
        "mxfp4": {
            "w_blocks": codes.reshape(2, 2, 2, 16),
            "w_scales": codes[0, :8].reshape(2, 2, 2),
        },
        "nvfp4-pack-quantized": {
            "m.weight_packed": codes,
            "m.weight_scale": codes[:, :4].copy().view(f8),
            "m.weight_global_scale": np.ones(1, np.float32),
        },
        "pack-quantized": {
            "m.weight_packed": words[:, :2],
            "m.weight_scale": np.ones((8, 2), np.float16),
            "m.weight_zero_point": words[:1, :2],
            "m.weight_shape": np.array([8, 16]),
        },
        "float-quantized": {
            "m.weight": codes.view(f8),
            "m.weight_scale": np.ones((2, 2), np.float32),
        },
        "torchao": {
            "m._weight_qdata": codes.view(np.int8) % 8,
            "m._weight_scale": np.ones((4, 2), np.float32),
            "m._weight_zero_point": np.ones((4, 2), np.int8),
        },
    }
    method = rng.choice(list(by_method))
    fields = {"quant_method": method, "bits": 4, "group_size": 32, "sym": False}
    fields["desc_act"] = rng.random() < 0.3
    fields["weight_block_size"] = [2, 16]
    if "quantized" in method:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
        weights["symmetric"] = False
        if method == "float-quantized":
            weights |= {"num_bits": 8, "type": "float", "strategy": "block"}
            weights["block_structure"] = [2, 16]
        group = {"targets": ["Linear", "re:.*m"], "weights": weights}
        fields = {
            "quant_method": "compressed-tensors",
            "format": method,
            "config_groups": {"group_0": group},
        }
    config = {"model_type": "toy", "dtype": "bfloat16", "quantization_config": fields}
    arrays = by_method[method]
    metadata = {"format": "pt"}
    if method == "torchao":
        data = {"block_size": [1, 16], "dtype": {"_data": "bfloat16"}}
        data["target_dtype"] = {"_data": "int4"}
        state = {"_type": "IntxUnpackedToInt8Tensor", "_data": data}
        state = mutators.damage_value(state, rng) if damaged else state
        metadata["m.weight"] = mutators.to_json(state).decode()
    infos = {n: convert.TensorInfo(x.shape, x.dtype) for n, x in arrays.items()}
    header, starts = safetensors_files.layout(infos, metadata)
    data = b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in starts)
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": header + data,
    }


@names_the_file
def read_methods(folder):
    checkpoint, arrays = read_all(folder)
    for name in checkpoint.quantized:
        shape = checkpoint.read_quantized(name).shape
        assert shape[-2:] in (arrays[name].shape[::-1], arrays[name].shape[-2:])


def _text(fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


@names_the_file
def read_quantized(folder):
    checkpoint, arrays = read_all(folder)
    for name in checkpoint.quantized:
        # Or its blocks run across the ends of rows.
        with contextlib.suppress(convert.UnsupportedCheckpointError):
            assert checkpoint.read_quantized(name).shape == arrays[name].shape[::-1]


OPTIMIZERS = {
    "adamw8bit": jaxbnb.adamw8bit(1e-3, min_quantized_size=0),
    "ademamix8bit": jaxbnb.ademamix8bit(1e-3, min_quantized_size=0),
    "lion8bit": jaxbnb.lion8bit(1e-3),
}
PARAMS = {"bias": np.ones(4, np.float32), "kernel": np.ones((64, 8), np.float32)}


@functools.cache
def _saved_state(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = OPTIMIZERS[name]
    _, state = tx.update(params, tx.init(params), params)
    return convert.optimizer_state_to_bitsandbytes(tx, state, params)


def make_optimizer_state(rng, damaged):
    name = rng.choice(list(OPTIMIZERS))
    state = pickle.dumps(_saved_state(name))
    return {"optimizer": name.encode(), "state.pickle": state}


def read_optimizer_state(folder):
    tx = OPTIMIZERS[(folder / "optimizer").read_text()]
    params = jax.tree.map(jnp.asarray, PARAMS)
    saved = pickle.loads((folder / "state.pickle").read_bytes())
    state = convert.optimizer_state_from_bitsandbytes(saved, tx, params)
    want = jax.eval_shape(tx.init, params)
    jax.tree.map(_assert_like, state, want)


def _assert_like(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)


def make_torch(rng, damaged):
    import torch

    file = io.BytesIO()
    torch.save({"w": torch.arange(64.0), "v": torch.ones(3, 2)}, file)
    return {"config.json": b"{}", "pytorch_model.bin": file.getvalue()}


def read_torch(folder):
    checkpoint = convert.open_checkpoint(folder)
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).nbytes == info.nbytes < 2**12


def _two_linears():
    return nnx.Dict(
        up=nnx.Linear(8, 16, rngs=nnx.Rngs(0)), down=nnx.Linear(16, 8, rngs=nnx.Rngs(1))
    )


@functools.cache
def _saved_adapter():
    model = _two_linears()
    config = lora.LoraConfig(r=4, target_modules=["up", "down"], rank_pattern={"up": 2})
    lora.add_adapter(model, config, rngs=nnx.Rngs(2))
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(model, folder)
        return _contents(Path(folder))


def _contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_adapter(folder):
    model = _two_linears()
    graphdef, before = nnx.split(model)
    before = jax.tree.map(np.asarray, before)
    try:
        lora.load_adapter(model, folder)
    except Exception:
        # And the model is as it was: not an adapter, not a bit.
        after_graphdef, after = nnx.split(model)
        assert after_graphdef == graphdef
        jax.tree.map(np.testing.assert_array_equal, after, before)
        raise


@functools.cache
def _flax_folder():
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        TOY["save"](TOY["make_model"](num_hidden_layers=1), source)
        models.convert_to_flax(source, out, quant="nf4")
        return _contents(out)


READERS = [
    Reader("safetensors", make_safetensors, read_safetensors, ("model.safetensors",)),
    Reader("safetensors index", make_shards, names_the_file(read_all)),
    Reader("bitsandbytes weights", make_quantized, read_quantized),
    Reader("other methods' weights", make_methods, read_methods),
    Reader(
        "bitsandbytes optimizer",
        make_optimizer_state,
        read_optimizer_state,
        ("state.pickle",),
    ),
    Reader("pytorch .bin", make_torch, read_torch, needs=("torch",)),
    Reader("PEFT adapter", lambda rng, damaged: _saved_adapter(), read_adapter),
    Reader(
        "flax folder",
        lambda rng, damaged: _flax_folder(),
        models.load_pretrained,
        share=0.2,
    ),
]
