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
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxbnb.convert import (
    Checkpoint,
    CheckpointError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.config import as_config
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._places import (
    Place,
    check_count,
    check_tensors,
    find_places,
    is_redundant,
    with_full_names,
)
from jaxbnb.models._sharding import ShardingRule, layer_sharding, shardings
from jaxbnb.models._stored import read_as, stored_formats
from jaxbnb.models._tied import as_stored
from jaxbnb.models.families import FAMILIES
from jaxbnb.models.flax_folder import (
    is_flax_folder,
    read_fields,
    restore_state,
)
from jaxbnb.nnx import quantize_model
from jaxbnb_kernels.quantize_blockwise import quantize_absmax

_FLOATS: Final = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Sequence[ShardingRule] = (),
) -> CausalLM:
    """Loads a model from a Hugging Face folder or a GGUF file.

    The ``model_type`` of ``config.json`` is one of gemma2, gemma3, gemma3_text, gpt2,
    gpt_neox, llama, mistral, mixtral, opt, phi3, qwen2, qwen3 and smollm3. Tensors that
    hold several linear layers, as q, k and v of Phi-3, become those layers.

    A model whose head is its embedding (``tie_word_embeddings``) may store either or
    both. If they differ, the model gets both, with a warning, as in transformers 5.

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
        device holds its share of one tensor.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        MissingTensorError: the checkpoint lacks tensors of the model.
        CheckpointError: tensors have another shape than in the model, or are unknown to
            it. Either way the message lists all that is wrong.
        NotImplementedError: the checkpoint is of a model that jaxbnb does not have.
        TypeError: ``dtype`` is not a floating dtype, or ``rules`` are not pairs.
        ValueError: a ``quant`` for what is quantised already, or rules that do not fit
            the mesh or the model.

    Example:
        >>> model = load_pretrained("SmolLM2-135M", quant="nf4")  # doctest: +SKIP
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape  # doctest: +SKIP
        (30, 576, 1536)
    """
    if is_flax_folder(path):
        return _restore(Path(path), quant, dtype, mesh, rules)
    plan = prepare(path, quant, dtype)
    placed = shardings(plan.variables, mesh, rules)
    for name in plan.checkpoint.tensors:
        if name not in plan.places:
            continue
        where = plan.places[name]
        # A tensor that several variables hold parts of is read once.
        tensor = read_as(plan.checkpoint, name, plan.variables[where[0].path])
        for place in where:
            variable = plan.variables[place.path]
            value = _put(
                place,
                plan.quant,
                variable.get_value(),
                place.part(tensor),
                placed.get(place.path),
            )
            plan.variables[place.path] = variable.replace(value)
    return merge(plan.graphdef, plan.variables)


def check_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Raises what `load_pretrained` would, without reading any weights.

    There is one exception: if a tied checkpoint stores both its embedding and a head,
    these two are read to compare them.

    Args:
        path: as of `load_pretrained`; so are the others.
        quant: format of the linear layers.
        dtype: of what is not quantised.

    Example:
        >>> check_pretrained("SmolLM2-135M")  # doctest: +SKIP
    """
    if is_flax_folder(path):
        _abstract(Path(path), quant, dtype)
    else:
        prepare(path, quant, dtype)


def abstract_pretrained(folder: str | os.PathLike[str]) -> CausalLM:
    """The model that `convert_to_flax` wrote to a folder, without its values.

    Args:
        folder: that `load_pretrained` restores.

    Raises:
        CheckpointError: the folder is damaged.

    Example:
        >>> model = abstract_pretrained("SmolLM2-135M-flax")  # doctest: +SKIP
        >>> print(jaxbnb.summary(model))  # doctest: +SKIP
    """
    return _abstract(Path(folder), None, None)


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """A model without values, and where each tensor of a checkpoint goes in it."""

    checkpoint: Checkpoint
    config: DecoderConfig
    quant: QuantConfig | None
    graphdef: Any
    variables: dict[Any, Any]
    places: dict[str, list[Place]]


def prepare(
    path: str | os.PathLike[str],
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
) -> LoadPlan:
    """What `load_pretrained` will do, before it reads any weights; raises as it."""
    quant = None if quant is None else as_config(quant)
    checkpoint = open_checkpoint(path)
    config = _config(checkpoint)
    checkpoint = with_full_names(checkpoint, FAMILIES[config.model_type])
    check_count(checkpoint, config)
    checkpoint = as_stored(checkpoint, config)
    config = _config(checkpoint)
    dtype = jnp.dtype(_checked_dtype(dtype) or _common_dtype(checkpoint, config))
    formats: dict[str, QuantConfig] = {}
    variables: dict[Any, Any]
    if checkpoint.quantized:
        abstract = nnx.eval_shape(lambda: _make(config, None, dtype, {}))
        variables = dict(nnx.to_flat_state(nnx.state(abstract)))
        names: dict[Any, list[str]] = {}
        for name, where in find_places(variables, config).items():
            for place in where:
                names.setdefault(place.path, []).append(name)
        formats = stored_formats(checkpoint, quant, names)
    abstract = nnx.eval_shape(lambda: _make(config, quant, dtype, formats))
    graphdef, state = nnx.split(abstract)
    variables = dict(nnx.to_flat_state(state))
    places = find_places(variables, config)
    check_tensors(checkpoint, config, places)
    return LoadPlan(checkpoint, config, quant, graphdef, variables, places)


def _checked_dtype(dtype: jax.typing.DTypeLike | None) -> jax.typing.DTypeLike | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be floating, e.g. bfloat16, got {jnp.dtype(dtype)}; quant= "
            "makes the weights smaller"
        )
    return dtype


def merge(graphdef: Any, variables: dict[Any, Any]) -> CausalLM:
    """The model of these variables, by path."""
    return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))


def _restore(
    folder: Path,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
    mesh: jax.sharding.Mesh | None,
    rules: Sequence[ShardingRule],
) -> CausalLM:
    """The model that `convert_to_flax` wrote."""
    graphdef, state = nnx.split(_abstract(folder, quant, dtype))
    variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
    values = restore_state(
        folder,
        {path: variable.get_value() for path, variable in variables.items()},
        shardings(variables, mesh, rules),
    )
    for path, value in values.items():
        variables[path] = variables[path].replace(value)
    return merge(graphdef, variables)


def _abstract(
    folder: Path,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
) -> CausalLM:
    if quant is not None or dtype is not None:
        raise ValueError(
            f"{folder} holds a model's state, whose formats and dtype are what they "
            "are; leave out quant and dtype"
        )
    fields, stored_dtype, formats = read_fields(folder)
    config = DecoderConfig.from_huggingface(fields)
    return nnx.eval_shape(lambda: _make(config, None, stored_dtype, formats))


def _config(checkpoint: Checkpoint) -> DecoderConfig:
    if checkpoint.config.get("quantization_config") and not checkpoint.quantized:
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised already, as its quantization_config says; "
            "load the checkpoint it was made from, with quant= to quantise it"
        )
    if not checkpoint.config and checkpoint.path.is_file():
        raise CheckpointError(
            f"{checkpoint.path} is a file of weights, and no config.json says of which "
            f"model; give the folder that holds both, e.g. {checkpoint.path.parent}"
        )
    try:
        return DecoderConfig.from_huggingface(checkpoint.config)
    except (NotImplementedError, ValueError) as error:
        error.add_note(f"This is the config of {checkpoint.path}.")
        raise


def _common_dtype(checkpoint: Checkpoint, config: DecoderConfig) -> np.dtype:
    dtypes = {
        info.dtype
        for name, info in checkpoint.tensors.items()
        if not is_redundant(name, config)
    }
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {*_FLOATS} else _FLOATS[0]


def _make(
    config: DecoderConfig,
    quant: QuantConfig | None,
    dtype: jax.typing.DTypeLike,
    formats: Mapping[str, QuantConfig],
) -> CausalLM:
    """A model whose linear layers have one format, or each its own, or none."""
    model = CausalLM(config, param_dtype=dtype, rngs=nnx.Rngs(0))
    if quant is not None:
        quantize_model(model, quant)
    if formats:
        rules = [([path], chosen) for path, chosen in formats.items()]
        quantize_model(model, rules=rules, skip=".*")
    return model


def _put(
    place: Place,
    quant: QuantConfig | None,
    value: Any,
    tensor: np.ndarray | QuantizedArray,
    sharding: Any = None,
) -> Any:
    """The value of a variable with one more tensor in it."""
    if not place.index:
        if isinstance(tensor, QuantizedArray):
            return jax.device_put(tensor, sharding)
        tensor = tensor.T if place.is_kernel else tensor
        if sharding is None:
            return jnp.array(tensor, value.dtype)
        # From the host each device gets its own part.
        return jax.device_put(tensor.astype(value.dtype), sharding)
    quant = quant if isinstance(value, QuantizedArray) else None
    layer: Any = tensor
    everywhere = None
    if sharding is None:
        value = jax.tree.map(_allocate, value)
    else:
        value = jax.tree.map(_allocate, value, sharding)
        # From the host each device gets its own part, which it quantises.
        layer = jax.device_put(tensor, layer_sharding(sharding, place, tensor))
        mesh = jax.tree.leaves(sharding)[0].mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
    index = tuple(map(np.int32, place.index))
    value = _insert(value, layer, index, quant, place.is_kernel, everywhere)
    if sharding is not None:
        # Where the compiler has chosen otherwise.
        value = jax.device_put(value, sharding)
    # Else the next tensor would be read while this one is still being encoded.
    return jax.block_until_ready(value)


def _allocate(
    leaf: Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None = None
) -> Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _insert(
    stack: Any,
    tensor: Float[Array, "*shape"] | QuantizedArray,
    index: tuple[Int32[Array, ""], ...],
    quant: QuantConfig | None,
    is_kernel: bool,
    everywhere: NamedSharding | None,
) -> Any:
    """Puts a tensor into its place in a stack, in place."""
    if isinstance(tensor, QuantizedArray):
        encoded = tensor
    else:
        tensor = (tensor.T if is_kernel else tensor).astype(stack.dtype)
        encoded = tensor if quant is None else _encode(tensor, quant, everywhere)
    return jax.tree.map(lambda all, one: all.at[index].set(one), stack, encoded)


def _encode(
    kernel: Float[Array, "fan_in fan_out"],
    quant: QuantConfig,
    everywhere: NamedSharding | None,
) -> QuantizedArray:
    """Quantises a kernel; on a mesh, where ``everywhere`` is all of it, bit for bit."""
    if everywhere is None or not quant.double_quant:
        return quant.quantize_kernel(kernel)
    single = dataclasses.replace(quant, double_quant=False)
    q = single.quantize_kernel(kernel)
    # Divided, their mean would be a sum of the devices' sums, which rounds otherwise.
    absmax = jax.lax.with_sharding_constraint(q.absmax, everywhere)
    nested = jax.lax.with_sharding_constraint(quantize_absmax(absmax), everywhere)
    absmax, nested_absmax, offset = nested
    return dataclasses.replace(
        q, absmax=absmax, nested_absmax=nested_absmax, offset=offset
    )
