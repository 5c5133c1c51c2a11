"""outlier_columns: where the inputs of a model's linear layers have outliers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxbnb.nnx import _surgery
from jaxbnb.nnx._linear import QuantLinear
from jaxbnb_kernels import matmul_int8


def outlier_columns(
    model: nnx.Module, *args: Any, outlier_threshold: float = 6.0, **kwargs: Any
) -> dict[str, Bool[np.ndarray, "*stack in_features"]]:
    """The input columns of each linear layer in which ``model(*args)`` has outliers.

    LLM.int8 multiplies these apart, not in int8, so they tell what it costs and whether
    its threshold suits a model. The model is not changed; it may be quantised or not.

    Args:
        model: any NNX model with ``nnx.Linear`` or `jaxbnb.nnx.QuantLinear` layers.
        *args: of the call, inputs to look at.
        outlier_threshold: the magnitude from which on a column is an outlier.
        **kwargs: of the call.

    Returns:
        By dotted path, whether each column has an outlier in any row; with a leading
        axis for layers of a `LayerStack`.

    Raises:
        ValueError: the model has no linear layer, or the threshold is not a number
            from 0.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> x = jnp.array([[0.0, 1.0, -7.0, 2.0], [8.0, 0.0, 0.0, 5.9]])
        >>> columns = jaxbnb.nnx.outlier_columns(model, x)
        >>> {path: mask.nonzero()[0].tolist() for path, mask in columns.items()}
        {'layers.0': [0, 2]}
    """
    watched: dict[str, _Watched] = {}

    def new(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, nnx.Linear | QuantLinear):
            return None
        watched[path] = _Watched(module, outlier_threshold)
        return watched[path]

    model = nnx.clone(model)
    _surgery.replace_modules(model, new)
    if not watched:
        raise ValueError(f"{type(model).__name__} has no linear layers")

    @nnx.jit
    def call(model, args, kwargs):
        model(*args, **kwargs)

    call(model, args, kwargs)
    return {path: np.asarray(layer.columns[...]) for path, layer in watched.items()}


class _Watched(nnx.Module):
    """A linear layer, and the columns that had an outlier when it was called."""

    def __init__(self, linear: nnx.Linear | QuantLinear, outlier_threshold: float):
        *stack, in_features, _ = linear.kernel.get_value().shape
        self.linear = linear
        self.columns = nnx.Intermediate(jnp.zeros((*stack, in_features), jnp.bool_))
        self.outlier_threshold = outlier_threshold

    def __call__(
        self, inputs: Float[Array, "*batch in_features"]
    ) -> Float[Array, "*batch out_features"]:
        columns = matmul_int8.outlier_columns(inputs, self.outlier_threshold)
        self.columns[...] = self.columns[...] | columns
        return self.linear(inputs)
