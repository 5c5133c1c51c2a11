"""quantize_model: every linear layer of a model, in place."""

from collections.abc import Sequence

from flax import nnx

from jaxbnb.core import QuantConfig
from jaxbnb.core._paths import matches
from jaxbnb.nnx import _surgery
from jaxbnb.nnx._linear import QuantLinear


def quantize_model(
    model: nnx.Module,
    config: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
    *,
    skip: str | Sequence[str] = ("lm_head",),
) -> list[str]:
    """Replaces the ``nnx.Linear`` layers of ``model`` by `QuantLinear`, in place.

    Stacked layers (kernels with leading axes) are quantised matrix by matrix.
    Everything else stays as it is.

    Args:
        model: any NNX model.
        config: format of the kernels and compute dtype.
        skip: layers to leave alone: names, each a whole dotted path or its last parts,
            or one regular expression for the whole path. The output head by default.

    Returns:
        The dotted paths of the layers that were quantised.

    Raises:
        ValueError: no layer was quantised.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
        >>> jaxbnb.nnx.quantize_model(model, jaxbnb.QuantConfig("nf4"))
        ['layers.0']
    """
    linears: list[str] = []

    def new(path: str, module: nnx.Module) -> nnx.Module | None:
        if type(module) is not nnx.Linear:
            return None
        linears.append(path)
        if matches(path, skip):
            return None
        return QuantLinear.from_linear(module, config)

    replaced = _surgery.replace_modules(model, new)
    if not replaced:
        raise ValueError(
            f"quantize_model found nothing to quantise in {type(model).__name__}: "
            f"its nnx.Linear layers are {linears}, and skip is {skip!r}"
        )
    return replaced
