"""update_8bit: arguments, checks, implementation."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from jaxbnb_kernels import _selection
from jaxbnb_kernels.update_8bit import kernels, reference, xla
from jaxbnb_kernels.update_8bit.moment import Moment, block_layout
from jaxbnb_kernels.update_8bit.rule import Rule

IMPLEMENTATIONS = {
    "mosaic_gpu": kernels,
    "cpu": kernels,
    "xla": xla,
    "reference": reference,
}


def update_8bit(
    rule: Rule,
    scalars: Any,
    grad: Float[Array, "*shape"],
    moments: Sequence[Moment],
    param: Float[Array, "*shape"] | None = None,
    *,
    block_size: int = 256,
    implementation: str | None = None,
) -> tuple[Float[Array, "*shape"], tuple[Moment, ...]]:
    """Decodes the moments, applies a rule, and encodes them with new absmax.

    The update uses the moments before they are rounded. Where a gradient element or its
    square is not finite, the update is NaN and the stored moments keep their old
    values, so one bad element cannot spoil its block. A positive element of an unsigned
    moment is never stored as zero, because Adam would divide by its root.

    Args:
        rule: what happens to an element.
        scalars: pytree of scalars for the rule, e.g. bias corrections.
        grad: gradient in the parameter's shape, of any floating dtype.
        moments: state of the parameter.
        param: the parameter, for a whole step: the result is then ``param +
            finish(update)``, computed in float32, and no update is written to memory.
        block_size: largest number of elements that share an absmax.
        implementation: "xla", "reference", "cpu" (a native kernel), "mosaic_gpu" (a
            kernel for GPUs, which overwrites arrays that the caller donates), or
            None to choose.

    Returns:
        ``(update, moments)``, with the update in the dtype of ``grad``; or ``(param,
        moments)``, with the parameter in its own dtype.

    Raises:
        ValueError: the shape of ``param``, or of a moment's codes or absmax, does not
            match ``grad``.
        NotImplementedError: the requested implementation does not support these
            arguments, or the device that they are on.

    Example:
        >>> import jax.numpy as jnp
        >>> momentum = Rule(
        ...     advance=lambda decay, g, old: (decay * old[0] + g,),
        ...     direction=lambda decay, g, old, new: new[0])
        >>> zero = Moment(jnp.full((2, 256), 127, jnp.uint8), jnp.zeros((2, 1)), True)
        >>> update, (m,) = update_8bit(momentum, 0.9, jnp.ones((2, 256)), [zero])
        >>> update[0, 0].item(), m.codes[0, 0].item(), m.absmax.tolist()
        (1.0, 255, [[1.0], [1.0]])

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021.
    """
    layout = block_layout(grad.shape, block_size)
    if param is not None and param.shape != grad.shape:
        raise ValueError(
            f"the gradient must have the parameter's shape {param.shape}; got "
            f"{grad.shape}"
        )
    for moment in moments:
        got = moment.codes.shape, moment.absmax.shape
        if got != (grad.shape, layout.absmax_shape):
            raise ValueError(
                f"a gradient of shape {grad.shape} in blocks of {block_size} has codes "
                f"{grad.shape} and absmax {layout.absmax_shape}; the state has {got}. "
                "Was it made for another parameter or block_size?"
            )
    functions = {name: module.update for name, module in IMPLEMENTATIONS.items()}
    # The lowering knows whether the compiler divides arrays.
    functions["xla"] = functools.partial(kernels.update, kinds=(), is_required=False)
    return _selection.run(
        "update_8bit",
        functions,
        implementation,
        rule,
        scalars,
        grad,
        tuple(moments),
        layout,
        param,
    )


def absmax_shape(shape: tuple[int, ...], block_size: int = 256) -> tuple[int, ...]:
    """Returns the shape of a moment's absmax: one element a block, rank as ``shape``.

    Example:
        >>> absmax_shape((64, 1024))
        (64, 4)
    """
    return block_layout(shape, block_size).absmax_shape
