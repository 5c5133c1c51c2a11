"""load_pretrained: a model from a checkpoint, one tensor at a time."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbnb.convert import find_checkpoint
from jaxbnb.core import QuantConfig
from jaxbnb.models._encoder_decoder_config import read_model_config
from jaxbnb.models._insert import count_nbytes, insert_tensor
from jaxbnb.models._load_plan import make_model, merge, prepare
from jaxbnb.models._sharding import divide_variables
from jaxbnb.models._stored import (
    STORED,
    explain_unquantized,
    read_as,
    warn_of_decoded,
)
from jaxbnb.models.flax_folder import is_flax_folder, read_fields, restore_state
from jaxbnb.sharding import Sharding, find_mesh
from jaxbnb.sharding.axis_types import (
    change_mesh,
    follow_context,
    without_explicit,
)


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sharding: Sharding = None,
    rules: Sequence[tuple[Any, Any]] = (),
    revision: str | None = None,
    on_read: Callable[[str, int], object] | None = None,
) -> Any:
    """Loads a model from a Hugging Face folder, a GGUF file, or by name.

    The ``model_type`` of ``config.json`` must be one that jaxbnb has: the page "Which
    models work" has a table, and an error lists them. A tensor that holds several
    linear layers, such as q, k and v of Phi-3, becomes those layers.

    If the embedding is also the head (``tie_word_embeddings``), a checkpoint may store
    either or both. If both are stored and differ, the model gets both, with a warning,
    as in transformers 5.

    A checkpoint that bitsandbytes, GPTQ, AWQ, compressed-tensors or torchao quantised,
    or that is in DeepSeek's fp8 or in MXFP4, is loaded as it is stored. Weights
    that no format of ours holds exactly, such as GPTQ's after act-order, are decoded,
    with a warning. Only these can be quantised with ``quant``. Weights of a GGUF file
    are decoded, unless ``quant`` is "stored".

    Tensors are read, cast to ``dtype``, quantised and put in place one by one. Besides
    the model itself, the device holds one tensor unquantised, and the host at most two.
    The model equals, bit for bit, the one loaded without ``quant`` and then quantised
    by `jaxbnb.nnx.quantize_model`.

    Args:
        path: a folder with ``config.json`` and safetensors (or pytorch_model.bin), a
            GGUF file, or a folder that `convert_to_flax` wrote. If there is none of
            that name, the name of a model on Hugging Face's hub, such as "org/name"; it
            is downloaded, see `jaxbnb.convert.find_checkpoint`.
        quant: format of the linear layers: a ``quant_type`` such as "nf4", or
            a `jaxbnb.QuantConfig`; None to quantise nothing. The embedding and the
            output head are not quantised. "stored" for the format of the file: linear
            layers of a GGUF file in Q8_0, Q4_0 and MXFP4 are then kept as they are. It
            changes nothing for other quantised checkpoints and for folders of
            `convert_to_flax`.
        dtype: dtype of the computation and of everything that is not quantised; None
            for the checkpoint's dtype, or float32 if it mixes several.
        mesh: devices to divide the model over; None for the default device. The axes
            of the model's arrays are automatic, even if those of the mesh are explicit,
            unless it is the mesh of the context (``jax.set_mesh``).
        sharding: how the mesh divides the model: "fsdp", "tensor", "fsdp+tensor", a
            mapping from logical axes to mesh axes, or ``(names, spec)`` pairs; see
            `jaxbnb.sharding`. None divides along the mesh axes that are called fsdp,
            tensor and expert, if there are any. In a pair, ``names`` are whole dotted
            paths or their last parts, such as ["up_proj.kernel"], or one regular
            expression. ``spec`` is a ``PartitionSpec`` for the array of a single layer,
            ``(in, out)`` for a kernel, or for the stack, ``(experts, in, out)``. The
            first pair that names a variable decides. A variable without one is copied
            to every device.
        rules: pairs as for ``sharding``, instead of it.
        revision: branch, tag or commit of a model on the hub; None for its main branch.
        on_read: called as ``on_read(name, nbytes)`` after each tensor, with the bytes
            of it that this process used. Under `jax.distributed`, a process reads only
            the parts of safetensors that its own devices need; weights that are stored
            quantised are read whole. It is not called for a folder of
            `convert_to_flax`, which Orbax restores in parts too.

    Returns:
        A `CausalLM`, which is a `VisionLM` for smolvlm; an `EncoderDecoderLM` for mt5,
        t5 and whisper; or an `EncoderModel` for bert, deit, roberta, vit and
        xlm-roberta. It is on the default device or the mesh. Besides its share of the
        model, each device holds its share of one tensor while loading.

    Raises:
        FileNotFoundError: there is nothing at ``path``, and no model of that name could
            be downloaded.
        ImportError: the model must be downloaded, and huggingface_hub is not installed.
        MissingTensorError: the checkpoint lacks tensors of the model.
        CheckpointError: tensors have other shapes than in the model, or do not belong
            to it. Either way, the message lists everything that is wrong.
        NotImplementedError: jaxbnb does not have this kind of model.
        TypeError: ``dtype`` is not a floating dtype, ``sharding`` none of the above, or
            both ``sharding`` and ``rules`` are given.
        ValueError: ``quant`` is a format and the checkpoint already quantised, or
            "stored" and the checkpoint is not; or ``sharding`` does not fit the mesh or
            the model, or has no mesh.

    Example:
        >>> model = load_pretrained("SmolLM2-135M", quant="nf4")  # doctest: +SKIP
        >>> model.model.layers.layer.mlp.up_proj.kernel.shape  # doctest: +SKIP
        (30, 576, 1536)
    """
    if rules:
        if sharding is not None:
            raise TypeError("rules are a kind of sharding: give one of the two")
        sharding = rules
    with without_explicit():
        if is_flax_folder(path):
            model = _restore(Path(path), quant, dtype, mesh, sharding)
        else:
            model = _read(path, revision, quant, dtype, mesh, sharding, on_read)
    found = find_mesh(model)
    if found is not None:
        state = nnx.state(model)
        nnx.update(model, change_mesh(state, follow_context(found)))
    return model


def _read(
    path: str | os.PathLike[str],
    revision: str | None,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
    mesh: jax.sharding.Mesh | None,
    sharding: Sharding,
    on_read: Callable[[str, int], object] | None,
) -> Any:
    """Reads a checkpoint."""
    plan = prepare(find_checkpoint(path, revision=revision), quant, dtype)
    placed = divide_variables(plan.variables, mesh, sharding, plan.config)
    warn_of_decoded(plan.checkpoint, plan.decoded)
    for name in plan.checkpoint.tensors:
        if name not in plan.places:
            continue
        where = plan.places[name]
        # Several variables may hold parts of a tensor. It is read once.
        # A process takes only what its devices need from the file.
        tensor = read_as(
            plan.checkpoint,
            name,
            plan.variables[where[0].path],
            is_mapped=mesh is not None and jax.process_count() > 1,
        )
        nbytes = 0
        for place in where:
            variable, part = plan.variables[place.path], place.part(tensor)
            divided = placed.get(place.path)
            nbytes += count_nbytes(place, part, divided)
            value = insert_tensor(
                place, plan.quant, variable.get_value(), part, divided
            )
            plan.variables[place.path] = variable.replace(value)
        if on_read is not None:
            on_read(name, nbytes)
    return merge(plan.graphdef, plan.variables)


def check_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Raises the errors that `load_pretrained` would, without reading any weights.

    With one exception: if a tied checkpoint stores both its embedding and a head, these
    two are read, to compare them.

    Args:
        path: see `load_pretrained`, also for the others.
        quant: format of the linear layers.
        dtype: dtype of everything that is not quantised.

    Example:
        >>> check_pretrained("SmolLM2-135M")  # doctest: +SKIP
    """
    abstract_pretrained(path, quant=quant, dtype=dtype)


def abstract_pretrained(
    path: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """Returns the model that `load_pretrained` would, without its values.

    It raises the same errors, and reads no weights, as `check_pretrained`.

    Args:
        path: see `load_pretrained`; there must be something there.
        quant: format of the linear layers.
        dtype: dtype of everything that is not quantised.

    Example:
        >>> model = abstract_pretrained("SmolLM2-135M")  # doctest: +SKIP
        >>> print(jaxbnb.summary(model))  # doctest: +SKIP
    """
    if is_flax_folder(path):
        return _make_abstract(Path(path), quant, dtype)
    plan = prepare(path, quant, dtype)
    return merge(plan.graphdef, plan.variables)


def _restore(
    folder: Path,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
    mesh: jax.sharding.Mesh | None,
    sharding: Sharding,
) -> Any:
    """Restores a model that `convert_to_flax` wrote."""
    model = _make_abstract(folder, quant, dtype)
    graphdef, state = nnx.split(model)
    variables: dict[Any, Any] = dict(nnx.to_flat_state(state))
    values = restore_state(
        folder,
        {path: variable.get_value() for path, variable in variables.items()},
        divide_variables(variables, mesh, sharding, model.config),
    )
    for path, value in values.items():
        variables[path] = variables[path].replace(value)
    return merge(graphdef, variables)


def _make_abstract(
    folder: Path,
    quant: QuantConfig | str | None,
    dtype: jax.typing.DTypeLike | None,
) -> Any:
    fields, stored_dtype, formats = read_fields(folder)
    is_dtype_other = dtype is not None and jnp.dtype(dtype) != jnp.dtype(stored_dtype)
    if quant not in (None, STORED) or is_dtype_other:
        raise ValueError(
            f"{folder} holds a model's state, and its formats and dtype are fixed; "
            f"leave out quant and dtype, or give {STORED!r} and {stored_dtype!r}"
        )
    if quant == STORED and not formats:
        raise ValueError(explain_unquantized(folder))
    config = read_model_config(fields)
    return nnx.eval_shape(lambda: make_model(config, None, stored_dtype, formats))
