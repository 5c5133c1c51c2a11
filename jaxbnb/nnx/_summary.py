"""summary: a table of a model's weights, their formats, and which are trainable."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict

from jaxbnb.core import QuantizedArray, tree_nbytes
from jaxbnb.core.table import format_table
from jaxbnb.nnx import surgery


def summary(model: nnx.Module | Mapping[str, Any], wrt: Any = None) -> str:
    """Returns a table of a model's weights, with their formats and bytes, to print.

    Nothing is computed. Random keys and counts are left out.

    Args:
        model: any NNX model, or the variables of a Linen model (a dict of collections).
            Both may be abstract.
        wrt: filter for the variables to train, as in ``nnx.Optimizer``. None for the
            adapters, ``nnx.LoRAParam``, if there are any, or else every ``nnx.Param``.
            For Linen always None: the collection ``"params"`` is trainable, except for
            its quantised arrays.

    Returns:
        A line for each variable: path, shape, format, parameters, bytes, and whether it
        is trainable. Then a line for each format, and one for all.

    Raises:
        TypeError: ``model`` is neither an ``nnx.Module`` nor Linen variables, or
            ``wrt`` is given with Linen variables.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(256, 1024, rngs=nnx.Rngs(0)), nnx.relu,
        ...                        nnx.Linear(1024, 256, rngs=nnx.Rngs(1)))
        >>> _ = jaxbnb.nnx.quantize_model(model, skip=["2"])
        >>> print(jaxbnb.summary(model))
        variable         shape        format   parameters    bytes  trainable
        layers.0.bias    (1024,)      float32        1024     4096        yes
        layers.0.kernel  (256, 1024)  nf4          262144   147456
        layers.2.bias    (256,)       float32         256     1024        yes
        layers.2.kernel  (1024, 256)  float32      262144  1048576        yes
        all in                        float32      263424  1053696    100.0 %
        all in                        nf4          262144   147456      0.0 %
        total                                      525568  1201152     50.1 %
    """
    weights = (
        _linen_weights(model, wrt) if _is_linen(model) else _nnx_weights(model, wrt)
    )
    rows = [("variable", "shape", "format", "parameters", "bytes", "trainable")]
    by_format: dict[str, list[tuple[Any, bool]]] = {}
    for path, value, is_trainable in weights:
        name = _format(value)
        by_format.setdefault(name, []).append((value, is_trainable))
        columns = path, str(tuple(value.shape)), name, str(value.size)
        mark = "yes" if is_trainable else ""
        rows.append((*columns, str(tree_nbytes(value)), mark))
    for name in sorted(by_format):
        rows.append(("all in", "", name, *_total(by_format[name])))
    everything = [pair for pairs in by_format.values() for pair in pairs]
    rows.append(("total", "", "", *_total(everything)))
    return format_table(rows, num_right=3)


def _nnx_weights(model: Any, wrt: Any) -> list[tuple[str, Any, bool]]:
    """Lists the weights of an NNX model: path, value, and whether it is trainable."""
    if not isinstance(model, nnx.Pytree):
        got = list(model) if isinstance(model, Mapping) else type(model).__name__
        raise TypeError(
            "summary takes an NNX model, or the variables of a Linen one, a dict of "
            f"collections with 'params' among them; got {got}. "
            "jaxbnb.core.tree_nbytes gives the bytes of any tree"
        )
    weights = {
        path: (variable, value)
        for path, (variable, value) in surgery.collect_values(model).items()
        if _is_weight(value)
    }
    if wrt is None:
        has_adapters = any(isinstance(v, nnx.LoRAParam) for v, _ in weights.values())
        wrt = nnx.LoRAParam if has_adapters else nnx.Param
    chosen = nnx.to_flat_state(nnx.state(model, wrt))
    trained = {".".join(map(str, path)) for path, _ in chosen}
    return [(path, value, path in trained) for path, (_, value) in weights.items()]


def _is_linen(model: Any) -> bool:
    if isinstance(model, nnx.Pytree | nnx.State) or not isinstance(model, Mapping):
        return False
    return not {"params", "quantized"}.isdisjoint(model)


def _linen_weights(variables: Any, wrt: Any) -> list[tuple[str, Any, bool]]:
    """Lists the weights in Linen variables, as `_nnx_weights` does."""
    if wrt is not None:
        raise TypeError(
            "wrt is a filter of an NNX model's variables; leave it out for Linen's"
        )
    flat = flatten_dict(unfreeze(meta.unbox(variables)))
    return [
        (
            ".".join(map(str, path)),
            value,
            path[0] == "params" and not isinstance(value, QuantizedArray),
        )
        for path, value in sorted(flat.items())
        if _is_weight(value)
    ]


def _is_weight(value: Any) -> bool:
    return isinstance(value, QuantizedArray) or (
        hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
    )


def _format(value: Any) -> str:
    return getattr(value, "quant_type", None) or jnp.dtype(value.dtype).name


def _total(values: list[tuple[Any, bool]]) -> tuple[str, str, str]:
    """Returns parameters, bytes, and the share of parameters that are trainable."""
    size = sum(value.size for value, _ in values)
    trainable = sum(value.size for value, is_trainable in values if is_trainable)
    share = f"{100 * trainable / size:.1f} %" if size else ""
    return str(size), str(tree_nbytes([value for value, _ in values])), share
