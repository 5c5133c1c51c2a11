"""QuantDense: nn.Dense with a frozen, quantised kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig, matmul
from jaxbnb.core.config import as_config
from jaxbnb.linen.boxes import quantize_boxed


class QuantDense(nn.Module):
    """A dense layer whose kernel is a `jaxbnb.QuantizedArray`.

    The kernel is not a parameter: it lives in the collection ``"quantized"``, which
    optimizers and ``jax.grad`` over ``variables["params"]`` never see. The bias, if
    any, is a parameter, as in ``nn.Dense``. To use existing weights, replace the random
    kernel from ``init`` by ``config.quantize_kernel(kernel)``.

    Attributes:
        features: size of the last axis of the result.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        use_bias: whether to add a bias.
        dtype: dtype of the computation and the result; None for the input's.
        param_dtype: dtype of the kernel before it is quantised, and of the bias.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> layer = jaxbnb.QuantDense(features=256, config=jaxbnb.QuantConfig("nf4"))
        >>> x = jnp.ones((4, 128))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bias': (256,)}
        >>> variables["quantized"]["kernel"].bits_per_param
        4.5
        >>> layer.apply(variables, x).shape
        (4, 256)
    """

    features: int
    config: QuantConfig | str = QuantConfig()
    use_bias: bool = True
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch fan_in"]
    ) -> Float[Array, "*batch features"]:
        """Applies the layer along the last axis of ``inputs``."""
        config = as_config(self.config)

        def init_kernel():
            shape = (inputs.shape[-1], self.features)
            kernel = self.kernel_init(
                self.make_rng("params"), shape, jnp.dtype(self.param_dtype)
            )
            return quantize_boxed(kernel, config.quantize_kernel)

        kernel = self.variable("quantized", "kernel", init_kernel).value
        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        y = matmul(
            x,
            kernel,
            compute_dtype=config.compute_dtype,
            outlier_threshold=config.outlier_threshold,
            act_quant_type=config.act_quant_type,
        )
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), jnp.dtype(self.param_dtype)
            )
            y = y + bias.astype(y.dtype)
        return y
