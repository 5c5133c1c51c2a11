"""outlier_columns: finds outliers in the inputs of a Linen model's linear layers."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool

from jaxbnb.linen._intercept import use_quantized
from jaxbnb.linen.calls import Tree, check_linen, find_product, split_arrays
from jaxbnb_kernels import matmul_int8

# Stored next to each kernel while the model runs: its index in a stack of layers.
_INDEX = "outlier_columns_index"


class _Layer(NamedTuple):
    """The layers of one path.

    Attributes:
        stack: sizes of the axes that ``nn.scan`` and ``nn.vmap`` stack them along.
        columns: whether each column had an outlier, ``(layers, *batch, fan_in)``.
    """

    stack: tuple[int, ...]
    columns: Bool[np.ndarray, "layers *columns"]


def outlier_columns(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    outlier_threshold: float = 6.0,
    **kwargs: Any,
) -> dict[str, Bool[np.ndarray, "*stack fan_in"]]:
    """Finds the input columns of each linear layer that have outliers in a call.

    LLM.int8 multiplies these columns separately, not in int8; see
    `jaxbnb.nnx.outlier_columns`. The call is
    ``model.apply(variables, *args, **kwargs)``. The layers are those that
    `quantize_params` knows, and `jaxbnb.QuantDense` and `QuantDenseGeneral`, also under
    ``nn.scan``, ``nn.remat`` and ``nn.vmap``. Weights may be quantised or not. Call
    this function outside of `use_quantized`. From JAX 0.12 on, ``nn.scan`` needs
    ``check_constancy_invariants=False``: it takes the report for a data dependency.

    Args:
        model: Linen module, unbound.
        variables: variables of the model.
        *args: inputs of the call.
        outlier_threshold: smallest magnitude of an outlier.
        **kwargs: keyword arguments of the call and of ``apply``: ``method``, ``rngs``,
            ``mutable``.

    Returns:
        For each layer, by dotted path, whether each column has an outlier in any row.
        The axes that the layer sums over are flattened to one, as in its quantised
        kernel. Before it come the axes of layers stacked along axis 0, and the batch
        axes of a kernel.

    Raises:
        TypeError: ``model`` is not a Linen module.
        ValueError: the call does not reach a linear layer, or reaches one that is
            stacked along another axis than the first; or the threshold is not a
            non-negative number.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbnb
        >>> model = nn.Sequential([nn.Dense(2), nn.relu])
        >>> x = jnp.array([[0.0, 1.0, -7.0, 2.0], [8.0, 0.0, 0.0, 5.9]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> columns = jaxbnb.linen.outlier_columns(model, variables, x)
        >>> {path: mask.nonzero()[0].tolist() for path, mask in columns.items()}
        {'layers_0': [0, 2]}
    """
    check_linen(model, variables, "outlier_columns")
    apply, arrays = split_arrays(model.apply, args, kwargs)
    flat = flatten_dict(unfreeze(variables))
    layers: dict[str, _Layer] = {}
    places: dict[tuple[str, ...], np.ndarray] = {}

    def inspect_call(context, args, kwargs):
        """Returns collection, layer and columns for a linear layer, None for others."""
        find, layer = find_product(context), context.module
        names = [n for n in _COLLECTIONS if layer.has_variable(n, "kernel")]
        if find is None or not names:
            return None
        product, inputs = find(layer, *args, **kwargs)
        columns = functools.partial(
            matmul_int8.outlier_columns, outlier_threshold=outlier_threshold
        )
        for _ in product.batch:
            columns = jax.vmap(columns)
        return names[0], layer, columns(product.rows(inputs))

    def find(next_fun, args, kwargs, context):
        if (found := inspect_call(context, args, kwargs)) is not None:
            name, layer, columns = found
            key = (name, *layer.path)
            inner = meta.unbox(layer.get_variable(name, "kernel")).shape
            outer = meta.unbox(flat[*key, "kernel"]).shape
            stack = outer[: len(outer) - len(inner)]
            if (*stack, *inner) != outer:
                raise ValueError(
                    f"{'.'.join(layer.path)} is stacked along another axis than the "
                    f"first: a kernel of {outer} is {inner} in a layer"
                )
            count = math.prod(stack)
            layers[".".join(layer.path)] = _Layer(
                stack, np.zeros((count, *columns.shape), np.bool_)
            )
            places[*key, _INDEX] = np.arange(count, dtype=np.int32).reshape(stack)
        return next_fun(*args, **kwargs)

    def write(path, index, columns):
        layers[path].columns[index] |= columns

    def record(next_fun, args, kwargs, context):
        if (found := inspect_call(context, args, kwargs)) is not None:
            name, layer, columns = found
            # Only a callback gets values out of every transform: nn.scan drops what a
            # layer sows, unless it names the collection.
            jax.debug.callback(
                functools.partial(write, ".".join(layer.path)),
                layer.get_variable(name, _INDEX),
                columns,
            )
        return next_fun(*args, **kwargs)

    def call(interceptor, variables, arrays):
        # The outer interceptor is called first, so it sees quantised layers too.
        with nn.intercept_methods(interceptor), use_quantized():
            apply(variables, arrays)

    jax.eval_shape(functools.partial(call, find), variables, arrays)
    if not layers:
        raise ValueError(f"the call of {type(model).__name__} has no linear layers")
    marked = unflatten_dict({**flat, **places})
    jax.jit(functools.partial(call, record))(marked, arrays)
    jax.effects_barrier()
    return {
        path: layer.columns.reshape(*layer.stack, *layer.columns.shape[1:])
        for path, layer in layers.items()
    }


_COLLECTIONS = ("quantized", "params")
