"""QuantLinear: nnx.Linear with a frozen, quantised kernel."""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxbnb.core import QuantConfig, QuantizedArray, matmul
from jaxbnb.core._own_product import refuse_own_product

_ARRAYS: Final = (jax.Array, np.ndarray)


class QuantParam(nnx.Variable[QuantizedArray]):
    """A frozen quantised weight.

    Not an ``nnx.Param``: ``nnx.grad`` and ``nnx.Optimizer(wrt=nnx.Param)`` skip it.
    Of a kernel that is held as matrices, ``shape`` is the kernel's all the same, as
    models read the sizes of their heads from it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight before it was quantised."""
        held = self.get_raw_value().shape
        axes = self.get_metadata().get("axes")
        if axes is None:
            return held
        return *held[: len(held) - len(axes.matrix_shape)], *axes.shape


class DecodedParam(QuantParam):
    """A frozen quantised weight that gives what it stands for to whoever reads it.

    Where it is split, merged, scanned over or saved, it is the codes.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> param = DecodedParam(jaxbnb.quantize(jnp.ones((3, 64, 32)), "int8"))
        >>> jnp.einsum("ecd,edf->ecf", jnp.ones((3, 5, 64)), param).shape
        (3, 5, 32)
        >>> param.get_raw_value().quant_type
        'int8'
    """

    def get_value(self, **options: Any) -> Any:
        """The weight decoded, in the dtype that was quantised."""
        value: Any = super().get_value(**options)
        # What prints a model, or a transformation, may have put something else there.
        if isinstance(value, QuantizedArray) and isinstance(value.codes, _ARRAYS):
            return value.dequantize()
        return value


def sharded(
    function: Callable[..., Array], out_sharding: jax.sharding.PartitionSpec | Any
) -> Callable[..., Array]:
    """The function, with its result sharded so on a mesh of explicit axes.

    Within it axes are automatic, as decoding has steps whose sharding JAX cannot tell
    from their operands. All arrays must be arguments.

    Args:
        function: of arrays and pytrees of them.
        out_sharding: of the result; None for the function as it is.

    Example:
        >>> sharded(abs, None) is abs
        True
    """
    if out_sharding is None:
        return function
    auto: Any = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return auto


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
        """Applies the layer along the last axis of ``inputs``.

        Args:
            inputs: of any number of axes.
            out_sharding: of the result, on a mesh of explicit axes.
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
        return sharded(apply, out_sharding)(x, self.kernel[...], bias)
