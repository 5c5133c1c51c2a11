"""QuantLinear and QuantEmbedding: Equinox's layers with frozen, quantised weights."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxbnb.core import QuantConfig, QuantizedArray, embed, matmul
from jaxbnb.core.config import as_config
from jaxbnb.core.extras import import_extra
from jaxbnb.core.parts import apply_or_eval_shape
from jaxbnb.equinox._frozen import freeze, thaw

eqx: Any = import_extra("equinox", needed_by="jaxbnb.equinox", extra="equinox")


class QuantLinear(eqx.Module):
    """``eqx.nn.Linear`` with a frozen, quantised weight.

    Attributes:
        stored: codes of the weight ``(out_features, in_features)``, and its absmax as
            their bits, in uint32: ``eqx.filter_grad`` does not differentiate them, and
            no optimizer or cast changes them.
        bias: array of shape ``(out_features,)``, or None.
        in_features: size of the input, or "scalar".
        out_features: size of the result, or "scalar".
        config: format of the weight and compute dtype.

    Args:
        linear: layer to quantise, or a stack of layers, as from ``eqx.filter_vmap``.
        config: a `jaxbnb.QuantConfig`, or the name of a format.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxbnb
        >>> linear = eqx.nn.Linear(128, 256, key=jax.random.key(0))
        >>> layer = jaxbnb.equinox.QuantLinear(linear, "nf4")
        >>> jax.vmap(layer)(jnp.ones((4, 128))).shape
        (4, 256)
        >>> layer.weight
        QuantizedArray(nf4, shape=(256, 128), dtype=float32, axis=-1, block_size=64,
                       double_quant=False, 18.0 KiB, 4.50 bits/param)
    """

    stored: QuantizedArray
    bias: Array | None
    in_features: int | Literal["scalar"] = eqx.field(static=True)
    out_features: int | Literal["scalar"] = eqx.field(static=True)
    config: QuantConfig = eqx.field(static=True)

    def __init__(self, linear: Any, config: QuantConfig | str):
        self.config = as_config(config)
        self.stored = _store(linear.weight, self.config)
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features

    @property
    def weight(self) -> QuantizedArray:
        """The weight ``(out_features, in_features)``."""
        return thaw(self.stored)

    def to_linear(self, dtype: jax.typing.DTypeLike | None = None) -> Any:
        """Decodes the weight, to the dtype that it had or to ``dtype``.

        Example:
            >>> import equinox as eqx, jax, jaxbnb
            >>> linear = eqx.nn.Linear(64, 32, key=jax.random.key(0))
            >>> jaxbnb.equinox.QuantLinear(linear, "nf4").to_linear().weight.shape
            (32, 64)
        """
        linear = eqx.filter_eval_shape(
            eqx.nn.Linear,
            self.in_features,
            self.out_features,
            use_bias=self.bias is not None,
            key=jax.random.key(0),
        )
        return eqx.tree_at(
            lambda layer: (layer.weight, layer.bias),
            linear,
            (self.weight.dequantize(dtype), self.bias),
            is_leaf=lambda leaf: leaf is None,
        )

    def __call__(
        self, x: Float[Array, "in_features"], *, key: jax.Array | None = None
    ) -> Float[Array, "out_features"]:
        """Applies the layer to a vector; ``jax.vmap`` applies it to several.

        In ``llm_int8``, each vector then has outliers of its own.

        Args:
            x: vector, or a scalar if ``in_features`` is "scalar".
            key: ignored, as in ``eqx.nn.Linear``.
        """
        if self.in_features == "scalar":
            if jnp.shape(x) != ():
                raise ValueError(f"x must be a scalar, got shape {jnp.shape(x)}")
            x = jnp.broadcast_to(x, (1,))
        y = matmul(
            x,
            self.weight.mT,
            compute_dtype=self.config.compute_dtype,
            outlier_threshold=self.config.outlier_threshold,
            act_quant_type=self.config.act_quant_type,
        )
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        return y[0] if self.out_features == "scalar" else y


class QuantEmbedding(eqx.Module):
    """``eqx.nn.Embedding`` with frozen, quantised rows; a lookup decodes one of them.

    Attributes:
        stored: codes of the rows, as in `QuantLinear`.
        num_embeddings: number of rows.
        embedding_size: size of a row.
        config: format of the rows.

    Args:
        embedding: layer to quantise.
        config: a `jaxbnb.QuantConfig`, or the name of a format.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxbnb
        >>> table = eqx.nn.Embedding(512, 64, key=jax.random.key(0))
        >>> layer = jaxbnb.equinox.QuantEmbedding(table, "int8")
        >>> jax.vmap(layer)(jnp.arange(3)).shape
        (3, 64)
    """

    stored: QuantizedArray
    num_embeddings: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)
    config: QuantConfig = eqx.field(static=True)

    def __init__(self, embedding: Any, config: QuantConfig | str):
        self.config = as_config(config)
        self.stored = _store(embedding.weight, self.config)
        self.num_embeddings = embedding.num_embeddings
        self.embedding_size = embedding.embedding_size

    @property
    def weight(self) -> QuantizedArray:
        """The rows ``(num_embeddings, embedding_size)``."""
        return thaw(self.stored)

    def to_embedding(self, dtype: jax.typing.DTypeLike | None = None) -> Any:
        """Decodes the rows, to the dtype that they had or to ``dtype``.

        Example:
            >>> import equinox as eqx, jax, jaxbnb
            >>> table = eqx.nn.Embedding(512, 64, key=jax.random.key(0))
            >>> layer = jaxbnb.equinox.QuantEmbedding(table, "int8")
            >>> layer.to_embedding().weight.shape
            (512, 64)
        """
        rows = self.weight.dequantize(dtype)
        if rows.ndim == 2:
            return eqx.nn.Embedding(weight=rows)
        empty = eqx.nn.Embedding(weight=jnp.zeros(rows.shape[-2:], rows.dtype))
        return eqx.tree_at(lambda layer: layer.weight, empty, rows)

    def __call__(
        self, x: Int[Array, ""], *, key: jax.Array | None = None
    ) -> Float[Array, "embedding_size"]:
        """Looks up a row; ``jax.vmap`` looks up several.

        Args:
            x: index of the row. JAX's rules hold for one that is out of range: it
                counts from the end if it is negative, and else the last row is taken.
            key: ignored, as in ``eqx.nn.Embedding``.
        """
        if jnp.shape(x) != ():
            raise ValueError(
                f"an embedding looks up one row, got indices of shape {jnp.shape(x)}; "
                "use jax.vmap for several"
            )
        # `embed` gives NaN for an index that is out of range, unlike x[index].
        index = jnp.asarray(x).astype(jnp.int32)
        index = jnp.clip(index, -self.num_embeddings, self.num_embeddings - 1)
        return embed(index, self.weight)


def _store(weight: Any, config: QuantConfig) -> QuantizedArray:
    return freeze(apply_or_eval_shape(config.quantize_embedding, weight))
