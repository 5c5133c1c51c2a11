"""QuantDenseGeneral: nn.DenseGeneral with a frozen, quantised kernel."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.core.contraction import contract, general_axes
from jaxbnb.linen.boxes import put_in, quantize_boxed, take_out


class QuantDenseGeneral(nn.Module):
    """A dense layer over any axes, with a `jaxbnb.QuantizedArray` as its kernel.

    As in `QuantDense`, the kernel lives in the collection ``"quantized"``, and the bias
    is a parameter. The kernel is stored as a matrix ``(fan_in, fan_out)``, or as one
    for each element of the batch axes: the axes that the product sums over are
    flattened to one, and blocks run along it.

    Attributes:
        features: sizes of the last axes of the result.
        axis: axes of the input that are summed over.
        batch_dims: leading axes of the input; each of their elements has its own
            kernel.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        use_bias: whether to add a bias.
        dtype: dtype of the computation and the result; None for the input's.
        param_dtype: dtype of the kernel before it is quantised, and of the bias.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> layer = jaxbnb.linen.QuantDenseGeneral(features=(4, 32))
        >>> x = jnp.ones((2, 5, 64))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> variables["quantized"]["kernel"].shape
        (64, 128)
        >>> layer.apply(variables, x).shape
        (2, 5, 4, 32)
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: Sequence[int] = ()
    config: QuantConfig | str = QuantConfig()
    use_bias: bool = True
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*inputs"]
    ) -> Float[Array, "*batch_rest_out"]:
        """Applies the layer along ``axis`` of ``inputs``."""
        config = as_config(self.config)
        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        batch, summed, axes = general_axes(
            x.shape, self.features, self.axis, self.batch_dims
        )
        dtype = jnp.dtype(self.param_dtype)

        def init_kernel():
            # Drawn as a matrix, like nn.DenseGeneral, but boxed as a kernel.
            *experts, fan_in, fan_out = axes.matrix_shape
            shape = (math.prod(experts) * fan_in, fan_out)
            kernel = self.kernel_init(self.make_rng("params"), shape, dtype)
            kernel = put_in(kernel, take_out(kernel).reshape(axes.shape))
            return quantize_boxed(kernel, config.quantize_kernel, axes)

        y = contract(
            x,
            self.variable("quantized", "kernel", init_kernel).value,
            axes,
            summed=summed,
            batch=batch,
            compute_dtype=config.compute_dtype,
            outlier_threshold=config.outlier_threshold,
            act_quant_type=config.act_quant_type,
        )
        if self.use_bias:
            shape = axes.sizes((*axes.batch, *axes.out))

            def init_bias(key):
                flat = self.bias_init(key, (math.prod(shape),), dtype)
                return put_in(flat, take_out(flat).reshape(shape))

            bias = self.param("bias", init_bias)
            y = axes.add_bias(y, bias.astype(y.dtype))
        return y
