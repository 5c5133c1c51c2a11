"""matmul_fp8 and its parts: arguments, checks, implementation, and the derivative."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxbnb_kernels import _selection
from jaxbnb_kernels.codebooks import FP8_E4M3, FP8_E5M2
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_fp8 import reference, xla

IMPLEMENTATIONS = {"xla": xla, "reference": reference}

# A code has the bits of the float. The codebook is the floats over the largest one.
_DTYPES: Final = (
    (FP8_E4M3, np.dtype(jnp.float8_e4m3fn)),
    (FP8_E5M2, np.dtype(jnp.float8_e5m2)),
)


def quantize_rows(
    x: Float[Array, "*batch k"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "*batch k"], Float32[Array, "*batch"]]:
    r"""Quantises each row to fp8 with one scale, its absmax.

    .. math:: s = \max_i |x_i|, \qquad c_i = \mathrm{round}(x_i \cdot (m \cdot 1 / s))

    where m is the largest number of ``dtype``. The nearest number of ``dtype`` is the
    code, and a tie goes to the even one. A row with a non-finite element has a
    non-finite scale, so it never decodes to finite values. A row of zeros has scale 0.

    Args:
        x: float32, bfloat16 or float16 array; computation is in float32.
        dtype: ``float8_e4m3fn`` or ``float8_e5m2``.

    Returns:
        ``(codes, scale)``: codes of ``dtype`` in the shape of ``x``, float32 ``batch``.

    Raises:
        TypeError: ``x`` is not floating, or ``dtype`` is neither of the two.
        ValueError: ``x`` is a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> codes, scale = quantize_rows(jnp.array([[0.0, -2.0, 1.0]]), "float8_e4m3fn")
        >>> codes.tolist(), scale.tolist()
        ([[0.0, -448.0, 224.0]], [2.0])
    """
    dtype = _check_dtypes("quantize_rows", x, dtype)
    if x.ndim == 0:
        raise ValueError("quantize_rows needs at least one axis; got a scalar")
    return reference.quantize_rows(x, dtype)


def matmul_fp8(
    x: Float[Array, "*batch k"],
    weight: Weight,
    *,
    act_dtype: jax.typing.DTypeLike,
    compute_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    r"""Computes ``x @ W.T`` in fp8, for W in fp8 with one absmax per row.

    With the scales s and codes c of x's rows (`quantize_rows`), the scales t and codes
    w of W, and the largest numbers m of the two formats:

    .. math:: y_{ij} = \frac{s_i t_j}{m_x m_w} \sum_l c_{il} w_{jl}

    The sum is in float32; the matrix units of a Hopper GPU keep about 14 bits of it. A
    scale for a part of W's rows would not factor out of the sum.

    W is a constant: its cotangent is zero. The cotangent of ``x`` is ``dy @ W`` with
    the decoded matrix in ``compute_dtype``, as if ``x`` had not been rounded. The
    backward pass keeps the codes.

    Args:
        x: ``(*batch, k)``.
        weight: ``(n, k)``, with codebook FP8_E4M3 or FP8_E5M2 and one block per row.
        act_dtype: dtype of the rows of ``x`` in the product: ``float8_e4m3fn`` or
            ``float8_e5m2``, independently of W's.
        compute_dtype: dtype of the gradient's product; None for the dtype of ``x``.
        implementation: "xla", "reference", or None to choose.

    Returns:
        ``(*batch, n)`` in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not agree, W is not in fp8, or its rows have several
            blocks.
        TypeError: ``x`` or ``compute_dtype`` is not floating, or ``act_dtype`` is not
            fp8.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbnb_kernels.quantize_blockwise import quantize_blockwise
        >>> codes, absmax = quantize_blockwise(jnp.eye(2), FP8_E4M3, block_size=2)
        >>> w = Weight(codes, absmax, None, FP8_E4M3, block_size=2, size=2)
        >>> y = matmul_fp8(jnp.array([3.0, 4.0]), w, act_dtype="float8_e4m3fn")
        >>> print(y.round(3))
        [2.857 4.   ]

    References:
        Micikevicius et al., FP8 Formats for Deep Learning, 2022.
        DeepSeek-AI, DeepSeek-V3 Technical Report, 2024 (3.3.2, precision of sums).
    """
    act_dtype = _check_dtypes("matmul_fp8", x, act_dtype)
    weight_dtype = _dtype_of(weight)
    if weight.absmax.shape[-1] > 1:
        raise ValueError(
            "a product in fp8 needs one absmax for a whole row of the matrix; got "
            f"{weight.absmax.shape[-1]} for blocks of {weight.block_size}"
        )
    if x.ndim == 0 or x.shape[-1] != weight.size:
        raise ValueError(
            f"the last axis of x must be {weight.size} to multiply; got {x.shape}"
        )
    compute_dtype = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    if not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype must be floating, got {compute_dtype}")
    return _matmul(weight_dtype, act_dtype, compute_dtype, implementation, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul(
    weight_dtype: np.dtype,
    act_dtype: np.dtype,
    compute_dtype: np.dtype,
    implementation: str | None,
    x: Float[Array, "*batch k"],
    weight: Weight,
) -> Float[Array, "*batch n"]:
    functions = {name: module.matmul for name, module in IMPLEMENTATIONS.items()}
    return _selection.run(
        "matmul_fp8",
        functions,
        implementation,
        x,
        weight.codes,
        # The absmax of a row's only block, or 0 if the row is empty.
        jnp.sum(weight.float_absmax(), axis=-1),
        weight_dtype,
        act_dtype,
    )


def _forward(weight_dtype, act_dtype, compute_dtype, implementation, x, weight):
    y = _matmul(weight_dtype, act_dtype, compute_dtype, implementation, x, weight)
    return y, weight


def _backward(weight_dtype, act_dtype, compute_dtype, implementation, weight, dy):
    dx = matmul_blockwise(
        dy,
        weight,
        transpose=False,
        compute_dtype=compute_dtype,
        implementation=implementation,
    )
    return dx, None


_matmul.defvjp(_forward, _backward)


def _dtype_of(weight: Weight) -> np.dtype:
    for levels, dtype in _DTYPES:
        # None stands for linear int8.
        codebook = () if weight.codebook is None else weight.codebook
        if np.array_equal(levels, codebook, equal_nan=True):
            return dtype
    raise ValueError("matmul_fp8 needs a matrix in fp8, e4m3 or e5m2")


def _check_dtypes(name: str, x: Array, dtype: jax.typing.DTypeLike) -> np.dtype:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} needs a floating x, got {x.dtype}")
    dtype, known = jnp.dtype(dtype), [dtype for _, dtype in _DTYPES]
    if dtype not in known:
        raise TypeError(f"{name} rounds x to one of {known}, got {dtype}")
    return dtype
