"""Linear layers over any axes: QuantLinearGeneral and QuantEinsum."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig
from jaxbnb.core.config import as_config
from jaxbnb.core.contraction import KernelAxes, contract, general_axes, kernel_axes
from jaxbnb.core.einsum import bias_shape, einsum, einsum_axes
from jaxbnb.core.flax_layers import refuse_custom_product
from jaxbnb.nnx._param import decode_param, quantize_kernel, shard_result


class QuantLinearGeneral(nnx.Module):
    """``nnx.LinearGeneral`` with a frozen, quantised kernel, e.g. of attention heads.

    The kernel is stored as a matrix, or as one for each element of the batch axes: the
    axes that the product sums over are flattened to one, and blocks run along it.

    Attributes:
        kernel: `QuantParam` with the value ``(*batch, fan_in, fan_out)``; the fans are
            the products of ``in_features`` and of ``out_features``. Its ``shape`` is
            the shape of Flax's kernel.
        bias: ``nnx.Param`` of shape ``(*batch, *out_features)``, or None.

    Args:
        in_features: sizes of the axes of the input that are summed over.
        out_features: sizes of the last axes of the result.
        axis: axes of the input that are summed over.
        batch_axis: sizes of the leading axes of the input that have one kernel for each
            element, by axis, e.g. ``{0: num_experts}``.
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
        >>> heads = jaxbnb.nnx.QuantLinearGeneral(64, (4, 32), rngs=nnx.Rngs(0))
        >>> heads(jnp.ones((2, 5, 64))).shape, heads.kernel[...].shape
        ((2, 5, 4, 32), (64, 128))
        >>> out = jaxbnb.nnx.QuantLinearGeneral(
        ...     (4, 32), 64, axis=(-2, -1), rngs=nnx.Rngs(0))
        >>> out(heads(jnp.ones((2, 5, 64)))).shape
        (2, 5, 64)
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] | None = None,
        config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        config = as_config(config)
        plain = nnx.LinearGeneral(
            in_features,
            out_features,
            axis=axis,
            batch_axis=batch_axis or {},
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.axis = plain.axis
        self.batch_axis = plain.batch_axis
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.config = config
        self.dtype = dtype
        self.kernel = quantize_kernel(plain.kernel, config, self._axes())
        self.bias: nnx.Param | None = plain.bias

    def _axes(self) -> KernelAxes:
        batch = tuple(self.batch_axis.values())
        shape = (*batch, *self.in_features, *self.out_features)
        return kernel_axes(len(batch), len(self.in_features), shape)

    @classmethod
    def from_linear_general(
        cls, linear: nnx.LinearGeneral, config: QuantConfig | str
    ) -> "QuantLinearGeneral":
        """Makes the layer from the weights of ``linear``, and quantises its kernel.

        A stack of layers, with leading axes in its kernel, is quantised kernel by
        kernel. The bias is shared with ``linear``, not copied.

        Raises:
            NotImplementedError: ``linear`` has a custom ``dot_general``.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> linear = nnx.LinearGeneral(64, (4, 32), rngs=nnx.Rngs(0))
            >>> layer = jaxbnb.nnx.QuantLinearGeneral.from_linear_general(
            ...     linear, jaxbnb.QuantConfig())
            >>> layer.kernel.shape, layer.kernel[...].shape
            ((64, 4, 32), (64, 128))
        """
        config = as_config(config)
        refuse_custom_product(linear)
        # Abstract, because a random kernel would take as much memory again.
        layer = nnx.eval_shape(
            lambda: cls(
                linear.in_features,
                linear.out_features,
                axis=linear.axis,
                batch_axis=linear.batch_axis,
                config=config,
                use_bias=linear.use_bias,
                dtype=linear.dtype,
                param_dtype=linear.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        layer.kernel = quantize_kernel(linear.kernel, config, layer._axes())
        layer.bias = linear.bias
        return layer

    def to_linear_general(
        self, dtype: jax.typing.DTypeLike | None = None
    ) -> nnx.LinearGeneral:
        """Decodes the kernel to ``dtype``: the inverse of `from_linear_general`.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = jaxbnb.nnx.QuantLinearGeneral(64, (4, 32), rngs=nnx.Rngs(0))
            >>> layer.to_linear_general().kernel.shape
            (64, 4, 32)
        """
        kernel = decode_param(self.kernel, dtype)
        linear = nnx.eval_shape(
            lambda: nnx.LinearGeneral(
                self.in_features,
                self.out_features,
                axis=self.axis,
                batch_axis=self.batch_axis,
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
        self, inputs: Float[Array, "*inputs"], out_sharding: Any = None
    ) -> Float[Array, "*batch_rest_out"]:
        """Applies the layer.

        Args:
            inputs: array with the axes that are summed over at ``axis``.
            out_sharding: sharding of the result, on a mesh with explicit axes.
        """
        batch, summed, _ = general_axes(
            inputs.shape, self.out_features, self.axis, tuple(self.batch_axis)
        )
        axes = self._axes()

        def apply(x, kernel, bias):
            y = contract(
                x,
                kernel,
                axes,
                summed=summed,
                batch=batch,
                compute_dtype=self.config.compute_dtype,
                outlier_threshold=self.config.outlier_threshold,
                act_quant_type=self.config.act_quant_type,
            )
            return y if bias is None else axes.add_bias(y, bias.astype(y.dtype))

        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return shard_result(apply, out_sharding)(x, self.kernel[...], bias)


class QuantEinsum(nnx.Module):
    """``nnx.Einsum`` with a frozen, quantised kernel, e.g. of the experts of a mixture.

    The kernel is stored as in `QuantLinearGeneral`. Its batch axes are those that the
    input and the result both have.

    Attributes:
        kernel: `QuantParam` with the value ``(*batch, fan_in, fan_out)``; its ``shape``
            is ``kernel_shape``.
        bias: ``nnx.Param`` of shape ``bias_shape``, or None.

    Args:
        einsum_str: equation of input and kernel; each of its axes is in at least two
            of input, kernel and result.
        kernel_shape: shape of the kernel before it is stored as matrices.
        bias_shape: shape of the bias; None for no bias.
        config: format of the kernel and compute dtype: a `jaxbnb.QuantConfig`, or a
            format's name.
        dtype: dtype of the computation and the result; None for the input's.
        param_dtype: dtype of the kernel before it is quantised, and of the bias.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        rngs: its ``params`` stream seeds the initializers.

    Raises:
        ValueError: ``einsum_str`` is not such a product.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> experts = jaxbnb.nnx.QuantEinsum(
        ...     "ecd,edf->ecf", (8, 64, 128), rngs=nnx.Rngs(0))
        >>> experts(jnp.ones((8, 5, 64))).shape, experts.kernel.shape
        ((8, 5, 128), (8, 64, 128))
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        config = as_config(config)
        self.axes = einsum_axes(einsum_str, kernel_shape)
        self.einsum_str = einsum_str
        self.bias_shape = bias_shape
        self.config = config
        self.dtype = dtype
        kernel = kernel_init(rngs.params(), tuple(kernel_shape), param_dtype)
        self.kernel = quantize_kernel(nnx.Param(kernel), config, self.axes)
        self.bias: nnx.Param | None = nnx.data(None)
        if bias_shape is not None:
            self.bias = nnx.Param(
                bias_init(rngs.params(), tuple(bias_shape), param_dtype)
            )

    @classmethod
    def from_einsum(cls, layer: nnx.Einsum, config: QuantConfig | str) -> "QuantEinsum":
        """Makes the layer from the weights of ``layer``, and quantises its kernel.

        A stack of layers, with leading axes in its kernel, is quantised kernel by
        kernel. The bias is shared with ``layer``, not copied.

        Raises:
            NotImplementedError: ``layer`` has a custom ``einsum_op``.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = nnx.Einsum("nta,hab->nthb", (8, 64, 4), rngs=nnx.Rngs(0))
            >>> quantized = jaxbnb.nnx.QuantEinsum.from_einsum(
            ...     layer, jaxbnb.QuantConfig())
            >>> quantized.kernel.shape, quantized.kernel[...].shape
            ((8, 64, 4), (64, 32))
        """
        config = as_config(config)
        refuse_custom_product(layer)
        # Abstract, because a random kernel would take as much memory again.
        quantized = nnx.eval_shape(
            lambda: cls(
                layer.einsum_str,
                layer.kernel_shape,
                layer.bias_shape,
                config=config,
                dtype=layer.dtype,
                param_dtype=layer.param_dtype,
                rngs=nnx.Rngs(0),
            )
        )
        quantized.kernel = quantize_kernel(layer.kernel, config, quantized.axes)
        quantized.bias = layer.bias
        return quantized

    def to_einsum(self, dtype: jax.typing.DTypeLike | None = None) -> nnx.Einsum:
        """Decodes the kernel to ``dtype``: the inverse of `from_einsum`.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = jaxbnb.nnx.QuantEinsum(
            ...     "nta,hab->nthb", (8, 64, 4), rngs=nnx.Rngs(0))
            >>> layer.to_einsum().kernel.shape
            (8, 64, 4)
        """
        kernel = decode_param(self.kernel, dtype)
        layer = nnx.eval_shape(
            lambda: nnx.Einsum(
                self.einsum_str,
                self.axes.shape,
                self.bias_shape,
                dtype=self.dtype,
                param_dtype=kernel.dtype,
                rngs=nnx.Rngs(0),
            )
        )
        layer.kernel = kernel
        layer.bias = self.bias
        return layer

    def __call__(
        self,
        inputs: Float[Array, "*inputs"],
        einsum_str: str | None = None,
        out_sharding: Any = None,
    ) -> Float[Array, "*outputs"]:
        """Applies the layer.

        Args:
            inputs: first operand of the einsum.
            einsum_str: another einsum, which must sum the same axes of the kernel.
            out_sharding: sharding of the result, on a mesh with explicit axes.
        """
        equation = self.einsum_str if einsum_str is None else einsum_str

        def apply(x, kernel, bias):
            y = einsum(
                equation,
                x,
                kernel,
                self.axes,
                compute_dtype=self.config.compute_dtype,
                outlier_threshold=self.config.outlier_threshold,
                act_quant_type=self.config.act_quant_type,
            )
            if bias is None:
                return y
            shape = bias_shape(equation, self.axes, y.ndim)
            return y + bias.reshape(shape).astype(y.dtype)

        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return shard_result(apply, out_sharding)(x, self.kernel[...], bias)
