"""Write the golden files: what bitsandbytes 0.50.2 computes on the CPU.

Run it with bitsandbytes 0.50.2 and torch 2.13.0 (extra `peers`)::

    python tests/goldens/make_goldens.py

The files go next to this script; README.md there lists their keys. Two runs write the
same bytes.

This is the path of bitsandbytes. Its operators have a pure PyTorch kernel (backend
"default", registered for every device), and some have a C++ kernel for the CPU, which
shadows it. This script hides the native library while it imports bitsandbytes, as on a
machine without one. bitsandbytes then does not register any C++ kernels, and its public
functions and optimizers run on PyTorch alone. A second process imports it with the
library, to record where the C++ kernels differ:

- 4-bit codes and absmax: nowhere, because `quantize_4bit` lacks a C++ kernel for CPUs.
- 4-bit dequantisation: the same bits, except that the AVX-512 kernel reads the wrong
  absmax when a row is not a multiple of the block size (here `normal` and `planted` at
  128). The wrong values are not stored.
- 8-bit codes: the C++ kernel rounds the scaled value to one of 65,536 levels, all of
  them nonzero, and looks the code up. Zero becomes code 131 (signed, 2.1e-5) or 7
  (unsigned). A block of zeros becomes code 0, which is -0.993 in the signed map. Values
  next to a midpoint may go to the other side, and small values are up to 7 codes off.
  These codes are stored as `*_native_codes`.
- 8-bit absmax and dequantisation: the same, except that a short last block of zeros has
  absmax 0 there and 1e-38 here.

The pure PyTorch quantisers compute this, all in float32:

- full blocks: `clip(x * (1 / max(absmax, 1e-38)), -1, 1)`; absmax is stored unclamped;
- a short last block: `clip(x / absmax, -1, 1)`, a true division, and absmax is stored
  as max(absmax, 1e-38);
- the code is the number of midpoints strictly below the scaled value, so a tie goes
  to the lower level. Midpoints are `(code[i] + code[i + 1]) / 2` of the sorted code;
- FP4 has two zeros: from -0.0026041667 (excluded) to 0 (included) the code is 0, from
  0 (excluded) to +0.0026041667 (included) it is 8; both decode to +0.0. According to
  its source, the CUDA kernel does the reverse (8 is a small negative), sends a negative
  tie towards zero, and has thresholds a few float32 steps from the midpoints;
- an odd count is padded with a scaled zero (low nibble NF4 7, FP4 0).

LLM.int8: on a CPU, a `Linear8bitLt` in training multiplies the decoded matrix by the
unrounded input. In evaluation it is LLM.int8, and still has a gradient for the input;
this is what the goldens record. In both paths its integer product is torch's and exact,
and the rest is PyTorch.

The "default" backend does not have kernels for the 8-bit optimizers. The CPU's kernels
are PyTorch throughout and call the quantisers above. With the library hidden, the 8-bit
optimizers therefore run unchanged, and nothing is composed or re-implemented here.
README.md spells out their arithmetic. Three are also saved by `torch.save`, as .pt.
"""

import ctypes
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import types
from concurrent import futures
from unittest import mock

import gradients
import numpy as np

Arrays = dict[str, np.ndarray]

HERE = pathlib.Path(__file__).parent

#: Class and arguments of each run in trajectories.npz.
TRAJECTORIES = {
    "adamw": (
        "AdamW8bit",
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    ),
    "lion": ("Lion8bit", {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "sgd": ("SGD8bit", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2}),
    "ademamix": (
        "AdEMAMix8bit",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999, 0.9999),
            "alpha": 5.0,
            "eps": 1e-8,
            "weight_decay": 1e-2,
        },
    ),
    "rmsprop": ("RMSprop8bit", {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8}),
    "adagrad": ("Adagrad8bit", {"lr": 1e-2, "eps": 1e-10}),
}
TRAJECTORIES["ademamix_scheduled"] = (
    "AdEMAMix8bit",
    TRAJECTORIES["ademamix"][1] | {"t_alpha": 100, "t_beta3": 150},
)

#: The smallest shape that is quantised, and the stored columns, half of each block.
TRAJECTORY_SHAPE = (8, 512)
TRAJECTORY_COLUMNS = slice(128, 384)

#: The optimizers of state_dict.npz: class, weight decay of weight and bias if they are
#: in two groups, and the arguments they share.
STATE_DICTS = {
    "adamw8bit": ("AdamW8bit", (0.1, 0.0), {"lr": 1e-3}),
    "lion8bit": ("Lion8bit", None, {"lr": 1e-4, "weight_decay": 0.1}),
    "sgd8bit": ("SGD8bit", None, {"lr": 1e-2, "momentum": 0.9}),
}

#: The weight is (out, in), 18.75 blocks. The bias's state is small and stays float32.
STATE_DICT_SHAPES = {"weight": (40, 120), "bias": (40,)}
STATE_DICT_STEPS = 3

#: Inputs, outputs and rows of layers.npz; the embeddings have 48 rows of 192.
LAYERS_SHAPE = (192, 48, 5)

#: Inputs, outputs and rows of llm_int8.npz's layer; and columns with planted values.
LLM_INT8_SHAPE = (160, 48, 12)
LLM_INT8_OUTLIERS = {
    7: {0: 6.0},
    31: {3: -20.5, 8: 6.5},
    100: dict.fromkeys(range(12), 9),
}
LLM_INT8_BELOW = 5.99609375  # The float16 below 6.

FP4_CUDA_THRESHOLDS = [
    0.00260417,
    0.0859375,
    0.20833333,
    0.29166667,
    0.4166667,
    0.583333,
    0.8333333,
]


def load_bitsandbytes(native: bool) -> types.ModuleType:
    """Import bitsandbytes with or without its native library; once per process."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Run eagerly, not compiled.
    import torch

    torch.set_num_threads(1)
    if native:
        import bitsandbytes
    else:
        with mock.patch.object(ctypes.cdll, "LoadLibrary", side_effect=OSError):
            import bitsandbytes
    for op in ("quantize_blockwise", "dequantize_blockwise", "dequantize_4bit"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"bitsandbytes::{op}", "CPU"
        )
        assert registered == native, f"{op}: not the kernel asked for"
    assert bitsandbytes.__version__ == "0.50.2"
    return bitsandbytes


def midpoints(code: np.ndarray) -> np.ndarray:
    """Return the decision points between the levels of a code, in float32."""
    levels = np.sort(code)
    return (levels[:-1] + levels[1:]) / np.float32(2)


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """Append the float32 above and the float32 below each value."""
    inf = np.float32(np.inf)
    return np.concatenate([x, np.nextafter(x, inf), np.nextafter(x, -inf)])


def planted(values: np.ndarray, absmax: float) -> np.ndarray:
    """Lay out values in blocks of 64 that start with absmax; zeros fill the last.

    With absmax 1 the scaled values are the values themselves, so a midpoint stays
    exactly a midpoint.
    """
    rows = np.zeros(-(-values.size // 63) * 63, np.float32)
    rows[: values.size] = values
    rows = rows.reshape(-1, 63)
    return np.insert(rows, 0, np.float32(absmax), axis=1)


def small_values() -> np.ndarray:
    """Return both zeros, small values of both signs, and FP4's CUDA thresholds."""
    tiny = np.array([0.0, 1e-3, 1e-8, 1e-30, *FP4_CUDA_THRESHOLDS], np.float32)
    return np.concatenate([tiny, -tiny])


def four_bit_inputs(code: np.ndarray) -> Arrays:
    """Build the float32 matrices for one 4-bit type."""
    rng = np.random.default_rng(4)
    points = midpoints(code)
    ties = planted(np.concatenate([with_neighbours(points), small_values()]), 1.0)
    mixed = rng.standard_normal(64, np.float32)
    mixed[:6] = [1e30, -1e30, 5e29, 1e-30, -1e-30, -7e29]
    extremes = np.stack(
        [
            np.zeros(64, np.float32),
            np.zeros(64, np.float32),
            mixed,
            rng.standard_normal(64, np.float32) * np.float32(1e-30),
            rng.standard_normal(64, np.float32) * np.float32(1e30),
            np.zeros(64, np.float32),
        ]
    )
    # At absmax 7 a product with 1/7 and a division by 7 disagree on some of these.
    sevenths = with_neighbours(points * np.float32(7))
    return {
        "normal": rng.standard_normal((64, 192), np.float32),
        "planted": np.concatenate([ties, extremes]),
        "short": planted(np.tile(sevenths, 4), 7.0).reshape(-1)[:183].reshape(3, 61),
    }


def four_bit(bnb: types.ModuleType, quant_type: str) -> Arrays:
    """Quantise and dequantise with one 4-bit type, block sizes 64 and 128."""
    import torch

    code = bnb.functional.get_4bit_type(quant_type, device="cpu").numpy()
    arrays = four_bit_inputs(code)
    for name, x in list(arrays.items()):
        for block in (64, 128):
            packed, state = bnb.functional.quantize_4bit(
                torch.from_numpy(x), blocksize=block, quant_type=quant_type
            )
            key = f"{name}_{block}"
            arrays[f"{key}_packed"] = packed.numpy().reshape(-1)
            arrays[f"{key}_absmax"] = state.absmax.numpy()
            dequantize = bnb.functional.dequantize_4bit
            arrays[f"{key}_float32"] = dequantize(packed, state).numpy()
            state.dtype = torch.bfloat16
            bits = dequantize(packed, state).view(torch.uint16)
            arrays[f"{key}_bfloat16"] = bits.numpy()
    return arrays


def double_quant(bnb: types.ModuleType) -> Arrays:
    """Quantise with NF4 and 8-bit absmax; the input is int8 times a block's scale."""
    import torch

    rng = np.random.default_rng(8)
    shape = (256, 576)
    integers = np.rint(rng.standard_normal(shape) * 30).clip(-127, 127)
    scales = rng.uniform(0.5, 1.5, integers.size // 64) / 30
    arrays = {
        "input_int8": integers.astype(np.int8),
        "input_scale": scales.astype(np.float16),
    }
    x = arrays["input_int8"].reshape(-1, 64).astype(np.float32)
    x = (x * arrays["input_scale"].astype(np.float32)[:, None]).reshape(shape)

    packed, state = bnb.functional.quantize_4bit(
        torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    nested = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    dequantised = bnb.functional.dequantize_4bit(packed, state).numpy()
    digest = hashlib.sha256(dequantised.astype("<f4").tobytes()).digest()
    return arrays | {
        "packed": packed.numpy().reshape(-1),
        "absmax_codes": state.absmax.numpy(),
        "nested_absmax": state.state2.absmax.numpy(),
        "nested_code": state.state2.code.numpy(),
        "offset": state.offset.reshape(1).numpy(),
        "absmax_float32": (nested + state.offset).numpy(),
        "float32_head": dequantised[:16],
        "float32_sha256": np.frombuffer(digest, np.uint8),
    }


def dynamic8(bnb: types.ModuleType) -> Arrays:
    """Quantise with the two dynamic 8-bit maps, block sizes 256 and 64."""
    import torch

    rng = np.random.default_rng(16)
    arrays = {}
    for name in ("signed", "unsigned"):
        code = bnb.functional.create_dynamic_map(signed=name == "signed")
        points = midpoints(code.numpy())
        normal = rng.standard_normal((24, 256), np.float32)
        normal *= np.float32(10) ** rng.integers(-4, 1, normal.shape).astype(np.float32)
        normal[0, ::3] = 0
        normal[1] = 0
        ties = planted(np.concatenate([with_neighbours(points), small_values()]), 1.0)
        sevenths = planted(np.tile(points * np.float32(7), 2), 7.0)
        inputs = {
            "normal": normal,
            "planted": ties,
            "short": sevenths.reshape(-1)[:555].reshape(5, 111),
        }
        for case, x in inputs.items():
            x = x if name == "signed" else np.abs(x)
            arrays[f"{name}_{case}"] = x
            for block in (256, 64):
                codes, state = bnb.functional.quantize_blockwise(
                    torch.from_numpy(x), code=code, blocksize=block
                )
                key = f"{name}_{case}_{block}"
                arrays[f"{key}_codes"] = codes.numpy()
                arrays[f"{key}_absmax"] = state.absmax.numpy()
                back = bnb.functional.dequantize_blockwise(codes, state)
                arrays[f"{key}_float32"] = back.numpy()
    return arrays


def adam8bit(bnb: types.ModuleType) -> Arrays:
    """Take 50 steps of Adam8bit and of AdamW8bit; their states are the same."""
    import torch

    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizers = {
        "adam": (bnb.optim.Adam8bit, {"weight_decay": 0.0}),
        "adamw": (bnb.optim.AdamW8bit, {"weight_decay": 0.1}),
    }
    arrays = {"initial": gradients.initial()}
    for name, (make, extra) in optimizers.items():
        p = torch.nn.Parameter(torch.from_numpy(arrays["initial"].copy()))
        optimizer = make([p], **hyper, **extra)
        for step in range(1, gradients.STEPS + 1):
            p.grad = torch.from_numpy(gradients.gradient(step))
            optimizer.step()
            if step in (1, 2, 10, 50):
                arrays[f"{name}_{step}"] = p.detach().numpy()[:8].copy()
            if step in (1, 50):
                state = optimizer.state[p]
                for ours, theirs in {
                    "m_codes": "state1",
                    "m_absmax": "absmax1",
                    "v_codes": "state2",
                    "v_absmax": "absmax2",
                }.items():
                    value = state[theirs].numpy().copy()
                    key = f"{ours}_{step}"
                    # Decoupled weight decay does not change the moments.
                    assert np.array_equal(arrays.setdefault(key, value), value)
    return arrays


def trajectories(bnb: types.ModuleType) -> Arrays:
    """Take 200 steps of every 8-bit optimizer, without syncing its state again."""
    import torch

    arrays = {}
    for name, (optimizer_class, arguments) in TRAJECTORIES.items():
        p = torch.nn.Parameter(torch.from_numpy(gradients.initial(TRAJECTORY_SHAPE)))
        optimizer = getattr(bnb.optim, optimizer_class)([p], **arguments)
        for step in range(1, 201):
            p.grad = torch.from_numpy(gradients.gradient(step, TRAJECTORY_SHAPE))
            optimizer.step()
            if step in (1, 2, 5, 20, 50, 100, 200):
                columns = p.detach()[:, TRAJECTORY_COLUMNS]
                arrays[f"{name}_{step}"] = columns.numpy().copy()
            if step in (1, 200):
                for key, value in optimizer.state[p].items():
                    if key.startswith(("state", "absmax")):
                        arrays[f"{name}_{key}_{step}"] = value.numpy().copy()
    return arrays


def flatten(tree: dict, prefix: str) -> Arrays:
    """Flatten a state_dict: dotted keys, numbers as arrays, lists as JSON in UTF-8."""
    arrays = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}"
        if isinstance(value, dict):
            arrays |= flatten(value, path)
        elif isinstance(value, list):
            arrays[path] = np.frombuffer(json.dumps(value).encode(), np.uint8)
        else:
            arrays[path] = np.array(value)  # Copied: the optimizer writes in place.
    return arrays


def state_dicts(bnb: types.ModuleType) -> tuple[Arrays, dict[str, bytes]]:
    """Save three optimizers after three steps, and take one more.

    The last step starts from `gradients.initial` again, so the saved state and the
    formulas are enough to repeat it.
    """
    import torch

    def parameter(shape):
        return torch.nn.Parameter(torch.from_numpy(gradients.initial(shape)))

    def take_step(optimizer, parameters, t):
        for p in parameters:
            p.grad = torch.from_numpy(gradients.away_from_zero(t, tuple(p.shape)))
        optimizer.step()

    arrays, files = {}, {}
    for name, (optimizer_class, decays, arguments) in STATE_DICTS.items():
        parameters = [parameter(shape) for shape in STATE_DICT_SHAPES.values()]
        groups = parameters
        if decays is not None:
            pairs = zip(parameters, decays, strict=True)
            groups = [{"params": [p], "weight_decay": decay} for p, decay in pairs]
        optimizer = getattr(bnb.optim, optimizer_class)(groups, **arguments)
        for t in range(1, STATE_DICT_STEPS + 1):
            take_step(optimizer, parameters, t)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        files[f"state_dict_{name}"] = file.getvalue()
        arrays |= flatten(optimizer.state_dict(), name)

        for p in parameters:
            p.data.copy_(parameter(tuple(p.shape)).data)
        take_step(optimizer, parameters, STATE_DICT_STEPS + 1)
        for key, p in zip(STATE_DICT_SHAPES, parameters, strict=True):
            arrays[f"{name}.next.{key}"] = p.detach().numpy().copy()
    return arrays, files


def llm_int8_inputs() -> Arrays:
    """Draw weight, input and cotangent; float16 holds all of them exactly."""
    inputs, outputs, rows = LLM_INT8_SHAPE
    rng = np.random.default_rng(32)
    weight = rng.standard_normal((outputs, inputs)) / 12
    weight[9] = 0
    x = np.clip(1.5 * rng.standard_normal((rows, inputs)), -5.5, 5.5)
    x[5] = 0
    x[2, 77] = LLM_INT8_BELOW
    for column, values in LLM_INT8_OUTLIERS.items():
        x[list(values), column] = list(values.values())
    dy = rng.standard_normal((rows, outputs))
    return {"weight": weight, "x": x, "dy": dy}


def llm_int8(bnb: types.ModuleType) -> Arrays:
    """Run `Linear8bitLt`, without and with a threshold, in three dtypes."""
    import torch

    arrays = {k: v.astype(np.float16) for k, v in llm_int8_inputs().items()}
    weight, x, dy = map(torch.from_numpy, arrays.values())
    x_codes, row_scale, columns = bnb.functional.int8_vectorwise_quant(
        x.clone(), threshold=6.0
    )
    for threshold in (0, 6):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            layer = bnb.nn.Linear8bitLt(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                has_fp16_weights=False,
                threshold=float(threshold),
            )
            layer.weight.data.copy_(weight)
            layer = layer.to("cpu").eval()
            inputs = x.to(dtype, copy=True).requires_grad_()
            # Without instructions that only some machines have.
            with torch.backends.mkldnn.flags(enabled=False):
                y = layer(inputs)
                y.backward(dy.to(dtype))
            for name, value in (("y", y.detach()), ("dx", inputs.grad)):
                bits = value.view(torch.uint16) if value.element_size() == 2 else value
                arrays[f"{name}_{threshold}_{str(dtype)[6:]}"] = bits.numpy()
    return arrays | {
        "codes": layer.state.CB.numpy(),
        "col_scale": layer.state.SCB.numpy(),
        "x_codes": x_codes.numpy(),
        "row_scale": row_scale.numpy(),
        "outlier_columns": columns.numpy(),
    }


def layers(bnb: types.ModuleType) -> Arrays:
    """Run `Linear4bit`, its gradient, `Embedding4bit` and `Embedding8bit`."""
    import torch

    rng = np.random.default_rng(64)
    # One value in each row is up to 20 times as large, so that absmax differ.
    weight = rng.standard_normal((LAYERS_SHAPE[1], LAYERS_SHAPE[0])) / 12
    weight[:, 7] *= np.linspace(1, 20, len(weight))
    arrays = {
        "weight": weight.astype(np.float16),
        "x": rng.standard_normal((LAYERS_SHAPE[2], weight.shape[1])).astype(np.float16),
        "dy": rng.standard_normal((LAYERS_SHAPE[2], len(weight))).astype(np.float16),
        "ids": rng.integers(0, len(weight), (2, 6)),
    }
    weight, x, dy, ids = map(torch.from_numpy, arrays.values())

    def put(name: str, value: "torch.Tensor") -> None:
        value = value.detach()
        bits = value.view(torch.uint16) if value.element_size() == 2 else value
        arrays[name] = bits.numpy()

    for quant_type, double in itertools.product(("nf4", "fp4"), (False, True)):
        form = f"{quant_type}{'_double' * double}"
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            layer = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                compute_dtype=dtype,
                compress_statistics=double,
                quant_type=quant_type,
            )
            layer.weight.data = weight.float()
            layer = layer.to("cpu")
            inputs = x.to(dtype, copy=True).requires_grad_()
            # Without instructions that only some machines have.
            with torch.backends.mkldnn.flags(enabled=False):
                y = layer(inputs)
                y.backward(dy.to(dtype))
            put(f"y_{form}_{str(dtype)[6:]}", y)
            put(f"dx_{form}_{str(dtype)[6:]}", inputs.grad)
        # The codes do not depend on how the absmax is stored.
        arrays[f"codes_{quant_type}"] = layer.weight.detach().numpy().reshape(-1)
    for name in ("nf4", "fp4", "int8"):
        if name == "int8":
            embedding = bnb.nn.Embedding8bit(*weight.shape, dtype=torch.float32)
        else:
            embedding = bnb.nn.Embedding4bit(
                *weight.shape, dtype=torch.float32, quant_type=name
            )
        embedding.weight.data = weight.float()
        put(f"rows_{name}", embedding.to("cpu")(ids).float())
    return arrays


def codebooks(bnb: types.ModuleType) -> Arrays:
    """Return the four codes, as bitsandbytes makes them."""
    functional = bnb.functional
    return {
        "nf4": functional.get_4bit_type("nf4", device="cpu").numpy(),
        "fp4": functional.get_4bit_type("fp4", device="cpu").numpy(),
        "dynamic_signed": functional.create_dynamic_map(True).numpy(),
        "dynamic_unsigned": functional.create_dynamic_map(False).numpy(),
    }


def compute(native: bool) -> tuple[dict[str, Arrays], dict[str, bytes]]:
    """Compute the arrays of every .npz file with one of the two paths, and .pt files.

    Optimizers are computed with one path only.
    """
    bnb = load_bitsandbytes(native)
    files = {
        "codebooks": codebooks(bnb),
        "nf4": four_bit(bnb, "nf4"),
        "fp4": four_bit(bnb, "fp4"),
        "double_quant": double_quant(bnb),
        "dynamic8": dynamic8(bnb),
        "llm_int8": llm_int8(bnb),
    }
    if native:
        return files, {}
    arrays, saved = state_dicts(bnb)
    files |= {
        "layers": layers(bnb),
        "adam8bit": adam8bit(bnb),
        "trajectories": trajectories(bnb),
        "state_dict": arrays,
    }
    return files, saved


def main() -> None:
    """Compute with both paths, compare, and write the files."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        (files, saved), (native, _) = pool.map(compute, (False, True))
    for name, arrays in native.items():
        for key, theirs in arrays.items():
            ours = files[name][key]
            differ = np.count_nonzero(ours.view(np.uint8) != theirs.view(np.uint8))
            if differ:
                print(f"{name}.{key}: the native path differs in {differ} bytes")
            if name != "llm_int8" and key.endswith("codes"):
                files[name][key.replace("codes", "native_codes")] = theirs
    for name, arrays in files.items():
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")
    for name, content in saved.items():
        path = HERE / f"{name}.pt"
        path.write_bytes(content)
        print(f"{path.name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
