"""Prints docs/kernels.md's table: instructions per element, registers.

Run it after `make kernels`, which installs the compiler:

    PYTHONPATH=.venv/gpu:tests/kernels .venv/bin/python \\
        tests/kernels/count_instructions.py
"""

import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
import test_mosaic_gpu as blockwise
import test_mosaic_gpu_int8 as int8
import test_mosaic_gpu_matmul as product
import test_mosaic_gpu_update as update

import jaxbnb_kernels
from jaxbnb_kernels import _tiles
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_forward as forward
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_gradient as gradient
from jaxbnb_kernels.quantize_blockwise import mosaic_gpu_kernel as quantize
from jaxbnb_kernels.update_8bit import mosaic_gpu_kernel as step

DTYPE = np.dtype(jnp.bfloat16)


def show(name, instructions, elements, kernel):
    print(f"{name:32}{len(instructions) / elements:8.2f}{kernel.registers:6}")


if __name__ == "__main__":
    jaxbnb_kernels.config.mosaic_gpu = "always"
    for nested in (False, True):
        _, kernel = blockwise.compiled_dequantize("nf4", 4096, 64, DTYPE, nested)
        name = "NF4 nested dequantise" if nested else "NF4 dequantise"
        show(name, kernel.sass, _tiles.TILE / 128, kernel)
    rows = quantize.rows_encoded(64, DTYPE)
    # With more tiles than run at once, the kernel has a loop.
    blocks = 4 * rows * quantize.CONCURRENT_TILES
    _, kernel = blockwise.compiled_quantize("nf4", blocks, 64, DTYPE)
    show("NF4 quantise", kernel.loop, rows * 64 / 128, kernel)
    step.CONCURRENT_TILES = 2
    rows, _ = step.tile_of(256, DTYPE)
    for name in update.OPTIMIZERS:
        _, kernel = update.compiled(name, (16 * rows, 256), 256, DTYPE, DTYPE)
        show(f"8-bit {name}", kernel.loop, rows * 256 / 128, kernel)
    for of, nested, tokens in itertools.product(
        (forward, gradient), (False, True), (8, 16, 32, 64, 128)
    ):
        config = of.heuristic(tokens, 4096, 4096)
        _, kernel = product.compiled(
            tokens, 4096, 4096, 64, jnp.bfloat16, config, double_quant=nested
        )
        weights = config.block_n * config.block_k / 128
        name = "product" if of is forward else "gradient"
        name = f"nested {name}" if nested else name
        show(f"NF4 {name}, {tokens} rows", kernel.loop, weights, kernel)
    for tokens in (8, 64):
        for threshold in (0.0, 6.0):
            kernels = int8.compiled(tokens, 4096, 14336, "bfloat16", threshold)[2]
            kernel = kernels["matmul_int8"]
            # The loop may hold several tiles, each with eight integer products.
            products = sum(name.startswith("IGMMA") for name in kernel.loop)
            weights = products / 8 * 128
            name = f"int8 product, {tokens} rows" + ", outliers" * bool(threshold)
            show(name, kernel.loop, weights, kernel)
    kernel = int8.compiled(8, 4096, 14336, "bfloat16", 6.0)[2]["quantize_rows"]
    show("int8 rows of x, outliers", kernel.sass, 14336 / 128, kernel)
