"""outlier_columns: finds the outliers in the inputs of a model's linear layers."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxbnb.nnx import surgery
from jaxbnb.nnx._linear import QuantLinear
from jaxbnb_kernels import matmul_int8


def outlier_columns(
    model: nnx.Module, *args: Any, outlier_threshold: float = 6.0, **kwargs: Any
) -> dict[str, Bool[np.ndarray, "*stack in_features"]]:
    """Finds the input columns of each linear layer that have outliers in a call.

    LLM.int8 multiplies these columns separately, not in int8. So they tell what it
    costs, and whether its threshold suits a model. The call is ``model(*args)``. The
    model may be quantised or not, and it is not changed.

    Args:
        model: any NNX model with ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear` layers.
        *args: inputs of the call.
        outlier_threshold: smallest magnitude of an outlier.
        **kwargs: keyword arguments of the call.

    Returns:
        For each layer, by dotted path, whether each column has an outlier in any row;
        with a leading axis for the layers of a `LayerStack`.

    Raises:
        TypeError: ``model`` is not an ``nnx.Module``.
        ValueError: the model has no linear layer, or the threshold is not a
            non-negative number.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> x = jnp.array([[0.0, 1.0, -7.0, 2.0], [8.0, 0.0, 0.0, 5.9]])
        >>> columns = jaxbnb.nnx.outlier_columns(model, x)
        >>> {path: mask.nonzero()[0].tolist() for path, mask in columns.items()}
        {'layers.0': [0, 2]}
    """
    surgery.check_model(model, "outlier_columns")
    watched: dict[str, Any] = {}

    def watch(path: str, module: nnx.Module) -> None:
        if isinstance(module, nnx.Linear | QuantLinear):
            *stack, in_features, _ = module.kernel.get_value().shape
            watched[path] = module
            # Still an instance of its class, because other layers may read its kernel.
            watched[path].__class__ = _watched_class(type(module))
            watched[path].outlier_threshold = outlier_threshold
            watched[path].columns = nnx.Intermediate(
                jnp.zeros((*stack, in_features), jnp.bool_)
            )

    model = nnx.clone(model)
    surgery.replace_modules(model, watch)
    if not watched:
        raise ValueError(f"{type(model).__name__} has no linear layers")

    @nnx.jit
    def call(model, args, kwargs):
        model(*args, **kwargs)

    call(model, args, kwargs)
    return {path: np.asarray(layer.columns[...]) for path, layer in watched.items()}


@functools.cache
def _watched_class(kind: Any) -> Any:
    """Derives a linear layer that records columns with outliers when it is called."""

    class Watched(kind):
        def __call__(
            self, inputs: Float[Array, "*batch in_features"], *args: Any, **kwargs: Any
        ) -> Float[Array, "*batch out_features"]:
            columns = matmul_int8.outlier_columns(inputs, self.outlier_threshold)
            self.columns[...] = self.columns[...] | columns
            return super().__call__(inputs, *args, **kwargs)

    return Watched
