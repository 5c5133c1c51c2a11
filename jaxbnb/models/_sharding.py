"""How a mesh divides the variables of a model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbnb.core import QuantizedArray
from jaxbnb.models._encoder_decoder_config import ModelConfig, get_layer_config
from jaxbnb.models._places import Place
from jaxbnb.sharding import Sharding, make_automatic
from jaxbnb.sharding.layout import check_heads
from jaxbnb.sharding.specs import (
    choose_layout,
    make_shardings,
    specs_of,
    use_preset,
)


def divide_variables(
    variables: Mapping[Any, Any],
    mesh: Mesh | None,
    sharding: Sharding,
    config: ModelConfig,
) -> dict[Any, Any]:
    """Returns the sharding of each variable, or a tree of shardings if it is quantised.

    Args:
        variables: abstract variables by path.
        mesh: the mesh; None returns an empty dict.
        sharding: see `load_pretrained`.
        config: sizes of the model.

    Raises:
        TypeError: see `jaxbnb.sharding.partition_specs`.
        ValueError: there is a sharding and no mesh, or it does not fit the mesh or the
            model.
    """
    if mesh is None:
        if sharding:
            raise ValueError(
                "sharding says how a mesh divides a model; give the mesh too"
            )
        return {}
    used: Mesh = use_preset(mesh, sharding) if isinstance(sharding, str) else mesh
    layout = choose_layout(used, sharding)
    if layout is not None:
        check_heads(get_layer_config(config), layout, used)
    values = {path: variable.get_value() for path, variable in variables.items()}
    # jit makes the values and must be free to move them, so the axes are automatic.
    return make_shardings(specs_of(values, used, sharding), make_automatic(used))


def make_layer_sharding(
    sharding: Any, place: Place, tensor: np.ndarray | QuantizedArray
) -> Any:
    """Returns a tensor's sharding that gives each device its own share of the stack.

    Args:
        sharding: sharding of the stack, or a tree of shardings if it is quantised.
        place: place of the tensor in the stack.
        tensor: result of `Place.part`; a kernel is ``(out, in)``.
    """

    def without_stack(stacked: NamedSharding) -> NamedSharding:
        spec = PartitionSpec(*stacked.spec[len(place.index) :])
        return NamedSharding(stacked.mesh, spec)

    if isinstance(tensor, QuantizedArray):
        return jax.tree.map(without_stack, sharding)
    if isinstance(sharding, QuantizedArray):
        # Codes of a kernel have the layout of its tensor.
        codes: Any = sharding.codes
        return without_stack(codes)
    single = without_stack(sharding)
    if place.is_kernel:
        *batch, fan_in, fan_out = single.spec
        return NamedSharding(single.mesh, PartitionSpec(*batch, fan_out, fan_in))
    return single
