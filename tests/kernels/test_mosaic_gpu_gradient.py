"""The product across the rows of a 4-bit matrix for Hopper, on machines without one.

It is the gradient of the other product, and the tests of that one cover the choice
between the two and the supported calls. Here the compiled kernel is emulated
instruction by instruction and compared with float64, within the bound that
`gradient.Config` states. Instructions and registers are counted.
"""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
import test_mosaic_gpu_matmul as product
from kernel_checks import check_compiled

from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_gradient as gradient

BF16, F16 = jnp.bfloat16, jnp.float16
WIDE, NARROW = gradient.Config(8, 256, 128, 1), gradient.Config(128, 128, 64, 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("m", "n", "size", "block_size", "dtype", "config", "options"),
    [
        # A tile has eight blocks next to each other. Parts have one, two and two tiles;
        # the last part begins within the one before it.
        (16, 520, 256, 32, BF16, gradient.Config(16, 256, 128, 3), {}),
        # Four blocks per tile, and two tiles.
        (3, 200, 512, 64, BF16, None, {}),
        # Two blocks per tile.
        (2, 128, 256, 128, F16, None, {"double_quant": True, "x_dtype": np.float32}),
        # Tiles have half the columns: one block.
        (33, 256, 128, 128, F16, gradient.Config(64, 128, 128, 2), {}),
        # W has fewer rows than a tile, which would have more nested absmax.
        (33, 40, 512, 32, BF16, None, {"double_quant": True}),
        # Several matrices, like experts'.
        (5, 136, 256, 32, BF16, None, {"double_quant": True, "count": 3}),
    ],
    ids=str,
)
def test_emulated(m, n, size, block_size, dtype, config, options):
    config = config or gradient.heuristic(m, n, size, options.get("count", 1))
    program, kernel = product.check_emulated(
        m, n, size, block_size, dtype, config, **options
    )
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.remarks == []
    assert kernel.registers <= 255
    # The absmax never exist as a float32 array, which would have the codes' shape.
    if options.get("double_quant"):
        assert f"{n},{size // block_size}]" in program.as_text().replace("f32", "")
        assert f"f32[{n},{size // block_size}]" not in program.as_text()


@pytest.mark.parametrize(("config", "dtype"), [(WIDE, BF16), (NARROW, F16)], ids=str)
def test_emulated_decoder_of_every_byte(config, dtype):
    """The unit matrix times W gives the levels, with each byte in each place."""
    _, kernel = product.compiled(256, 256, 256, 64, dtype, config)
    x = np.eye(256, dtype=dtype)[None]
    row, byte = np.indices((256, 128))
    codes = ((row + 37 * byte) % 256).astype(np.uint8)[None]
    # Each block's absmax is a power of two, so each level shows its block.
    exponent = np.indices((256, 4)).sum(0) % 7 - 3
    absmax = 2.0 ** exponent.astype(np.float32)[None]
    for name, codebook in product.CODEBOOKS.items():
        got = product.emulated(kernel, name, (x, codes, absmax), 64, dtype, config)
        pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(256, 256)
        levels = codebook.astype(dtype)[pairs].astype(np.float32)
        expected = levels * np.repeat(absmax[0], 64, axis=-1)
        # Exact except for float16's smallest numbers.
        atol = 2.0**-25 if dtype == F16 else 0
        np.testing.assert_allclose(
            got[0].astype(np.float32), expected, rtol=0, atol=atol
        )


@pytest.mark.parametrize(
    ("m", "size", "double_quant", "most"),
    [
        (8, 4096, False, 4),
        (8, 4096, True, 4.1),
        (128, 4096, False, 5.25),
    ],
)
def test_instructions_a_weight(m, size, double_quant, most):
    """Counts the loop over tiles, which takes almost all of the time."""
    config = gradient.heuristic(m, 4096, size)
    program, kernel = product.compiled(
        m, 4096, size, 64, BF16, config, double_quant=double_quant
    )
    weights = config.block_n * config.block_k / 128
    counts = collections.Counter(name.split(".")[0] for name in kernel.loop)
    # Each weight takes 2, as in the other product, and an eighth to interleave the
    # codes of two rows. If these have two bytes each, another eighth joins them.
    prmt = 2.125 if config.block_n == 256 else 2.25
    assert prmt * weights <= counts["PRMT"] <= (prmt + 0.25) * weights
    # Scaling takes one instruction for two levels.
    assert counts["HMUL2"] == weights / 2
    assert len(kernel.loop) <= most * weights
    products = (config.block_n // 64) * (config.block_k // 16)
    assert counts["HGMMA"] == products
    x_bytes = 2 * config.block_m * 4096
    around = {"fusion", "transpose", "reduce", "add", "convert", "pad", "slice"}
    check_compiled(
        program,
        kernel,
        # The first tile's reads and the writes add to it: sums of 16 bytes per lane.
        instructions=len(kernel.loop) + config.block_m * config.block_n / 128 * 2 + 300,
        elements=1,
        registers=255,
        around=around,
        temporary_bytes=x_bytes + 4 * config.split_k * config.block_m * size + 1024,
    )


def test_the_heuristic():
    for m in (1, 8, 9, 32, 33, 64, 65, 512):
        for n, size in [(1, 128), (64, 256), (4096, 4096), (4096, 14336), (100, 4224)]:
            config = gradient.heuristic(m, n, size)
            assert config.block_m in (8, 16, 32, 64, 128)
            assert config.block_m >= min(m, 128)
            assert size % config.block_n == 0
            assert 1 <= config.split_k <= -(-n // config.block_k)
    # For few columns of W and rows of x, the parts fill the multiprocessors.
    assert gradient.heuristic(1, 4096, 4096).split_k == 16
    assert gradient.heuristic(1, 4096, 14336).split_k == 4
    assert gradient.heuristic(512, 4096, 14336).split_k == 1
