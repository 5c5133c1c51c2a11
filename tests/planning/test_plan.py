"""plan: exact bytes, an estimate near what XLA compiles, and bad inputs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import jaxbnb
from jaxbnb.benchmarks import _plan
from jaxbnb.cli import _choices, main
from jaxbnb.core import tree_nbytes
from jaxbnb.finetune import mesh_sizes
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning import GPUS, Gpu, Setting, find_gpu, parse_memory, plan
from jaxbnb.planning._estimate import count_row_parts, estimate_peak
from jaxbnb.planning._step import CompiledStep, make_shapes
from jaxbnb.sharding import device_bytes
from jaxbnb.sharding.layout import PRESETS

SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
PEAKS = json.loads((Path(__file__).parent / "compiled_peaks.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A config.json, and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_bytes_are_those_of_the_real_run(folder):
    made = plan(folder, "h100", rank=4, double_quant=True, seq=64, compile=False)
    config = DecoderConfig.from_huggingface(SMALL)
    bf16 = jnp.bfloat16
    model = CausalLM(config, dtype=bf16, param_dtype=bf16, rngs=nnx.Rngs(0))
    quant = jaxbnb.QuantConfig("nf4", double_quant=True, compute_dtype=bf16)
    jaxbnb.nnx.quantize_model(model, quant)
    jaxbnb.lora.add_adapter(model, jaxbnb.lora.LoraConfig(r=4), rngs=nnx.Rngs(1))
    _, trainable, frozen = jaxbnb.finetune.split_trainable(model)
    state = jaxbnb.paged_adamw8bit(1e-4).init(trainable)
    assert made.weight_bytes == tree_nbytes(frozen)
    assert made.adapter_bytes == tree_nbytes(trainable)
    assert made.optimizer_bytes == tree_nbytes(state)
    # The same from the file, the config, and a model of shapes.
    abstract = nnx.eval_shape(
        lambda: CausalLM(config, dtype=bf16, param_dtype=bf16, rngs=nnx.Rngs(0))
    )
    for model in (folder / "config.json", config, abstract):
        other = plan(model, "h100", rank=4, double_quant=True, seq=64, compile=False)
        assert other.to_dict() == made.to_dict()
    assert isinstance(jax.tree.leaves(nnx.state(abstract))[0], jax.ShapeDtypeStruct)


@pytest.mark.parametrize("case", _plan.CASES, ids=_plan.title)
def test_estimates_are_near_compiled_peaks(case):
    """The peaks are of `compile_step`, in bytes, with jax 0.10.2."""
    _, config, _, options = case
    options = dict(options)
    axes = mesh_sizes(options.pop("mesh", "fsdp"), options.pop("devices", 1))
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    setting = Setting(**{"batch": count_row_parts(axes), **options})
    sizes = make_shapes(config, setting).bytes_on(mesh)
    estimate = estimate_peak(config, sizes, setting, axes)
    assert abs(estimate / PEAKS[_plan.title(case)] - 1) < _plan.LIMIT


def test_what_fits():
    made = plan(_plan.LLAMA_3_8B, "rtx4090", compile=False)
    assert made.fits
    assert made.peak_bytes < made.gpu.usable_bytes
    for field, value in (("seq", made.longest_seq), ("batch", made.largest_batch)):
        kwargs = {field: value}
        assert plan(_plan.LLAMA_3_8B, "rtx4090", compile=False, **kwargs).fits
        kwargs = {field: value + 64 if field == "seq" else value + 1}
        assert not plan(_plan.LLAMA_3_8B, "rtx4090", compile=False, **kwargs).fits
    options = {"quant": None, "optimizer": "adamw", "seq": 4096, "remat": False}
    large = plan(_plan.LLAMA_3_8B, "rtx4090", compile=False, **options)
    assert not large.fits
    assert large.changes[0].saved_bytes >= large.changes[-1].saved_bytes > 0
    changes = [change.option for change in large.changes]
    assert {"--quant nf4", "--remat layer"} <= set(changes)
    saved = {change.option: change.saved_bytes for change in large.changes}
    options["remat"] = True
    smaller = plan(_plan.LLAMA_3_8B, "rtx4090", compile=False, **options)
    assert large.peak_bytes - smaller.peak_bytes == saved["--remat layer"]
    assert "does not fit" in str(large)
    assert "--quant nf4" in str(large)


MESHES = {
    "copies": ({"mesh": "data", "devices": 2}, {"data": 2}, None, 2),
    "a preset": ({"sharding": "tensor", "devices": 2}, {"tensor": 2}, "tensor", 1),
    "both": (
        {"mesh": "fsdp=2,tensor", "sharding": "fsdp+tensor", "devices": 4},
        {"fsdp": 2, "tensor": 2},
        "fsdp+tensor",
        2,
    ),
}


@pytest.mark.parametrize(
    ("options", "mesh", "sharding", "batch"), MESHES.values(), ids=MESHES
)
def test_meshes(folder, options, mesh, sharding, batch):
    """Bytes are those of the specs by which a run divides its arrays."""
    fields = {**SMALL, "hidden_size": 256, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(fields))
    options = {"optimizer": "adamw8bit", "seq": 64, "compile": False, **options}
    made = plan(folder, "h100", **options)
    assert (made.mesh, made.sharding, made.setting.batch) == (mesh, sharding, batch)
    shapes = make_shapes(DecoderConfig.from_huggingface(fields), made.setting)
    grid = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    whole = tree_nbytes((shapes.frozen, shapes.trainable, shapes.opt_state))
    sizes = made.to_dict()["bytes"]
    assert sizes["weights"] == device_bytes(shapes.frozen, grid)
    assert sizes["adapters"] == device_bytes(shapes.trainable, grid)
    assert sizes["optimizer"] == device_bytes(shapes.opt_state, grid)
    held = sum(sizes[name] for name in ("weights", "adapters", "optimizer"))
    # What is small is copied.
    assert held == whole if sharding is None else held < whole


def test_proposals(folder):
    """Weights that fit on one device need not be shared."""
    made = plan(folder, "h100", devices=8, seq=64, compile=False)
    assert (made.mesh, made.sharding) == ({"fsdp": 8}, "fsdp")
    assert made.setting.batch == 8
    assert made.proposed_mesh == {"data": 8}
    assert "--mesh data=8 fits too" in str(made)
    assert "nothing was compiled" in str(made)
    gpu = Gpu("mine", 7 << 30)
    options = {"seq": 64, "batch": 8, "devices": 4, "compile": False}
    small = plan(_plan.LLAMA_3_8B, gpu, **options)
    assert small.proposed_mesh == {"data": 2, "fsdp": 2}
    assert plan(_plan.LLAMA_3_8B, gpu, mesh="data=2,fsdp=2", **options).fits
    copies = plan(_plan.LLAMA_3_8B, gpu, mesh="data", **options)
    assert not copies.fits
    saved = {change.option: change.saved_bytes for change in copies.changes}
    assert copies.peak_bytes - saved["--mesh fsdp=4"] == small.peak_bytes
    saved = {change.option: change.saved_bytes for change in small.changes}
    options |= {"batch": 16, "devices": 8}
    more = plan(_plan.LLAMA_3_8B, gpu, **options)
    assert small.peak_bytes - saved["--devices 8 --batch 16"] == more.peak_bytes


def test_the_command(folder, capsys):
    command = ["plan", str(folder), "--seq", "128", "--no-compile"]
    assert main([*command, "--gpu", "t4", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["bytes"]) >= {"weights", "adapters", "optimizer", "peak"}
    assert made["fits"] is True
    assert made["setting"]["dtype"] == "float16"  # A T4 has no bfloat16.
    options = ["--memory", "1MiB", "--remat", "2", "--rank", "none", "--quant", "none"]
    plot = folder / "plan.png"
    assert main([*command, *options, "--plot", str(plot)]) == 0
    assert "It does not fit" in capsys.readouterr().out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert main([*command, "--gpu", "h100", "--measure"]) == 1
    assert "JAX finds none on this machine" in capsys.readouterr().err
    command += ["--gpu", "h100", "--devices", "4"]
    assert main([*command, "--mesh", "data=2,fsdp", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["devices"], made["mesh"]) == (4, {"data": 2, "fsdp": 2})
    assert (made["sharding"], made["collectives"]) == ("fsdp", None)
    assert main([*command, "--mesh", "data=8"]) == 1
    assert "mesh is data=8, and the number of devices is 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--measure"])
    assert "leave out --devices" in capsys.readouterr().err


def test_names_of_gpus():
    assert list(_choices.PLANNED_GPUS) == list(GPUS)
    assert _choices.SHARDINGS == PRESETS
    assert find_gpu("NVIDIA-h100".replace("NVIDIA-", "")) is GPUS["h100"]
    assert parse_memory("1.5 GB") == 1_500_000_000


WRONG = {
    "a GPU": (lambda f: plan(f, "rtx4080"), ValueError, "perhaps rtx4090.*--memory"),
    "a memory": (lambda f: parse_memory("24 apples"), ValueError, "24GiB or 24GB"),
    "a length": (lambda f: plan(f, "t4", seq=512), ValueError, "at most 256 tokens"),
    "a size": (lambda f: plan(f, "t4", batch=0), ValueError, "batch must be"),
    "an optimizer": (
        lambda f: plan(f, "t4", seq=64, optimizer="adamw9bit"),
        ValueError,
        "'adamw9bit' is unknown",
    ),
    "no file": (lambda f: plan(f / "no", "t4"), FileNotFoundError, "no such file"),
    "only a memory": (
        lambda f: plan(f, Gpu("mine", 1 << 30), seq=64, compile=True),
        ValueError,
        "nothing to compile for",
    ),
    "rows": (
        lambda f: plan(f, "h100", batch=3, devices=2),
        ValueError,
        "3 rows does not divide among 2 devices",
    ),
    "a mesh": (
        lambda f: plan(f, "h100", mesh="fsdp=8", devices=2),
        ValueError,
        "mesh is fsdp=8, and the number of devices is 2",
    ),
    "an axis": (
        lambda f: plan(f, "h100", mesh="rows=2", devices=2),
        ValueError,
        "axes from data, fsdp, tensor, expert",
    ),
    "a sharding": (
        lambda f: plan(f, "h100", sharding="fsdp2", devices=2),
        ValueError,
        "sharding must be one of 'fsdp'",
    ),
    "an idle axis": (
        lambda f: plan(f, "h100", mesh="tensor", sharding="fsdp", devices=2),
        ValueError,
        "does not have .*fsdp.* and would leave idle .*tensor",
    ),
    "two ways": (
        lambda f: plan(f, "h100", sharding="fsdp+tensor", devices=4),
        ValueError,
        "give mesh too",
    ),
    "heads": (
        lambda f: plan(f, "h100", sharding="tensor", devices=2, seq=64),
        ValueError,
        "num_key_value_heads=1",
    ),
    "experts": (
        lambda f: plan(f, "h100", mesh="expert", devices=2, seq=64),
        ValueError,
        "num_experts, and it has none",
    ),
    "features": (
        lambda f: plan(f, "h100", mesh="fsdp", devices=7, seq=64),
        ValueError,
        "cannot be divided among 7 devices",
    ),
    "another model": (
        lambda f: plan(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "t4", compile=False),
        TypeError,
        "must be a language model",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_bad_inputs(folder, call, kind, message):
    with pytest.raises(kind, match=message):
        call(folder)


def test_an_unknown_family(folder):
    fields = {**SMALL, "model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(NotImplementedError, match="'mamba' is not implemented"):
        plan(folder, "t4")


def test_a_step_is_compiled_if_possible(folder, monkeypatch):
    """Without the plugin, asking for it says what to install."""
    monkeypatch.setattr("jaxbnb.planning._plan.has_compiler", lambda: False)
    assert not plan(folder, "h100", seq=64).is_compiled
    with pytest.raises(ImportError, match="jax-cuda13-plugin"):
        plan(folder, "h100", seq=64, compile=True)
    monkeypatch.setattr("jaxbnb.planning._plan.has_compiler", lambda: True)
    step = CompiledStep(10**7, {"all-gather": 2**20, "all-reduce": 2**10})
    monkeypatch.setattr("jaxbnb.planning._plan.compile_step", lambda *_: step)
    made = plan(folder, "h100", seq=64, remat=Remat(offload=True), devices=2)
    assert made.is_compiled
    assert made.peak_bytes == 10**7
    assert made.to_dict()["collectives"] == step.collectives
    shown = "gets 1.0 MiB from the others in a step: all-gather 1.0 MiB, all-reduce 1.0"
    assert shown in str(made)
