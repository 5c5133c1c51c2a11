"""plan: whether a training run fits on a GPU, and what to change if it does not."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import AbstractMesh

from jaxbnb.finetune import mesh_sizes
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning._changes import Measure, find_changes, find_largest
from jaxbnb.planning._estimate import count_row_parts
from jaxbnb.planning._result import Plan
from jaxbnb.planning._roofline import make_roofline
from jaxbnb.planning._step import Setting, compile_step, read_source
from jaxbnb.planning.gpus import Gpu, find_gpu, has_compiler
from jaxbnb.sharding.activations import BATCH_AXES
from jaxbnb.sharding.layout import check_heads, find_layout, use_preset


def plan(
    model: Any,
    gpu: str | Gpu,
    *,
    devices: int | None = None,
    mesh: str | None = None,
    sharding: str | None = None,
    quant: str | None = "nf4",
    double_quant: bool = False,
    optimizer: str = "paged_adamw8bit",
    batch: int | None = None,
    seq: int = 2048,
    remat: bool | Remat = True,
    rank: int | None = 16,
    dtype: str | None = None,
    compile: bool | None = None,
) -> Plan:
    """Says whether a training run would fit on a GPU, or on several. Reads no weights.

    The bytes of weights, adapters and optimizer state are exact. The peak is what XLA's
    compiler for NVIDIA GPUs plans to use, if JAX's CUDA plugin is installed; it needs
    no GPU. Otherwise it is an estimate.

    Args:
        model: a folder with a config.json, a config.json, a GGUF file, a
            `DecoderConfig`, or an NNX model, such as ``nnx.eval_shape`` makes.
        gpu: name of a GPU, such as "rtx4090" or "h100", or a `Gpu`.
        devices: number of GPUs; None for as many as the sizes in ``mesh`` say, or 1.
        mesh: how they are used, such as "data=2,fsdp=4": axes of a mesh with their
            sizes, where one size may be left out. The axes are those of
            `jaxbnb.sharding`. None for one axis with all GPUs.
        sharding: "fsdp", "tensor" or "fsdp+tensor": what the mesh must be made for, and
            the name of its one axis if there is no ``mesh``. None for what the mesh
            axes are called, or "fsdp".
        quant: format of the frozen linear layers; "stored" for the format that the
            checkpoint stores them in, see `jaxbnb.load_pretrained`; None to leave them.
        double_quant: whether to quantise the absmax as well.
        optimizer: name of an optimizer of `jaxbnb.optim`, or "adamw" in float32.
        batch: rows of a batch, on all devices together; None for one on each device
            along "data" and "fsdp", which divide rows.
        seq: tokens of a row.
        remat: gradient checkpointing, as in `jaxbnb.finetune.train_step`.
        rank: rank of the adapters on all linear layers; None to train all parameters.
        dtype: dtype of everything that is not quantised; None for bfloat16, or float16
            on a GPU that has no bfloat16.
        compile: whether to compile the step; None to do so if that is possible.

    Returns:
        The plan; ``print`` shows it as a table.

    Raises:
        ImportError: ``compile`` is True, and the CUDA plugin is not installed.
        NotImplementedError: the model is of an unknown family.
        TypeError: an NNX model is not a language model.
        ValueError: a GPU or an optimizer is unknown, a size is not positive, the mesh
            does not have that many devices, does not suit ``sharding`` or does not
            divide the rows, heads, experts or arrays, or ``compile`` is True where
            there is nothing to compile for.

    Example:
        >>> import jaxbnb
        >>> from jaxbnb.models import DecoderConfig
        >>> llama_3_8b = DecoderConfig(
        ...     vocab_size=128_256, hidden_size=4096, intermediate_size=14_336,
        ...     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        ...     head_dim=128, max_position_embeddings=8192)
        >>> plan = jaxbnb.plan(llama_3_8b, "rtx4090", compile=False)
        >>> plan.fits, round(plan.weight_bytes / 2**30, 2)
        (True, 5.61)
        >>> plan = jaxbnb.plan(
        ...     llama_3_8b, "h100", mesh="data=2,fsdp=4", compile=False)
        >>> plan.mesh, round(plan.weight_bytes / 2**30, 2)
        ({'data': 2, 'fsdp': 4}, 1.4)
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    _check_sizes(batch=batch, seq=seq, devices=devices, rank=rank)
    grid = _make_mesh(devices, mesh, sharding)
    parts = count_row_parts(grid.shape)
    batch = parts if batch is None else batch
    if batch % parts:
        raise ValueError(
            f"a batch of {batch} rows does not divide among {parts} devices; give a "
            f"multiple of {parts}"
        )
    if dtype is None:
        dtype = "bfloat16" if gpu.has_bfloat16 else "float16"
    setting = Setting(
        quant=quant,
        double_quant=double_quant,
        optimizer=optimizer,
        batch=batch,
        seq=seq,
        remat=remat,
        rank=rank,
        dtype=dtype,
    )
    if isinstance(model, nnx.Module) and not hasattr(model, "logits"):
        raise TypeError(
            "model must be a language model, or the path of one; got "
            f"{type(model).__name__}"
        )
    source = read_source(model, setting)
    config = source if isinstance(source, DecoderConfig) else _get_config(source)
    if config is not None:
        _check_config(config, setting, grid)
    if compile is None:
        compile = has_compiler() and gpu.capability is not None
    _check_compiles(compile, gpu)
    measure = Measure(source, config)
    sizes = measure.sizes(setting, grid)
    peak = measure.estimate(setting, grid)
    correction, collectives = 1.0, None
    if compile:
        compiled = compile_step(measure.shapes(setting), setting, gpu, grid)
        correction, collectives = compiled.peak_bytes / peak, compiled.collectives
        peak = compiled.peak_bytes
    limit = gpu.usable_bytes / correction
    most = (config.max_position_embeddings if config else 1 << 20) // 64

    def peak_of(**changes: Any) -> int:
        return measure.estimate(dataclasses.replace(setting, **changes), grid)

    longest = find_largest(lambda n: peak_of(seq=64 * n), limit, most)
    return Plan(
        gpu,
        setting,
        grid.size,
        dict(grid.shape),
        _name_sharding(grid),
        *(sizes[name] for name in ("weights", "adapters", "optimizer")),
        peak_bytes=peak,
        is_compiled=compile,
        collectives=collectives,
        proposed_mesh=_propose_mesh(measure, setting, grid, limit),
        longest_seq=64 * longest,
        is_longest_the_models=longest == most,
        largest_batch=parts
        * find_largest(lambda n: peak_of(batch=n * parts), limit, 1 << 16),
        changes=find_changes(setting, grid, measure, correction, peak),
        roofline=make_roofline(config, measure.shapes(setting), setting, gpu, grid),
    )


def _make_mesh(
    devices: int | None, mesh: str | None, sharding: str | None
) -> AbstractMesh:
    """Returns the mesh of a plan.

    Raises:
        ValueError: it does not have that many devices, or does not suit ``sharding``.
    """
    if mesh is None and sharding == "fsdp+tensor":
        raise ValueError(
            "sharding='fsdp+tensor' divides the devices in two ways: give mesh too, "
            "such as 'fsdp=4,tensor=2'"
        )
    sizes = mesh_sizes(mesh or "fsdp", devices)
    if mesh is None and sharding is not None:
        sizes = {sharding: devices or 1}
    made = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return made if sharding is None else use_preset(made, sharding)


def _name_sharding(mesh: AbstractMesh) -> str | None:
    """Returns the preset that a mesh stands for; None if all have the whole model."""
    names = [name for name in ("fsdp", "tensor") if mesh.shape.get(name, 1) > 1]
    return "+".join(names) or None


def _propose_mesh(
    measure: Measure, setting: Setting, mesh: AbstractMesh, limit: float
) -> Mapping[str, int] | None:
    """Returns a mesh on which the fewest devices share the weights, and which fits.

    Args:
        measure: estimates of the model.
        setting: the run.
        mesh: its mesh.
        limit: the largest estimate that fits.
    """
    if not set(mesh.axis_names) <= set(BATCH_AXES):
        return None
    for count in range(1, mesh.shape.get("fsdp", 1)):
        if mesh.size % count:
            continue
        proposed = AbstractMesh((mesh.size // count, count), ("data", "fsdp"))
        # The arrays may divide among all devices, and not among these.
        with contextlib.suppress(ValueError):
            if measure.estimate(setting, proposed) <= limit:
                return {name: n for name, n in proposed.shape.items() if n > 1}
    return None


def _get_config(model: nnx.Module) -> DecoderConfig | None:
    return model.config if isinstance(model, CausalLM) else None


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def _check_config(config: DecoderConfig, setting: Setting, mesh: AbstractMesh) -> None:
    """Checks that a model takes the tokens, the checkpoints and the mesh."""
    if setting.seq > config.max_position_embeddings:
        raise ValueError(
            f"seq is {setting.seq}, and the model takes at most "
            f"{config.max_position_embeddings} tokens; give a smaller one (--seq)"
        )
    layers, remat = config.num_hidden_layers, setting.remat
    if isinstance(remat, Remat) and layers % remat.every:
        raise ValueError(
            f"remat every={remat.every} must divide the number of layers, {layers}"
        )
    check_heads(config, find_layout(mesh.axis_names), mesh)


def _check_compiles(compile: bool, gpu: Gpu) -> None:
    if not compile:
        return
    if gpu.capability is None:
        raise ValueError(
            f"there is nothing to compile for: of {gpu.name}, only the memory is known"
        )
    if not has_compiler():
        raise ImportError(
            "to compile for a GPU, install JAX's CUDA plugin: pip install --no-deps "
            "jax-cuda13-plugin jax-cuda13-pjrt, of the version of jax"
        )
