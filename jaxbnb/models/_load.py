"""load_pretrained: a model from a checkpoint, one tensor at a time."""

import dataclasses
import functools
import os
import re
import types
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
from jaxbnb.models._causal_lm import CausalLM
from jaxbnb.models._config import DecoderConfig
from jaxbnb.models._names import num_stacks, split_module, torch_name
from jaxbnb.models.families import FAMILIES, Family
from jaxbnb.nnx import quantize_model

_FLOATS: Final = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> CausalLM:
    """Loads a model from a Hugging Face folder, or a Llama from a GGUF file.

    The ``model_type`` of ``config.json`` is one of gemma2, gemma3, gemma3_text, gpt2,
    gpt_neox, llama, mistral, mixtral, opt, phi3, qwen2, qwen3 and smollm3. Tensors that
    hold several linear layers, as q, k and v of Phi-3, become those layers.

    Tensors are read, cast to ``dtype``, quantised and put in their place one by one:
    beside the model that is returned, the device holds one tensor unquantised, and the
    host no more than two. The model equals, bit for bit, the one loaded without
    ``quant`` and then quantised by `jaxbnb.nnx.quantize_model`.

    Args:
        path: a folder with ``config.json`` and safetensors, or a GGUF file.
        quant: format of the decoder's linear layers: a ``quant_type`` such as "nf4", or
            a `jaxbnb.QuantConfig`; None to quantise nothing. The embedding and the
            output head stay as they are.
        dtype: of what is not quantised, and of the computation; None for the
            checkpoint's own, float32 if it mixes several.

    Returns:
        The model, on the default device.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        MissingTensorError: the checkpoint lacks tensors of the model.
        CheckpointError: tensors have another shape than in the model, or are unknown to
            it. Either way the message lists all that is wrong.
        NotImplementedError: the checkpoint is of a model that jaxbnb does not have.
        TypeError: ``dtype`` is not a floating dtype.

    Example:
        >>> model = load_pretrained("SmolLM2-135M", quant="nf4")  # doctest: +SKIP
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape  # doctest: +SKIP
        (30, 576, 1536)
    """
    if isinstance(quant, str):
        quant = QuantConfig(quant)
    checkpoint = open_checkpoint(path)
    config = _config(checkpoint)
    checkpoint = _with_full_names(checkpoint, FAMILIES[config.model_type])
    if dtype is None:
        dtype = _common_dtype(checkpoint, config)
    elif not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be floating, e.g. bfloat16, got {jnp.dtype(dtype)}; quant= "
            "makes the weights smaller"
        )
    abstract = nnx.eval_shape(lambda: _make(config, quant, dtype))
    graphdef, state = nnx.split(abstract)
    variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
    places = _places(variables, config)
    _check(checkpoint, config, places)
    for name in checkpoint.tensors:
        if name not in places:
            continue
        tensor = checkpoint.read(name)
        for place in places[name]:
            value = variables[place.path].get_value()
            value = _put(place, quant, value, place.part(tensor))
            variables[place.path] = variables[place.path].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(list(variables.items())))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor, or a part of it, goes.

    Attributes:
        path: of the variable.
        index: in the stack: of the layer and, in it, of the expert.
        shape: of the tensor.
        is_kernel: whether the tensor is to be transposed.
        is_flipped: whether it is transposed in the file already.
        rows: which rows of it go there; None for all.
    """

    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    is_kernel: bool
    is_flipped: bool
    rows: np.ndarray | None

    def part(self, tensor: np.ndarray) -> np.ndarray:
        """What goes there, a kernel as ``(out, in)``."""
        tensor = tensor.T if self.is_flipped else tensor
        return tensor if self.rows is None else tensor[self.rows]


def _config(checkpoint: Checkpoint) -> DecoderConfig:
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path} is quantised already, as its quantization_config says; "
            "load the checkpoint it was made from, with quant= to quantise it"
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
        if not _is_redundant(name, config)
    }
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {*_FLOATS} else _FLOATS[0]


def _make(
    config: DecoderConfig, quant: QuantConfig | None, dtype: jax.typing.DTypeLike
) -> CausalLM:
    model = CausalLM(config, param_dtype=dtype, rngs=nnx.Rngs(0))
    if quant is not None:
        quantize_model(model, quant)
    return model


def _with_full_names(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with the names that transformers' whole model would have."""

    def full(name: str) -> str:
        for start, instead in family.renamed.items():
            name = re.sub("^" + start, instead, name)
        return name

    names = {full(name): name for name in checkpoint.tensors}
    if not any(name.startswith(family.prefix) for name in names):
        head = torch_name(("lm_head", "kernel"), (), family)
        names = {n if n == head else family.prefix + n: s for n, s in names.items()}
    if all(name == stored for name, stored in names.items()):
        return checkpoint
    tensors = {name: checkpoint.tensors[stored] for name, stored in names.items()}
    return dataclasses.replace(
        checkpoint,
        tensors=types.MappingProxyType(tensors),
        reader=lambda name: checkpoint.reader(names[name]),
    )


def _places(
    variables: dict[tuple[str, ...], nnx.Variable], config: DecoderConfig
) -> dict[str, list[_Place]]:
    """Where each tensor that the model needs goes, by name."""
    family = FAMILIES[config.model_type]
    places: dict[str, list[_Place]] = {}
    for path, variable in variables.items():
        shape, stacks = variable.get_value().shape, num_stacks(path)
        stack, shape = shape[:stacks], shape[stacks:]
        is_kernel = path[-1] == "kernel"
        shape = shape[::-1] if is_kernel else shape
        fused, rows = family.rows(split_module(path)[1], config), None
        if fused is not None:
            rows, total = fused
            shape = (total, *shape[1:])
        is_flipped = is_kernel and bool(stacks) and not family.transposed
        shape = shape[::-1] if is_flipped else shape
        for index in np.ndindex(stack):
            place = _Place(path, index, shape, is_kernel, is_flipped, rows)
            places.setdefault(torch_name(path, index, family), []).append(place)
    return places


def _check(
    checkpoint: Checkpoint, config: DecoderConfig, places: dict[str, list[_Place]]
) -> None:
    """Raises one error for all that is wrong with the tensors of a checkpoint."""
    tensors = checkpoint.tensors
    missing = [f"missing: {name}" for name in places if name not in tensors]
    problems = []
    for name, info in tensors.items():
        if name in places:
            if info.shape != places[name][0].shape:
                want = places[name][0].shape
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


def _is_redundant(name: str, config: DecoderConfig) -> bool:
    """Whether older checkpoints hold a tensor that the config determines."""
    family = FAMILIES[config.model_type]
    head = torch_name(("lm_head", "kernel"), (), family)
    tied_head = config.tie_word_embeddings and name == head
    return tied_head or re.fullmatch(family.ignored, name) is not None


def _put(
    place: _Place, quant: QuantConfig | None, value: Any, tensor: np.ndarray
) -> Any:
    """The value of a variable with one more tensor in it."""
    if not place.index:
        return jnp.array(tensor.T if place.is_kernel else tensor, value.dtype)
    quant = quant if isinstance(value, QuantizedArray) else None
    value = jax.tree.map(_allocate, value)
    value = _insert(
        value, tensor, tuple(map(np.int32, place.index)), quant, place.is_kernel
    )
    # Else the next tensor would be read while this one is still being encoded.
    return jax.block_until_ready(value)


def _allocate(leaf: Array | jax.ShapeDtypeStruct) -> Array:
    is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if is_abstract else leaf


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _insert(
    stack: Any,
    tensor: Float[Array, "*shape"],
    index: tuple[Int32[Array, ""], ...],
    quant: QuantConfig | None,
    is_kernel: bool,
) -> Any:
    """Puts a tensor into its place in a stack, in place."""
    tensor = (tensor.T if is_kernel else tensor).astype(stack.dtype)
    encoded = tensor if quant is None else quant.quantize_kernel(tensor)
    return jax.tree.map(lambda all, one: all.at[index].set(one), stack, encoded)
