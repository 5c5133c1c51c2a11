"""Where the arrays of a model lie on a mesh of devices."""

from jaxbnb.sharding._mesh import find_mesh, make_automatic, use_mesh
from jaxbnb.sharding.specs import Sharding, partition_specs

__all__ = [
    "Sharding",
    "find_mesh",
    "make_automatic",
    "partition_specs",
    "use_mesh",
]
