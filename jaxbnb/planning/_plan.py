"""plan: whether a training run fits on a GPU, and what to change if it does not."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxbnb.core.table import format_table
from jaxbnb.core.units import format_bytes
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.nnx import Remat
from jaxbnb.planning._estimate import estimate_peak
from jaxbnb.planning._roofline import Roofline, make_roofline
from jaxbnb.planning._step import (
    Setting,
    Shapes,
    compiled_peak,
    make_shapes,
    read_decoder_config,
)
from jaxbnb.planning.gpus import Gpu, find_gpu, has_compiler


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that would make a run smaller.

    Attributes:
        what: the change, in words.
        option: the option of ``jaxbnb plan`` for it.
        saved_bytes: how much lower the peak would be.
    """

    what: str
    option: str
    saved_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training run would need, on each device.

    Attributes:
        gpu: the GPU.
        setting: the run.
        devices: number of GPUs.
        weight_bytes: size of the frozen weights, exact.
        adapter_bytes: size of the trained variables, exact.
        optimizer_bytes: size of the optimizer's state, exact. A paged one is in the
            host's memory, and not in the peak.
        peak_bytes: peak of the GPU's memory in a step.
        is_compiled: whether XLA compiled the step for this GPU, so that the peak is
            exact. Otherwise it is an estimate.
        longest_seq: longest sequence, in steps of 64 tokens, that fits with this batch;
            0 if none does.
        largest_batch: largest batch that fits with this sequence; 0 if none does.
        is_longest_the_models: whether the model, and not the memory, limits
            ``longest_seq``.
        changes: what would lower the peak, the largest saving first.
        roofline: the least that a step takes.
    """

    gpu: Gpu
    setting: Setting
    devices: int
    weight_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    is_compiled: bool
    longest_seq: int
    largest_batch: int
    is_longest_the_models: bool
    changes: tuple[Change, ...]
    roofline: Roofline

    @property
    def fits(self) -> bool:
        """Whether the peak is at most the memory that the GPU has for a program."""
        return self.peak_bytes <= self.gpu.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        setting = dataclasses.asdict(self.setting)
        if isinstance(self.setting.remat, Remat):
            setting["remat"] = dataclasses.asdict(self.setting.remat)
        return {
            "gpu": self.gpu.name,
            "devices": self.devices,
            "setting": setting,
            "bytes": {
                "weights": self.weight_bytes,
                "adapters": self.adapter_bytes,
                "optimizer": self.optimizer_bytes,
                "peak": self.peak_bytes,
                "usable": self.gpu.usable_bytes,
            },
            "fits": self.fits,
            "peak_is": "compiled" if self.is_compiled else "estimated",
            "longest_seq": self.longest_seq,
            "largest_batch": self.largest_batch,
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "roofline": dataclasses.asdict(self.roofline),
        }

    def __str__(self) -> str:
        return format_plan(self)


def plan(
    model: Any,
    gpu: str | Gpu,
    *,
    devices: int = 1,
    quant: str | None = "nf4",
    double_quant: bool = False,
    optimizer: str = "paged_adamw8bit",
    batch: int = 1,
    seq: int = 2048,
    remat: bool | Remat = True,
    rank: int | None = 16,
    dtype: str | None = None,
    compile: bool | None = None,
) -> Plan:
    """Says whether a training run would fit on a GPU. No weights are read.

    The bytes of weights, adapters and optimizer state are exact. The peak is what XLA's
    compiler for NVIDIA GPUs plans to use, if JAX's CUDA plugin is installed; it needs
    no GPU. Otherwise it is an estimate.

    With several devices, weights, trained variables and optimizer state are divided
    among them, as are the rows of a batch, and the peak is an estimate.

    Args:
        model: a folder with a config.json, a config.json, a GGUF file, a
            `DecoderConfig`, or an NNX model, such as ``nnx.eval_shape`` makes.
        gpu: name of a GPU, such as "rtx4090" or "h100", or a `Gpu`.
        devices: number of GPUs.
        quant: format of the frozen linear layers; None to leave them.
        double_quant: whether to quantise the absmax as well.
        optimizer: name of an optimizer of `jaxbnb.optim`, or "adamw" for Optax's.
        batch: rows of a batch, on all devices together.
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
        ValueError: a GPU or an optimizer is unknown, a size is not positive, the batch
            does not divide among the devices, or ``compile`` is True where there is
            nothing to compile for.

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
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    _check_sizes(batch=batch, seq=seq, devices=devices, rank=rank)
    if batch % devices:
        raise ValueError(
            f"a batch of {batch} rows does not divide among {devices} devices; give a "
            f"multiple of {devices}"
        )
    if dtype is None:
        dtype = "bfloat16" if gpu.has_bfloat16 else "float16"
    setting = Setting(
        quant=quant,
        double_quant=double_quant,
        optimizer=optimizer,
        batch=batch // devices,
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
    source = model if isinstance(model, nnx.Module) else read_decoder_config(model)
    config = source if isinstance(source, DecoderConfig) else _get_config(source)
    if config is not None and seq > config.max_position_embeddings:
        raise ValueError(
            f"seq is {seq}, and the model takes at most "
            f"{config.max_position_embeddings} tokens"
        )
    if config is not None and isinstance(remat, Remat):
        layers = config.num_hidden_layers
        if layers % remat.every:
            raise ValueError(
                f"remat every={remat.every} must divide the number of layers, {layers}"
            )
    if compile is None:
        compile = has_compiler() and gpu.capability is not None and devices == 1
    _check_compiles(compile, gpu, devices)
    shapes = make_shapes(source, setting)
    measure = _Measure(source, config, devices)
    peak = measure.estimate(setting, shapes)
    correction = 1.0
    if compile:
        compiled, _ = compiled_peak(shapes, setting, gpu)
        correction, peak = compiled / peak, compiled
    most = (config.max_position_embeddings if config else 1 << 20) // 64
    longest = _find_largest(
        lambda n: dataclasses.replace(setting, seq=64 * n),
        measure,
        gpu.usable_bytes / correction,
        most,
    )
    return Plan(
        gpu,
        dataclasses.replace(setting, batch=batch),
        devices,
        *(math.ceil(size / devices) for size in shapes.bytes.values()),
        peak_bytes=peak,
        is_compiled=compile,
        longest_seq=64 * longest,
        is_longest_the_models=longest == most,
        largest_batch=_find_largest(
            lambda n: dataclasses.replace(setting, batch=n),
            measure,
            gpu.usable_bytes / correction,
            1 << 16,
        )
        * devices,
        changes=_find_changes(setting, measure, correction, peak),
        roofline=make_roofline(config, shapes, setting, gpu),
    )


class _Measure:
    """Estimates of peaks, for settings of one model; shapes are made once each."""

    def __init__(self, source: Any, config: DecoderConfig | None, devices: int):
        self._source, self._config, self._devices = source, config, devices
        self._shapes: dict[Any, Shapes] = {}

    def estimate(self, setting: Setting, shapes: Shapes | None = None) -> int:
        """Returns the peak of a device."""
        key = (
            *(setting.quant, setting.double_quant, setting.optimizer),
            *(setting.rank, setting.dtype),
        )
        if shapes is not None:
            self._shapes[key] = shapes
        if key not in self._shapes:
            self._shapes[key] = make_shapes(self._source, setting)
        return estimate_peak(self._config, self._shapes[key], setting, self._devices)


def _find_largest(
    make: Callable[[int], Setting], measure: _Measure, limit: float, most: int
) -> int:
    """Returns the largest number that fits, as `make` uses it; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and measure.estimate(make(high)) <= limit:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if measure.estimate(make(middle)) <= limit:
            low = middle
        else:
            high = middle
    return low


def _find_changes(
    setting: Setting, measure: _Measure, correction: float, peak: int
) -> tuple[Change, ...]:
    """Lists what would lower the peak by at least one percent."""
    options: list[tuple[str, str, Setting]] = []

    def add(what: str, option: str, **changes: Any) -> None:
        options.append((what, option, dataclasses.replace(setting, **changes)))

    if setting.quant is None and setting.rank is not None:
        add("quantise the weights to NF4", "--quant nf4", quant="nf4")
    if setting.rank is None:
        add("train adapters over NF4", "--quant nf4 --rank 16", rank=16, quant="nf4")
    if setting.quant not in (None, "llm_int8") and not setting.double_quant:
        add("quantise the absmax too", "--double-quant", double_quant=True)
    if not setting.optimizer.startswith("paged_"):
        add(
            "keep the optimizer's state on the host",
            "--optimizer paged_adamw8bit",
            optimizer="paged_adamw8bit",
        )
    if setting.remat is False:
        add("recompute layers", "--remat layer", remat=True)
    if setting.remat is True:
        add("keep the input of every 4th layer", "--remat 4", remat=Remat(every=4))
        add(
            "keep layers' inputs on the host",
            "--remat offload",
            remat=Remat(offload=True),
        )
    if setting.batch > 1:
        add("one row, and accumulate gradients", "--batch 1", batch=1)
    half = setting.seq // 2
    if half >= 64:
        add("half the sequence", f"--seq {half}", seq=half)
    if setting.rank is not None and setting.rank > 8:
        add(
            "adapters of half the rank",
            f"--rank {setting.rank // 2}",
            rank=setting.rank // 2,
        )
    changes = [
        Change(what, option, peak - round(measure.estimate(changed) * correction))
        for what, option, changed in options
    ]
    worthwhile = [change for change in changes if change.saved_bytes >= peak / 100]
    return tuple(sorted(worthwhile, key=lambda change: -change.saved_bytes))


def format_plan(plan: Plan) -> str:
    """Formats a plan as a table for people."""
    setting, gpu = plan.setting, plan.gpu
    trained = "all parameters" if setting.rank is None else f"rank {setting.rank}"
    how = "compiled" if plan.is_compiled else "estimated"
    is_paged = setting.optimizer.startswith("paged_")
    rows = [
        ("", "size"),
        (f"weights, {setting.quant or setting.dtype}", format_bytes(plan.weight_bytes)),
        (f"trained, {trained}", format_bytes(plan.adapter_bytes)),
        (
            f"optimizer state{' (on the host)' if is_paged else ''}",
            format_bytes(plan.optimizer_bytes),
        ),
        (f"peak of a step, {how}", format_bytes(plan.peak_bytes)),
        (f"memory of the {gpu.name}", format_bytes(gpu.usable_bytes)),
    ]
    where = f"{plan.devices} x {gpu.name}" if plan.devices > 1 else gpu.name
    each = ", each" if plan.devices > 1 else ""
    left = gpu.usable_bytes - plan.peak_bytes
    verdict = (
        f"It fits, with {format_bytes(left)} to spare{each}."
        if plan.fits
        else f"It does not fit: {format_bytes(-left)} too much{each}."
    )
    lines = [
        f"{setting.batch} x {setting.seq:,} tokens on {where}"
        f"{'; sizes of each' if each else ''}",
        "",
        format_table(rows, 1),
        "",
        verdict,
        f"Longest sequence with this batch: {plan.longest_seq:,} tokens"
        f"{' (the most that the model takes)' if plan.is_longest_the_models else ''}. "
        f"Largest batch with this sequence: {plan.largest_batch:,} rows.",
    ]
    if plan.roofline.seconds is not None:
        lines.append(
            f"A step takes at least {plan.roofline.seconds * 1e3:.0f} ms, by "
            f"{plan.roofline.bound}."
        )
    if plan.changes:
        title = "What would save memory:" if plan.fits else "What to change:"
        table = [
            (change.what, change.option, format_bytes(change.saved_bytes))
            for change in plan.changes
        ]
        lines += ["", title, format_table(table, 1)]
        if not plan.fits and -left > plan.changes[0].saved_bytes:
            lines.append("None of these is enough alone.")
    return "\n".join(lines)


def _get_config(model: nnx.Module) -> DecoderConfig | None:
    return model.config if isinstance(model, CausalLM) else None


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def _check_compiles(compile: bool, gpu: Gpu, devices: int) -> None:
    if not compile:
        return
    if gpu.capability is None:
        raise ValueError(
            f"there is nothing to compile for: of {gpu.name}, only the memory is known"
        )
    if devices > 1:
        raise ValueError("a plan for several devices is an estimate: compile=False")
    if not has_compiler():
        raise ImportError(
            "to compile for a GPU, install JAX's CUDA plugin: pip install --no-deps "
            "jax-cuda13-plugin jax-cuda13-pjrt, of the version of jax"
        )
