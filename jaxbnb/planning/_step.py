"""The train step of a plan, as shapes: its model, its adapters, its optimizer state."""

import contextlib
import dataclasses
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from jaxbnb.convert import find_checkpoint, open_checkpoint
from jaxbnb.convert.huggingface_folder import read_config
from jaxbnb.convert.json_files import parse_json
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import (
    find_optimizer,
    peak_bytes,
    split_trainable,
    train_step,
)
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import CausalLM, DecoderConfig
from jaxbnb.models.load import STORED, abstract_pretrained
from jaxbnb.nnx import Remat, quantize_model
from jaxbnb.optim import stochastic_rounding
from jaxbnb.planning.collectives import collective_bytes
from jaxbnb.planning.gpus import Gpu, absent_devices
from jaxbnb.sharding import device_bytes, partition_specs, use_mesh
from jaxbnb.sharding.activations import batch_axes
from jaxbnb.sharding.specs import make_shardings


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a training run would be made of.

    Attributes:
        quant: format of the frozen linear layers; "stored" for that of the checkpoint;
            None to leave them.
        double_quant: whether to quantise the absmax as well.
        optimizer: name of an optimizer of `jaxbnb.optim`, or "adamw" in float32.
        batch: rows of a batch.
        seq: tokens of a row.
        remat: gradient checkpointing, as in `jaxbnb.finetune.train_step`.
        rank: rank of the adapters on all linear layers; None to train all parameters.
        dtype: dtype of everything that is not quantised.
    """

    quant: str | None = "nf4"
    double_quant: bool = False
    optimizer: str = "paged_adamw8bit"
    batch: int = 1
    seq: int = 2048
    remat: bool | Remat = True
    rank: int | None = 16
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The arrays of a step, as shapes.

    Attributes:
        graphdef: structure of the model.
        trainable: the trained variables.
        opt_state: the optimizer's state.
        frozen: the other variables.
        tx: the optimizer.
    """

    graphdef: nnx.GraphDef
    trainable: nnx.State
    opt_state: Any
    frozen: nnx.State
    tx: optax.GradientTransformation

    def bytes_on(self, mesh: AbstractMesh) -> dict[str, int]:
        """Returns the bytes of each part on a device of a mesh.

        "largest" are those of a device's part of the largest trained array, in float32.

        Raises:
            ValueError: see `jaxbnb.sharding.partition_specs`.
        """

        def count(x: Any, spec: PartitionSpec) -> int:
            return 4 * math.prod(NamedSharding(mesh, spec).shard_shape(x.shape))

        specs = partition_specs(self.trainable, mesh)
        parts = jax.tree.map(count, self.trainable, specs)
        return {
            "weights": device_bytes(self.frozen, mesh),
            "adapters": device_bytes(self.trainable, mesh),
            "optimizer": device_bytes(self.opt_state, mesh),
            "largest": max(jax.tree.leaves(parts)),
        }


def read_decoder_config(model: Any) -> DecoderConfig:
    """Reads the sizes of a model, and never its weights.

    Args:
        model: a `DecoderConfig`, a config.json, a folder with one, a GGUF file, or the
            name of a model on Hugging Face's hub. Then its config is downloaded, but
            not its weights, unless it is a GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        NotImplementedError: the model is of an unknown family.
    """
    if isinstance(model, DecoderConfig):
        return model
    path = find_checkpoint(model, has_weights=False)
    if path.is_dir():
        fields = read_config(path)
    elif path.suffix == ".json":
        fields = parse_json(path, path.read_bytes())
    else:
        fields = open_checkpoint(path).config
    try:
        return DecoderConfig.from_huggingface(fields)
    except (NotImplementedError, ValueError) as error:
        error.add_note(f"This is the config of {path}.")
        raise


def read_source(model: Any, setting: Setting) -> DecoderConfig | nnx.Module:
    """Reads what the arrays of a step are made from, and never weights.

    Args:
        model: an NNX model, or see `read_decoder_config`.
        setting: the run.

    Returns:
        The sizes of a model, or a model of shapes, as a checkpoint stores its weights.

    Raises:
        ValueError: the setting asks for the format of a checkpoint, and ``model`` is
            not one, or stores no weight quantised.
    """
    if setting.quant != STORED:
        return model if isinstance(model, nnx.Module) else read_decoder_config(model)
    if isinstance(model, nnx.Module | DecoderConfig) or Path(model).suffix == ".json":
        raise ValueError(
            f"quant={STORED!r} is the format of a checkpoint's weights: give a folder "
            "or a GGUF file as the model, or a format, such as 'nf4'; got "
            f"{model!r:.80}"
        )
    return abstract_pretrained(model, quant=STORED, dtype=setting.dtype)


def make_shapes(model: DecoderConfig | nnx.Module, setting: Setting) -> Shapes:
    """Returns the arrays of a step without making them.

    Args:
        model: sizes of a model; or an NNX model, which may be made of shapes by
            ``nnx.eval_shape``. It is not changed.
        setting: the run.
    """
    dtype = jnp.dtype(setting.dtype)
    quant = None
    if setting.quant not in (None, STORED):
        # Not inside the tracing below, where JAX adds to errors.
        double_quant = setting.double_quant and setting.quant != "llm_int8"
        quant = QuantConfig(
            setting.quant, double_quant=double_quant, compute_dtype=dtype
        )
    find_optimizer(setting.optimizer)

    def make(model: Any = None) -> nnx.Module:
        if model is None:
            assert isinstance(config, DecoderConfig)
            model = CausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        if quant is not None:
            quantize_model(model, quant)
        if setting.rank is not None:
            add_adapter(model, LoraConfig(r=setting.rank), rngs=nnx.Rngs(1))
        return model

    config = model
    if isinstance(model, DecoderConfig):
        abstract = nnx.eval_shape(make)
    else:
        graphdef, state = nnx.split(model)
        abstract = nnx.eval_shape(lambda state: make(nnx.merge(graphdef, state)), state)
    wrt = nnx.Param if setting.rank is None else nnx.LoRAParam
    graphdef, trainable, frozen = split_trainable(abstract, wrt)
    tx = find_optimizer(setting.optimizer)(1e-4)
    if setting.rank is None and dtype.itemsize == 2:
        tx = stochastic_rounding(tx)  # As a run does.
    return Shapes(graphdef, trainable, jax.eval_shape(tx.init, trainable), frozen, tx)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What XLA says about a compiled step.

    Attributes:
        peak_bytes: peak of a device's memory.
        collectives: bytes that each device gets from the others, by kind of collective.
    """

    peak_bytes: int
    collectives: dict[str, int]


def compile_step(
    shapes: Shapes, setting: Setting, gpu: Gpu, mesh: AbstractMesh
) -> CompiledStep:
    """Compiles a step for GPUs that need not be there; nothing runs.

    Args:
        shapes: arrays of the step.
        setting: the run.
        gpu: the GPU.
        mesh: the mesh of GPUs, with axes that `jaxbnb.sharding` knows.
    """
    places = _Places(gpu, mesh)
    is_paged = setting.optimizer.startswith("paged_")
    trainable = places.put(shapes.trainable)
    opt_state = places.put(shapes.opt_state, "pinned_host" if is_paged else "device")
    tokens = jax.ShapeDtypeStruct(
        (setting.batch, setting.seq), jnp.int32, sharding=places.rows
    )
    step = train_step(shapes.graphdef, shapes.tx, remat=setting.remat)
    results = (
        *jax.tree.map(lambda x: x.sharding, (trainable, opt_state)),
        places.copies,
    )
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    with places.context():
        compiled = jitted.lower(
            trainable, opt_state, places.put(shapes.frozen), tokens
        ).compile()
    memory: Any = compiled.memory_analysis()
    host = (
        memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        + memory.host_temp_size_in_bytes
        - memory.host_alias_size_in_bytes
    )
    sent = collective_bytes(compiled) if mesh.size > 1 else {}
    return CompiledStep(peak_bytes(compiled) - host, sent)


class _Places:
    """Where the arrays of a step are: on one GPU, or on a mesh of several."""

    def __init__(self, gpu: Gpu, mesh: AbstractMesh):
        devices = absent_devices(gpu, mesh.size)
        if mesh.size == 1:
            self._mesh = None
            self.rows = self.copies = SingleDeviceSharding(devices[0])
        else:
            grid = np.asarray(devices).reshape(mesh.axis_sizes)
            self._mesh = Mesh(grid, mesh.axis_names)
            rows = PartitionSpec(batch_axes(mesh) or None)
            self.rows = NamedSharding(self._mesh, rows)
            self.copies = NamedSharding(self._mesh, PartitionSpec())

    def context(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh)

    def put(self, tree: Any, memory: str = "device") -> Any:
        """Returns shapes with shardings."""
        if self._mesh is None:
            shardings = jax.tree.map(lambda _: self.copies, tree)
        else:
            shardings = make_shardings(partition_specs(tree, self._mesh), self._mesh)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding.with_memory_kind(memory)
            ),
            tree,
            shardings,
        )
