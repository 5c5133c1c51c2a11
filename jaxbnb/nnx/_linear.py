"""QuantLinear: nnx.Linear with a frozen, quantised kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig, QuantizedArray, matmul
from jaxbnb.core._own_product import refuse_own_product


class QuantParam(nnx.Variable[QuantizedArray]):
    """A frozen quantised weight.

    Not an ``nnx.Param``: ``nnx.grad`` and ``nnx.Optimizer(wrt=nnx.Param)`` skip it.
    Of a kernel that is held as matrices, ``shape`` is the kernel's all the same, as
    models read the sizes of their heads from it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before it was quantised."""
        held = self.get_value().shape
        axes = self.get_metadata().get("axes")
        if axes is None:
            return held
        return *held[: len(held) - len(axes.matrix_shape)], *axes.shape


def refuse_out_sharding(out_sharding: Any) -> None:
    """Raises NotImplementedError for one: Flax's own modules pass None."""
    if out_sharding is not None:
        raise NotImplementedError(
            f"a quantised layer takes no out_sharding, got {out_sharding}; apply "
            "jax.lax.with_sharding_constraint to its result"
        )


class QuantLinear(nnx.Module):
    """A linear layer whose kernel is a `jaxbnb.QuantizedArray`.

    Attributes:
        kernel: `QuantParam` of shape ``(in_features, out_features)``.
        bias: ``nnx.Param`` of shape ``(out_features,)``, or None.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the result.
        config: format of the kernel and compute dtype.
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
        config: QuantConfig = QuantConfig(),  # noqa: B008 (frozen)
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        self.kernel = QuantParam(config.quantize_kernel(kernel))
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
    def from_linear(cls, linear: nnx.Linear, config: QuantConfig) -> "QuantLinear":
        """The layer with ``linear``'s weights, quantised.

        A stack of layers, kernels ``(*stack, in, out)`` as ``nnx.vmap`` makes them, is
        quantised matrix by matrix. The bias is shared with ``linear``, not copied.

        Raises:
            NotImplementedError: ``linear`` has a ``dot_general`` of its own.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> linear = nnx.Linear(128, 256, rngs=nnx.Rngs(0))
            >>> layer = jaxbnb.nnx.QuantLinear.from_linear(linear, jaxbnb.QuantConfig())
            >>> layer.kernel.shape
            (128, 256)
        """
        refuse_own_product(linear)
        # Abstract first: its own random kernel would cost as much as it holds.
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
        layer.kernel = QuantParam(config.quantize_kernel(linear.kernel[...]))
        layer.bias = linear.bias
        return layer

    def to_linear(self, dtype: jax.typing.DTypeLike | None = None) -> nnx.Linear:
        """The layer with its kernel decoded to ``dtype``: the inverse of `from_linear`.

        Example:
            >>> import jaxbnb
            >>> from flax import nnx
            >>> layer = jaxbnb.nnx.QuantLinear(64, 32, rngs=nnx.Rngs(0))
            >>> layer.to_linear().kernel.shape
            (64, 32)
        """
        kernel = self.kernel[...].dequantize(dtype)
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
        linear.kernel = nnx.Param(kernel)
        linear.bias = self.bias
        return linear

    def __call__(
        self, inputs: Float[Array, "*batch in_features"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer along the last axis of ``inputs``; no ``out_sharding``."""
        refuse_out_sharding(out_sharding)
        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        y = matmul(
            x,
            self.kernel[...],
            compute_dtype=self.config.compute_dtype,
            outlier_threshold=self.config.outlier_threshold,
            act_quant_type=self.config.act_quant_type,
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y
