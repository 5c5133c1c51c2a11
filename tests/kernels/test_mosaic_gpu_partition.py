"""Kernels in programs for several Hopper GPUs: divided, without extra work."""

import hopper_compiler
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_checks import operations_of

import jaxbnb
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.matmul_blockwise import Weight, matmul_blockwise
from jaxbnb_kernels.matmul_int8 import matmul_int8
from jaxbnb_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

ROWS, COLUMNS = P("device"), P(None, "device")
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def compiled_for_two(function, in_specs, out_specs, *args, **options):
    """Returns ``(text, memory, names of operations, names of collectives)``."""
    mesh = hopper_compiler.mesh(num_devices=2)

    def shardings(specs):
        is_spec = lambda s: isinstance(s, P)  # noqa: E731
        return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)

    compiled, _ = hopper_compiler.compile_for(
        mesh,
        function,
        *args,
        in_shardings=shardings(in_specs),
        out_shardings=shardings(out_specs),
        **options,
    )
    operations = operations_of(compiled)
    return (
        compiled.as_text(),
        compiled.memory_analysis(),
        operations,
        # XLA starts one, and waits for it later.
        {
            o.removesuffix("-start")
            for o in operations
            if o.startswith(("all-", "collective", "reduce-scatter"))
            and not o.endswith("-done")
        },
    )


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def count_kernels(text):
    return text.count('custom_call_target="mosaic_gpu')


def weight(nested):
    codes = shape(4096, 2048, dtype=jnp.uint8)
    if not nested:
        absmax = shape(4096, 64, dtype=jnp.float32)
        return Weight(codes, absmax, None, NF4, 64, 4096)
    absmax = shape(4096, 64, dtype=jnp.uint8)
    of_absmax = shape(1024, dtype=jnp.float32), shape(dtype=jnp.float32)
    return Weight(codes, absmax, of_absmax, NF4, 64, 4096)


@pytest.mark.matrix
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_w", "of_y", "is_reduced"),
    [
        (ROWS, P(), ROWS, (False, False)),
        (P(), ROWS, COLUMNS, (False, True)),
        (COLUMNS, COLUMNS, P(), (True, False)),
    ],
    ids=["data", "tensor", "contracted"],
)
def test_products_and_their_gradients(of_x, of_w, of_y, is_reduced, nested):
    x = shape(32, 4096)
    w = weight(nested)
    of_weight = jax.tree.map(lambda a: of_w if a.ndim == 2 else P(), w)

    def forward(x, w):
        return matmul_blockwise(x, w, transpose=True)

    def backward(dy, w):
        return matmul_blockwise(dy, w, transpose=False)

    for product, of_operand, of_result, reduced in zip(
        (forward, backward), (of_x, of_y), (of_y, of_x), is_reduced, strict=True
    ):
        text, *_, collectives = compiled_for_two(
            product, (of_operand, of_weight), of_result, x, w
        )
        assert count_kernels(text) == 1
        expected = {"all-reduce"} if reduced else set()
        if nested and of_w == COLUMNS:
            # A block's number in the whole matrix gives its nested absmax.
            expected |= {"all-gather"}
        assert collectives == expected


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_encoding_and_decoding(spec):
    def encode(x):
        return quantize_blockwise(x, NF4, block_size=64)

    def decode(codes, absmax):
        options = {"block_size": 64, "size": 4096, "dtype": BFLOAT16}
        return dequantize_blockwise(codes, absmax, NF4, **options)

    codes, absmax = shape(64, 2048, dtype=jnp.uint8), shape(64, 64, dtype=jnp.float32)
    for function, in_specs, out_specs, *args in (
        (encode, (spec,), (spec, spec), shape(64, 4096)),
        (decode, (spec, spec), spec, codes, absmax),
    ):
        text, *_, collectives = compiled_for_two(function, in_specs, out_specs, *args)
        assert count_kernels(text) == 1
        assert not collectives


def test_int8_products():
    def multiply(x, codes, col_scale):
        return matmul_int8(x, codes, col_scale, outlier_threshold=0.0)

    codes = shape(4096, 4096, dtype=jnp.int8)
    args = shape(32, 4096), codes, shape(4096, dtype=jnp.float32)
    text, *_, collectives = compiled_for_two(
        multiply, (P(), ROWS, ROWS), COLUMNS, *args
    )
    # A second kernel quantises the rows of x.
    assert count_kernels(text) == 2
    assert not collectives


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_a_donated_step_is_in_place(spec):
    """As on one GPU, it is one kernel without copies or sizeable temporaries."""
    tx = jaxbnb.adamw8bit(1e-3)
    param = shape(512, 1024)
    state = jax.eval_shape(tx.init, param)
    specs = jax.tree.map(lambda a: spec if a.ndim == 2 else P(), (param, state))
    of_param, of_state = specs
    text, memory, operations, collectives = compiled_for_two(
        jaxbnb.optim.fused_step(tx),
        (of_param, of_state, of_param),
        (of_param, of_state),
        param,
        state,
        param,
        donate_argnums=(1, 2),
    )
    assert count_kernels(text) == 1
    assert not collectives
    assert "copy" not in operations
    assert memory.temp_size_in_bytes < 1024
    # Each GPU has half of the parameter, its codes and their absmax.
    assert memory.alias_size_in_bytes >= 512 * 1024 * (2 + 1 + 1) // 2
