"""load_pretrained: a model from a checkpoint, one tensor at a time."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxbnb.convert import (
    Checkpoint,
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core._files import atomic_folder
from jaxbnb.models._config import LlamaConfig
from jaxbnb.models._flax_folder import (
    is_flax_folder,
    read_fields,
    restore_state,
    write_state,
)
from jaxbnb.models._llama import Llama
from jaxbnb.models._names import is_stacked, torch_name
from jaxbnb.models._sharding import ShardingRule, shardings
from jaxbnb.models._stored import read_as, stored_formats
from jaxbnb.nnx import quantize_model

_FLOATS: Final = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Sequence[ShardingRule] = (),
) -> Llama:
    """Loads a Llama from a Hugging Face folder or a GGUF file.

    A checkpoint that bitsandbytes quantised, to 4 or 8 bits, is loaded byte for byte as
    it is stored, without decoding it.

    Tensors are read, cast to ``dtype``, quantised and put in their place one by one:
    beside the model that is returned, the device holds one tensor unquantised, and the
    host no more than two. The model equals, bit for bit, the one loaded without
    ``quant`` and then quantised by `jaxbnb.nnx.quantize_model`.

    Args:
        path: a folder with ``config.json`` and safetensors (or pytorch_model.bin), a
            GGUF file, or a folder that `convert_to_flax` wrote.
        quant: format of the decoder's linear layers: a ``quant_type`` such as "nf4", or
            a `jaxbnb.QuantConfig`; None to quantise nothing. The embedding and the
            output head stay as they are.
        dtype: of what is not quantised, and of the computation; None for the
            checkpoint's own, float32 if it mixes several.
        mesh: devices to divide the model over; None for the default device.
        rules: ``(names, spec)`` pairs, how a mesh divides variables: ``names`` such as
            ["up_proj.kernel"], each a whole dotted path or its last parts, or one
            regular expression; ``spec`` a ``PartitionSpec`` for the array of one layer,
            ``(in, out)`` of a kernel. The first one that names a variable decides;
            without one it is on every device.

    Returns:
        The model, on the default device or the mesh. Beside its share of the model, a
        device holds one tensor.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        MissingTensorError: the checkpoint lacks tensors of the model.
        CheckpointError: tensors have another shape than in the model, or are unknown to
            it. Either way the message lists all that is wrong.
        NotImplementedError: the checkpoint is of a model that jaxbnb does not have.
        TypeError: ``dtype`` is not a floating dtype.
        ValueError: a ``quant`` for what is quantised already, or rules that do not fit
            the mesh or the model.

    Example:
        >>> model = load_pretrained("SmolLM2-135M", quant="nf4")  # doctest: +SKIP
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape  # doctest: +SKIP
        (30, 576, 1536)
    """
    if is_flax_folder(path):
        return _restore(Path(path), quant, dtype, mesh, rules)
    plan = _prepare(path, quant, dtype)
    placed = shardings(plan.variables, mesh, rules)
    for name in plan.checkpoint.tensors:
        if name in plan.places:
            place = plan.places[name]
            value = plan.variables[place.path].get_value()
            tensor = read_as(plan.checkpoint, name, value)
            value = _put(place, plan.quant, value, tensor, placed.get(place.path))
            plan.variables[place.path] = plan.variables[place.path].replace(value)
    return _merge(plan.graphdef, plan.variables)


def check_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Raises what `load_pretrained` would, without reading any weights.

    Args:
        path: as of `load_pretrained`; so are the others.
        quant: format of the linear layers.
        dtype: of what is not quantised.

    Example:
        >>> check_pretrained("SmolLM2-135M")  # doctest: +SKIP
    """
    if not is_flax_folder(path):
        _prepare(path, quant, dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A model without values, and where each tensor of a checkpoint goes in it."""

    checkpoint: Checkpoint
    config: LlamaConfig
    quant: QuantConfig | None
    graphdef: Any
    variables: dict[Any, Any]
    places: "dict[str, _Place]"


def _prepare(
    path: str | os.PathLike[str],
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
) -> _Plan:
    if isinstance(quant, str):
        quant = QuantConfig(quant)
    checkpoint = open_checkpoint(path)
    config = _config(checkpoint)
    dtype = _checked_dtype(dtype) or _common_dtype(checkpoint, config)
    formats: dict[str, QuantConfig] = {}
    variables: dict[Any, Any]
    if checkpoint.quantized:
        abstract = nnx.eval_shape(lambda: _make(config, None, dtype, {}))
        variables = dict(nnx.to_flat_state(nnx.state(abstract)))
        names: dict[Any, list[str]] = {}
        for name, place in _places(variables, config).items():
            names.setdefault(place.path, []).append(name)
        formats = stored_formats(checkpoint, quant, names)
    abstract = nnx.eval_shape(lambda: _make(config, quant, dtype, formats))
    graphdef, state = nnx.split(abstract)
    variables = dict(nnx.to_flat_state(state))
    places = _places(variables, config)
    _check(checkpoint, config, places)
    return _Plan(checkpoint, config, quant, graphdef, variables, places)


def _checked_dtype(dtype: jax.typing.DTypeLike | None) -> jax.typing.DTypeLike | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be floating, e.g. bfloat16, got {jnp.dtype(dtype)}; quant= "
            "makes the weights smaller"
        )
    return dtype


def _merge(graphdef: Any, variables: dict[Any, Any]) -> Llama:
    return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))


def _restore(
    folder: Path,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
    mesh: jax.sharding.Mesh | None,
    rules: Sequence[ShardingRule],
) -> Llama:
    """The model that `convert_to_flax` wrote."""
    if quant is not None or dtype is not None:
        raise ValueError(
            f"{folder} holds a model's state, whose formats and dtype are what they "
            "are; leave out quant and dtype"
        )
    fields, stored_dtype, formats = read_fields(folder)
    config = LlamaConfig.from_huggingface(fields)
    abstract = nnx.eval_shape(lambda: _make(config, None, stored_dtype, formats))
    graphdef, state = nnx.split(abstract)
    variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
    values = restore_state(
        folder,
        {path: variable.get_value() for path, variable in variables.items()},
        shardings(variables, mesh, rules),
    )
    for path, value in values.items():
        variables[path] = variables[path].replace(value)
    return _merge(graphdef, variables)


def convert_to_flax(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> int:
    """Writes a model's NNX state as Orbax does, quantised or not.

    `load_pretrained` restores it without quantising anew, and `orbax.checkpoint` reads
    it as nested dicts of arrays. ``dst`` appears only when it is complete.

    Args:
        src: what `load_pretrained` loads.
        dst: the folder to make; nothing, or an empty folder, is there.
        quant: as of `load_pretrained`, any format.
        dtype: as of `load_pretrained`.

    Returns:
        The bytes of the model's arrays.

    Raises:
        FileExistsError: ``dst`` is there already.
        OSError: writing failed. Nothing is left behind.
        ValueError: as of `load_pretrained`.

    Example:
        >>> convert_to_flax("SmolLM2-135M", "out", quant="nf4")  # doctest: +SKIP
        173650048
    """
    plan = _prepare(src, quant, dtype)
    model = load_pretrained(src, quant=quant, dtype=dtype)
    with atomic_folder(dst) as folder:
        return write_state(model, plan.checkpoint, folder)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor goes.

    Attributes:
        path: of the variable.
        layer: in the stack, or None.
        shape: of the tensor.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether the tensor is to be transposed."""
        return self.path[-1] == "kernel"


def _config(checkpoint: Checkpoint) -> LlamaConfig:
    if checkpoint.config.get("quantization_config") and not checkpoint.quantized:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised already, as its quantization_config says; "
            "load the checkpoint it was made from, with quant= to quantise it"
        )
    try:
        return LlamaConfig.from_huggingface(checkpoint.config)
    except (NotImplementedError, ValueError) as error:
        error.add_note(f"This is the config of {checkpoint.path}.")
        raise


def _common_dtype(checkpoint: Checkpoint, config: LlamaConfig) -> np.dtype:
    dtypes = {
        info.dtype
        for name, info in checkpoint.tensors.items()
        if not _is_redundant(name, config)
    }
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {*_FLOATS} else _FLOATS[0]


def _make(
    config: LlamaConfig,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    formats: Mapping[str, QuantConfig],
) -> Llama:
    """A model whose linear layers have one format, or each its own, or none."""
    model = Llama(config, param_dtype=dtype, rngs=nnx.Rngs(0))
    if quant is not None:
        quantize_model(model, quant)
    if formats:
        rules = [([path], chosen) for path, chosen in formats.items()]
        quantize_model(model, rules=rules, skip=".*")
    return model


def _places(
    variables: dict[tuple[str, ...], nnx.Variable], config: LlamaConfig
) -> dict[str, _Place]:
    """Where each tensor that the model needs goes, by name."""
    places = {}
    for path, variable in variables.items():
        shape = variable.get_value().shape
        layers = [None]
        if is_stacked(path):
            layers, shape = range(config.num_hidden_layers), shape[1:]
        for layer in layers:
            place = _Place(path, layer, shape[::-1] if path[-1] == "kernel" else shape)
            places[torch_name(path, layer)] = place
    return places


def _check(
    checkpoint: Checkpoint, config: LlamaConfig, places: dict[str, _Place]
) -> None:
    """Raises one error for all that is wrong with the tensors of a checkpoint."""
    tensors = checkpoint.tensors
    missing = [f"missing: {name}" for name in places if name not in tensors]
    problems = []
    for name, info in tensors.items():
        if name in places:
            if info.shape != places[name].shape:
                want = places[name].shape
                problems.append(f"shape: {name} is {info.shape}, the model has {want}")
            elif not jnp.issubdtype(info.dtype, jnp.floating):
                problems.append(f"dtype: {name} is {info.dtype}, which is not floating")
        elif not _is_redundant(name, config):
            problems.append(f"unexpected: {name}, of shape {info.shape}")
    if missing or problems:
        kind = MissingTensorError if missing else CheckpointError
        raise kind(
            f"{checkpoint.path} does not hold the tensors of the {config} that its "
            "config describes:\n  " + "\n  ".join(missing + problems)
        )


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether older checkpoints hold a tensor that the config determines."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(".rotary_emb.inv_freq")


def _put(
    place: _Place,
    quant: QuantConfig | None,
    value: Any,
    tensor: np.ndarray | QuantizedArray,
    sharding: Any = None,
) -> Any:
    """The value of a variable with one more tensor in it."""
    if place.layer is None:
        if isinstance(tensor, QuantizedArray):
            return jax.device_put(tensor, sharding)
        tensor = tensor.T if place.is_kernel else tensor
        if sharding is None:
            return jnp.array(tensor, value.dtype)
        # From the host each device gets its own part.
        return jax.device_put(tensor.astype(value.dtype), sharding)
    quant = quant if isinstance(value, QuantizedArray) else None
    if sharding is None:
        value = jax.tree.map(_allocate, value)
    else:
        value = jax.tree.map(_allocate, value, sharding)
    value = _insert(value, tensor, np.int32(place.layer), quant, place.is_kernel)
    # Else the next tensor would be read while this one is still being encoded.
    return jax.block_until_ready(value)


def _allocate(
    leaf: Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None
) -> Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _insert(
    stack: Any,
    tensor: Float[Array, "*shape"] | QuantizedArray,
    layer: Int32[Array, ""],
    quant: QuantConfig | None,
    is_kernel: bool,
) -> Any:
    """Puts a tensor into its layer of a stack, in place."""
    if isinstance(tensor, QuantizedArray):
        encoded = tensor
    else:
        tensor = (tensor.T if is_kernel else tensor).astype(stack.dtype)
        encoded = tensor if quant is None else quant.quantize_kernel(tensor)
    return jax.tree.map(lambda all, one: all.at[layer].set(one), stack, encoded)
