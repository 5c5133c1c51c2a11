"""QuantLinear: nnx.Linear with a frozen, quantised kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig, matmul
from jaxbnb.core.config import as_config
from jaxbnb.core.flax_layers import refuse_custom_product
from jaxbnb.nnx._param import decode_param, quantize_kernel, shard_result


class QuantLinear(nnx.Module):
    """A linear layer whose kernel is a `jaxbnb.QuantizedArray`.

    Attributes:
        kernel: `QuantParam` of shape ``(in_features, out_features)``.
        bias: ``nnx.Param`` of shape ``(out_features,)``, or None.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the result.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        use_bias: whether to add a bias.
        dtype: dtype of the computation and the result; None for the input's.
        param_dtype: dtype of the kernel before it is quantised, and of the bias.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        rngs: its ``params`` stream seeds the initializers.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> layer = jaxbnb.nnx.QuantLinear(128, 256, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 128))).shape
        (4, 256)
        >>> [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))]
        [('bias',)]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        config = as_config(config)
        shape = (in_features, out_features)
        kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.kernel = quantize_kernel(kernel, config)
        self.bias: nnx.Param | None = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(
                bias_init(rngs.params(), (out_features,), param_dtype)
            )
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.dtype = dtype

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, config: QuantConfig | str
    ) -> "QuantLinear":
        """Makes the layer from the weights of ``linear``, and quantises its kernel.

        A stack of layers, with a kernel ``(*stack, in, out)`` as from ``nnx.vmap``, is
        quantised matrix by matrix. The bias is shared with ``linear``, not copied.

        Raises:
            NotImplementedError: ``linear`` has a custom ``dot_general``.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> linear = nnx.Linear(128, 256, rngs=nnx.Rngs(0))
            >>> layer = jaxbnb.nnx.QuantLinear.from_linear(linear, jaxbnb.QuantConfig())
            >>> layer.kernel.shape
            (128, 256)
        """
        config = as_config(config)
        refuse_custom_product(linear)
        # Abstract, because a random kernel would take as much memory again.
        layer = nnx.eval_shape(
            lambda: cls(
                linear.in_features,
                linear.out_features,
                config=config,
                use_bias=linear.use_bias,
                dtype=linear.dtype,
                param_dtype=linear.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        layer.kernel = quantize_kernel(linear.kernel, config)
        layer.bias = linear.bias
        return layer

    def to_linear(self, dtype: jax.typing.DTypeLike | None = None) -> nnx.Linear:
        """Decodes the kernel to ``dtype``: the inverse of `from_linear`.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = jaxbnb.nnx.QuantLinear(64, 32, rngs=nnx.Rngs(0))
            >>> layer.to_linear().kernel.shape
            (64, 32)
        """
        kernel = decode_param(self.kernel, dtype)
        linear = nnx.eval_shape(
            lambda: nnx.Linear(
                self.in_features,
                self.out_features,
                use_bias=self.bias is not None,
                dtype=self.dtype,
                param_dtype=kernel.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        linear.kernel = kernel
        linear.bias = self.bias
        return linear

    def __call__(
        self, inputs: Float[Array, "*batch in_features"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer along the last axis of ``inputs``.

        Args:
            inputs: array with any number of axes.
            out_sharding: sharding of the result, on a mesh with explicit axes.
        """

        def apply(x, kernel, bias):
            y = matmul(
                x,
                kernel,
                compute_dtype=self.config.compute_dtype,
                outlier_threshold=self.config.outlier_threshold,
                act_quant_type=self.config.act_quant_type,
            )
            return y if bias is None else y + bias.astype(y.dtype)

        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return shard_result(apply, out_sharding)(x, self.kernel[...], bias)
