"""What the variables of our models are called in Hugging Face's checkpoints."""

from typing import Final

_LEAVES: Final = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
}


def torch_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """The tensor that a variable holds, or that it holds for one layer.

    A ``kernel`` holds its tensor transposed: ``(in, out)`` here, ``(out, in)`` there.

    Args:
        path: of the variable.
        layer: of a stacked variable, see `is_stacked`.

    Example:
        >>> torch_name(("model", "norm", "scale"))
        'model.norm.weight'
        >>> torch_name(("model", "layers", "layer", "mlp", "up_proj", "kernel"), 7)
        'model.layers.7.mlp.up_proj.weight'
    """
    *modules, leaf = path
    names = [str(layer) if name == "layer" else name for name in modules]
    return ".".join([*names, _LEAVES[leaf]])


def is_stacked(path: tuple[str, ...]) -> bool:
    """Whether a variable holds a tensor for every layer, on its leading axis.

    Example:
        >>> is_stacked(("model", "layers", "layer", "mlp", "up_proj", "kernel"))
        True
    """
    return "layer" in path
