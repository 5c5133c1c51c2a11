"""Where the arrays of a model lie on a mesh of devices."""

from jaxbnb.sharding._mesh import place_like, place_rest, shard_model, use_mesh
from jaxbnb.sharding._table import device_bytes, propose_mesh, sharding_table
from jaxbnb.sharding.axis_types import find_mesh, make_automatic
from jaxbnb.sharding.specs import Sharding, partition_specs

__all__ = [
    "Sharding",
    "device_bytes",
    "find_mesh",
    "make_automatic",
    "partition_specs",
    "place_like",
    "place_rest",
    "propose_mesh",
    "shard_model",
    "sharding_table",
    "use_mesh",
]
