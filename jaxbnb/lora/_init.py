"""Initialises the factors of an adapter."""

import math
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from jaxbnb.core import QuantConfig

# These are taken out of the weight, which keeps the rest.
DECOMPOSED: Final = ("pissa", "olora")

Factors = tuple[
    Float32[Array, "*stack_batch fan_in r"], Float32[Array, "*stack_batch r fan_out"]
]


def make_factors(
    init: bool | str,
    weight: Float32[Array, "*stack_batch fan_in fan_out"] | None,
    shape: tuple[int, ...],
    is_used: Bool[Array, "*stack r"],
    scale: Float32[Array, "*stack"],
    rngs: nnx.Rngs,
) -> Factors:
    """Makes ``lora_a`` and ``lora_b`` as ``init_lora_weights`` says.

    Args:
        init: ``init_lora_weights``, except "loftq"; see `fit_loftq`.
        weight: the weight, if ``init`` starts from it; otherwise None.
        shape: shape of the weight.
        is_used: False for columns beyond the rank of a layer, which are zero.
        scale: factor of ``A B``.
        rngs: random streams; ``params`` is used.
    """
    *stack, fan_in, fan_out = shape
    rank = is_used.shape[-1]
    if weight is not None:
        check_rank(rank, shape, str(init))
        return (_pissa if init == "pissa" else _olora)(weight, is_used, scale)
    a_shape, b_shape = (*stack, fan_in, rank), (*stack, rank, fan_out)
    b = jnp.zeros(b_shape, jnp.float32)
    if init == "gaussian":
        a = jax.random.normal(rngs.params(), a_shape, jnp.float32) / rank
        return _mask(a, b, is_used)
    # PEFT's kaiming_uniform(a=sqrt(5)): uniform in +-1/sqrt(fan_in).
    a = _draw_uniform(rngs.params(), a_shape, fan_in)
    if init is False:
        b = _draw_uniform(rngs.params(), b_shape, rank)
    return _mask(a, b, is_used)


def make_embedding_factors(
    init: bool | str,
    shape: tuple[int, ...],
    is_used: Bool[Array, "*stack r"],
    rngs: nnx.Rngs,
) -> Factors:
    """Makes the factors of an embedding: zeros, and normal with deviation 1, as PEFT.

    With ``init=False``, both are normal. Arguments as in `make_factors`.
    """
    *stack, fan_in, fan_out = shape
    rank = is_used.shape[-1]
    a = jnp.zeros((*stack, fan_in, rank), jnp.float32)
    if init is False:
        a = jax.random.normal(rngs.params(), a.shape, jnp.float32)
    b = jax.random.normal(rngs.params(), (*stack, rank, fan_out), jnp.float32)
    return _mask(a, b, is_used)


def fit_loftq(
    weight: Float32[Array, "*stack_batch fan_in fan_out"],
    is_used: Bool[Array, "*stack r"],
    scale: Float32[Array, "*stack"],
    quant: QuantConfig,
    num_iterations: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "*stack_batch fan_in fan_out"], Factors]:
    """Fits a weight, which is then quantised, and factors of its error to each other.

    References:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization, 2023, algorithm 1.
    """
    check_rank(is_used.shape[-1], weight.shape, "loftq")
    rest, a, b = weight, jnp.zeros(()), jnp.zeros(())
    for iteration in range(num_iterations):
        if iteration:
            rest = weight - multiply_factors(a, b, scale)
        rest = rest.astype(dtype)
        decoded = quant.quantize_kernel(rest).dequantize(jnp.float32)
        a, b = _pissa(weight - decoded, is_used, scale)
    return rest, (a, b)


def multiply_factors(
    a: Array, b: Array, scale: Array
) -> Float32[Array, "*stack_batch in out"]:
    """Computes ``scale * A B``, in float32 at the highest precision."""
    return expand_axes(scale, a.ndim) * jnp.matmul(a, b, precision="highest")


def expand_axes(x: Array, ndim: int, keep: int = 0) -> Array:
    """Inserts axes of length 1 after those of the stack, before the last ``keep``."""
    shape = x.shape
    stack, last = shape[: len(shape) - keep], shape[len(shape) - keep :]
    return x.reshape(*stack, *(1 for _ in range(ndim - len(shape))), *last)


def compute_column_norms(
    weight: Float32[Array, "*stack_batch fan_in fan_out"],
) -> Float32[Array, "*stack_batch fan_out"]:
    """Computes the norm of each column, i.e. of the weights of each output."""
    return jnp.sqrt(jnp.sum(weight**2, axis=-2))


def check_rank(rank: int, shape: tuple[int, ...], init: str) -> None:
    """Checks that a decomposition has enough parts: the matrix's shorter side.

    Raises:
        ValueError: it has fewer than ``rank``.
    """
    most = min(shape[-2:])
    if rank > most:
        raise ValueError(
            f"init_lora_weights={init!r} takes r = {rank} parts of a weight of shape "
            f"{shape[-2:]}, which has {most}; lower r, or use a rank_pattern for this "
            "layer"
        )


def _pissa(weight, is_used, scale) -> Factors:
    """Takes the largest singular values, and puts their square roots on either side."""
    rank = is_used.shape[-1]
    u, s, vh = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / expand_axes(scale, s.ndim))
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
    return _mask(a, b, is_used)


def _olora(weight, is_used, scale) -> Factors:
    """Takes the first columns of Q and rows of R, for the transposed weight.

    As in PEFT, the factors are not divided by the scale. So the scale also multiplies
    what is taken out of the weight.
    """
    del scale
    rank = is_used.shape[-1]
    q, r = jnp.linalg.qr(weight.mT)
    return _mask(r[..., :rank, :].mT, q[..., :rank].mT, is_used)


def _mask(a, b, is_used) -> Factors:
    is_used = expand_axes(is_used, a.ndim, keep=1)
    return jnp.where(is_used, a, 0), jnp.where(is_used.mT, b, 0)


def _draw_uniform(key, shape, fan) -> Float32[Array, "..."]:
    bound = 1.0 / math.sqrt(fan)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
