"""The kernels of a model, and the names of a checkpoint's tensors for them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.core import QuantizedArray
from jaxbnb.models._load_plan import Model
from jaxbnb.models._places import Place, find_places
from jaxbnb.nnx import QuantParam
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax, quantize_absmax


def name_kernels(
    model: Model,
) -> dict[str, list[str]]:
    """Returns the names of the tensors that each linear layer holds, by its path.

    Example:
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
        >>> name_kernels(model)["model.layers.layer.mlp.up_proj"][1]
        'model.layers.1.mlp.up_proj.weight'
    """
    variables: dict[Any, nnx.Variable] = dict(nnx.to_flat_state(nnx.state(model)))
    names: dict[str, list[str]] = {}
    for name, places in find_places(variables, model.config).items():
        for place in places:
            if place.is_kernel:
                names.setdefault(".".join(place.path[:-1]), []).append(name)
    return names


def collect_quantized(
    model: Model,
) -> dict[str, QuantizedArray]:
    """Returns the quantised kernels, for `jaxbnb.convert.convert_checkpoint`.

    A tensor that holds several layers, such as q, k and v of Phi-3, is put together. If
    it is doubly quantised, its absmax are quantised again.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.nnx.quantize_model(model, "nf4")
        >>> collect_quantized(model)["model.layers.1.mlp.up_proj.weight"].shape
        (64, 128)
    """
    variables: dict[Any, nnx.Variable] = dict(nnx.to_flat_state(nnx.state(model)))
    kernels = {}
    for name, places in find_places(variables, model.config).items():
        if all(isinstance(variables[place.path], QuantParam) for place in places):
            parts = [variables[x.path].get_raw_value()[x.index] for x in places]
            kernels[name] = join_parts(places, parts)
    return kernels


def join_parts(places: list[Place], parts: list[QuantizedArray]) -> QuantizedArray:
    """Puts together the quantised kernel that `Place.part` takes apart.

    Raises:
        ValueError: the parts have several formats.
        NotImplementedError: the parts are in nvfp4, with several tensor scales.
    """
    rows = [place.rows for place in places if place.rows is not None]
    if not rows:
        return parts[0]
    formats = {(q.quant_type, q.block_size, q.double_quant) for q in parts}
    if len(formats) > 1:
        names = [".".join(place.path[:-1]) for place in places]
        raise ValueError(
            f"{', '.join(names)} share a tensor in files, which has one format; theirs "
            f"are {sorted(formats)}. Quantise them alike"
        )
    order = np.argsort(np.concatenate(rows))

    def join(arrays: list[Any]) -> Any:
        return jnp.concatenate(arrays, axis=-2)[..., order, :]

    codes = join([q.codes for q in parts])
    absmax = join([_decode_absmax(q) for q in parts])
    zeros = [q.zero_point for q in parts if q.zero_point is not None]
    nested_absmax, offset = parts[0].nested_absmax, None
    if parts[0].quant_type == "nvfp4" and any(
        bool(jnp.any(q.nested_absmax != nested_absmax)) for q in parts
    ):
        raise NotImplementedError(
            "layers that share a tensor in files were quantised to nvfp4 with a tensor "
            "scale each, and one tensor has one. Save them decoded, and quantise that "
            "folder with jaxbnb.convert.convert_checkpoint"
        )
    if parts[0].double_quant:
        absmax, nested_absmax, offset = quantize_absmax(absmax)
    return dataclasses.replace(
        parts[0],
        codes=codes,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        zero_point=join(zeros) if zeros else None,
    )


def _decode_absmax(q: QuantizedArray) -> Any:
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    return dequantize_absmax(q.absmax, q.nested_absmax, q.offset)
