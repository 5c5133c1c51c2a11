"""The kernels on other GPUs than Hopper, none of which is here.

Most have the source of the kernels for Hopper, which the other files test. So this file
checks what depends on the GPU: that each compiles there without spills, how many
instructions it takes and how many of them start, and the numbers of the compiled code,
emulated instruction by instruction. The products by ``mma.sync`` are compared with
float64 within the bounds that their ``Config`` states.
"""

import math
import mmap
import os
import re

import gpu_programs
import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
import test_mosaic_gpu as blockwise
import test_mosaic_gpu_matmul as product
import test_mosaic_gpu_update as step
from count_bytes import ELEMENTS, T4_ELEMENTS, bytes_moved
from kernel_checks import lowered_for

from jaxbnb_kernels import _architecture
from jaxbnb_kernels.embed_blockwise import mosaic_gpu_kernel as embed_kernel
from jaxbnb_kernels.grouped_matmul_blockwise import mosaic_gpu_kernel as grouped_kernel
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_lookup as lookup
from jaxbnb_kernels.matmul_blockwise import mosaic_gpu_kernel_mma_forward as mma_forward
from jaxbnb_kernels.matmul_blockwise import (
    mosaic_gpu_kernel_mma_gradient as mma_gradient,
)
from jaxbnb_kernels.quantize_blockwise import dequantize_absmax

# Each with another instruction set, or with as many bytes of shared memory as none.
GPUS = ["a100", "rtx3090", "rtx4090", "b200", "rtx5090"]


def target(gpu):
    name, capability, cores = hopper_compiler.GPUS[gpu]
    return _architecture.Target(name, cores, "cuda", capability)


# Which of them run.


def test_the_names_of_gpus():
    for name, capability, _ in hopper_compiler.GPUS.values():
        device = jax.sharding.AbstractDevice(name, 7, "cuda")
        is_known = capability in _architecture.ARCHITECTURES
        gpu = _architecture.describe(device)
        assert gpu is not None
        assert (gpu.capability, gpu.cores) == (capability if is_known else None, 7)


def test_as_many_start_as_run_at_once():
    assert target("h100").at_once(4 * 132, 48 << 10) == 4 * 132
    # 164 KiB of shared memory hold three of 48 KiB, and 100 KiB hold two.
    assert target("a100").at_once(4 * 132, 48 << 10) == 3 * 108
    assert target("rtx4090").at_once(4 * 132, 48 << 10) == 2 * 128
    assert target("rtx4090").at_once(2 * 132) == 2 * 128
    unnamed = _architecture.Target("NVIDIA A100-PCIE-40GB", None, "cuda", "8.0")
    assert unnamed.at_once(4 * 132) == 4 * 108


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 1), reason="needs jax 0.11.1")
def test_exported_for_a_named_gpu_its_kernel_is_chosen():
    run, args = blockwise.OPERATIONS["matmul"]
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA L4"):
        exported = blockwise.exported_for(name, run, args, None)
        assert "@mosaic_gpu" in exported.mlir_module()


# What the compiler made of them.


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that all processes of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.mark.parametrize("gpu", GPUS)
def test_compiled(gpu, folder):
    programs = gpu_programs.compiled(gpu, tuple(gpu_programs.PROGRAMS), folder=folder)
    for name, program in programs.items():
        check_compiled(program, name, gpu)
    check_instructions(programs)
    check_bytes(programs)


def test_compiled_for_one(a100):
    for name, program in a100.items():
        check_compiled(program, name, "a100")


def test_compiled_for_a_t4(t4):
    for name, program in t4.items():
        # Its shared memory holds the tables of one warpgroup only.
        has_tables = name in ("adam", "whole step")
        check_compiled(program, name, "t4", registers=255 if has_tables else 128)
    moved = {name: bytes_moved(t4[name].text) for name in T4_ELEMENTS}
    of_row, of_step = (moved[name] / T4_ELEMENTS[name] for name in T4_ELEMENTS)
    assert 0.56 < of_row <= 0.60
    assert 10 < of_step <= 10.5
    # Without products of bfloat16, W is decoded first.
    run, args = gpu_programs.PROGRAMS["one row"]()
    mesh = hopper_compiler.mesh(gpu="t4")
    text = lowered_for(mesh, lambda *args: run(*args), *args)
    assert "dequantize_blockwise" in text


def check_compiled(program, name, gpu, registers=128):
    kernel = program.kernel
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.remarks == []
    # Two warpgroups on a multiprocessor can have 255 registers each, and four 128.
    kinds = "one row", "product", "gradient", "experts"
    is_product = any(of in name for of in kinds)
    assert kernel.registers <= (255 if is_product else registers)
    # It is for this GPU, and not for another one's matrix instructions.
    capability = hopper_compiler.GPUS[gpu][1].replace(".", "")
    assert re.search(rf"\.target sm_{capability}", kernel.ptx)
    assert ("mma.sync" in kernel.ptx) == is_product
    assert "wgmma" not in kernel.ptx


def check_instructions(programs):
    """A GPU issues more of them in the time of the bytes: see docs/kernels.md."""
    # Elements or weights of a thread, and instructions for each.
    for name, of_thread, most in [
        ("dequantize", 32, 9),
        ("quantize", 32, 28),
        ("one row", 128, 4),
        ("gradient", 256, 4.2),
        ("one row of int8", 64, 5),
        ("gradient of bytes", 64, 6.5),
        ("whole step", 16, 80),
    ]:
        kernel = programs[name].kernel
        body = kernel.loop if len(kernel.loop) > of_thread else kernel.sass
        assert of_thread < len(body) <= most * of_thread
    # The reads of the next tile: eight bytes of codes each, absmax, and rows of x. All
    # are under way while this one is multiplied.
    loop = programs["one row"].kernel.loop
    assert sum(re.match(r"LDG?\b", read) is not None for read in loop) == 16


def check_bytes(programs):
    """A product moves its codes and absmax once, and a step happens in place."""
    moved = {name: bytes_moved(programs[name].text) for name in ELEMENTS}
    assert 0.56 < moved["one row"] / ELEMENTS["one row"] <= 0.60
    of_int8 = moved["one row of int8"] / ELEMENTS["one row of int8"]
    assert 1.06 < of_int8 <= 1.10
    assert 10 < moved["whole step"] / ELEMENTS["whole step"] <= 10.5
    for name in ELEMENTS:
        assert programs[name].temporary_bytes <= 2**20


# The numbers.

# Like `product.ORDERS`. The product reads the first codes before the table. A table
# that is not sliced on its way to code below Pallas counts as used last.
FORWARD_ORDERS = {3: (1, 2, 3, 0, 4), 5: (5, 1, 2, 3, 0, 4, 7, 6)}
BYTES_ORDERS = {3: (1, 2, 3, 4, 0), 5: (5, 1, 2, 3, 4, 7, 0, 6)}


def emulated(kernel, buffers, grid, only=None):
    flat = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in buffers]
    ptx_emulator.run(kernel.ptx, flat, grid, only=only)


@pytest.fixture
def a100(monkeypatch, folder):
    """Makes kernels that are traced without a GPU take this one for granted."""
    monkeypatch.setattr(_architecture, "HOPPER", target("a100"))
    names = "dequantize", "quantize", *gpu_programs.MORE_PROGRAMS
    return gpu_programs.compiled("a100", names, folder=folder)


@pytest.fixture
def t4(monkeypatch, folder):
    """Like `a100`, for a T4."""
    monkeypatch.setattr(_architecture, "HOPPER", target("t4"))
    return gpu_programs.compiled("t4", gpu_programs.T4_PROGRAMS, folder=folder)


def test_emulated_codec(a100):
    check_codec(a100)


def check_codec(programs):
    codes, absmax = blockwise.encoded("nf4", 96, 64)
    kernel = programs["dequantize"].kernel
    got = blockwise.emulated_dequantize(kernel, "nf4", codes, absmax, 64, jnp.bfloat16)
    expected = blockwise.decoded_by_numpy(codes, absmax, "nf4", 64, jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))
    x = blockwise.values_to_encode(96, 64, jnp.bfloat16)
    kernel = programs["quantize"].kernel
    blockwise.check_emulated_quantize(kernel, "nf4", x, 64, (2, 1, 1))


def test_emulated_on_a_t4(t4):
    check_codec(t4)
    check_step(t4, "adam")
    for transpose in (True, False):
        for name in ("long blocks", "bytes"):
            check_product(t4, name, transpose)


def test_emulated_embed(a100):
    ids, codes, absmax = blockwise.rows_to_embed()
    of_rows = absmax[ids]
    out = np.full(ids.size * 20 * 64 * 2, 0xA5, np.uint8)
    num_tiled, columns = embed_kernel.tile_of(20, 64, np.dtype(jnp.bfloat16))
    table = np.resize(blockwise.CODEBOOKS["nf4"], 128)
    grid = ids.size * -(-20 // num_tiled), 64 // columns, 1
    emulated(a100["embed"].kernel, [ids, codes, of_rows, table, out], grid)
    expected = blockwise.decoded_by_numpy(codes[ids], of_rows, "nf4", 64, jnp.bfloat16)
    np.testing.assert_array_equal(
        out.view(jnp.bfloat16).astype(np.float32), expected.astype(np.float32)
    )


@pytest.mark.parametrize("name", ["adam", "lion"])
def test_emulated_step(name, a100):
    check_step(a100, name)


def check_step(programs, name):
    _, (scalars, grad, moments, param), _ = gpu_programs.MORE_PROGRAMS[name]()
    rule, *_ = step.rule_of(name, True)
    kernel = programs[name].kernel
    got = step.emulate(kernel, scalars, grad, moments, param, (2, 1, 1))
    expected = step.stepped_by_numpy(rule, scalars, grad, moments, param, 256)
    step.check_equal(got, *expected)


@pytest.mark.parametrize("transpose", [True, False], ids=["product", "gradient"])
@pytest.mark.parametrize("name", gpu_programs.PRODUCTS)
def test_emulated_product(name, transpose, a100):
    check_product(a100, name, transpose)


def check_product(programs, name, transpose):
    m, n, k, block_size, dtype, nested, codebook = gpu_programs.PRODUCTS[name]
    of = "product" if transpose else "gradient"
    kernel = programs[f"{of} of {name}"].kernel
    x, codes, absmax = args = product.operands(
        m, n, k, block_size, dtype, (1,), transpose, codebook
    )
    if nested:
        args = product.nest(*args)
        of_matrix = jnp.asarray(args[3][:, 0]), jnp.asarray(args[4][:, 0, 0])
        absmax = np.asarray(dequantize_absmax(args[2], *of_matrix))
    kind = lookup.NIBBLES if codebook in product.CODEBOOKS else lookup.BYTES
    module = mma_forward if transpose else mma_gradient
    config = module.heuristic(m, n, k, lookup=kind)
    order = None
    if kind is lookup.BYTES or transpose:
        orders = BYTES_ORDERS if kind is lookup.BYTES else FORWARD_ORDERS
        order = orders[len(args)]
    # The levels are an operand; those of linear int8 have a unit too.
    for other in [codebook, "dynamic8"] if codebook == "fp8_e4m3" else [codebook]:
        got = product.emulated(kernel, other, args, block_size, dtype, config, order)
        product.check(got, other, x, codes, absmax, block_size, dtype, config)


# The same for experts, which read the place of their tile first.
EXPERTS_ORDERS = {
    ("nested", True): (4, 6, 1, 2, 3, 0, 5, 8, 7),
    ("nested", False): (4, 0, 6, 1, 2, 3, 5, 8, 7),
    ("bytes", True): (4, 1, 2, 3, 5, 0),
    ("bytes", False): (4, 1, 2, 3, 5, 0),
}


@pytest.mark.parametrize("transpose", [True, False], ids=["product", "gradient"])
@pytest.mark.parametrize("name", gpu_programs.EXPERTS)
def test_emulated_experts(name, transpose, a100):
    (_, _, _, block_size, dtype, _, codebook), _ = gpu_programs.EXPERTS[name]
    of = "product" if transpose else "gradient"
    kernel = a100[f"experts' {of} of {name}"].kernel
    x, sizes, codes, absmax, *nested = gpu_programs.experts(name, transpose)
    weight = product.weight_of(codes, absmax, block_size, codebook, tuple(nested))
    # Tiles without rows leave their loops at once.
    order = EXPERTS_ORDERS[name, transpose]
    with product.emulating(kernel, order, together=False) as read:
        (got,) = grouped_kernel.matmul(
            x,
            jnp.asarray(sizes),
            *map(jnp.asarray, (codes, absmax, *nested)),
            codebook=weight.codebook.tobytes(),
            block_size=block_size,
            size=weight.size,
            transpose=transpose,
            compute_dtype=np.dtype(dtype),
        )
    got = np.asarray(got)
    if nested:
        absmax = np.asarray(
            dequantize_absmax(jnp.asarray(absmax), *map(jnp.asarray, nested))
        )
    config = (mma_forward if transpose else mma_gradient).heuristic(16, 200, 512)
    ends = np.cumsum(sizes)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        rows = slice(end - size, end)
        if size:
            product.check(
                got[rows],
                codebook,
                x[rows],
                codes[group],
                absmax[group],
                block_size,
                dtype,
                config,
            )
    assert len(got) == len(x)
    np.testing.assert_array_equal(got[ends[-1] :].astype(np.float32), 0)
    # All codes of experts with rows, and none of the others.
    for group, size in enumerate(sizes):
        assert set(read[1].reshape(len(sizes), -1)[group].tolist()) == {int(size > 0)}


def test_the_tiles_of_experts():
    """Each row is in one tile, with its matrix, however many each expert has."""
    generator = np.random.default_rng(0)
    place_tiles = jax.jit(grouped_kernel.place_tiles, static_argnums=(1, 2))
    for groups, num_rows, block_m in [(1, 1, 8), (3, 40, 8), (8, 70, 16), (8, 2, 8)]:
        for total in 3 * [0, 1, num_rows]:
            shares = generator.dirichlet(np.full(groups, 0.3))
            sizes = generator.multinomial(total, shares).astype(np.int32)
            tiles = place_tiles(sizes, num_rows, block_m)
            found = np.full(num_rows, -1)
            for matrix, first, end in np.asarray(tiles):
                assert 0 <= matrix < groups
                # Rows that do not exist are filled up, a tile of them.
                assert 0 <= first <= num_rows
                rows = found[first : min(first + block_m, end)]
                assert np.all(rows == -1)
                rows[:] = matrix
            expected = np.repeat(np.arange(groups), sizes)
            np.testing.assert_array_equal(found[:total], expected)
            assert np.all(found[total:] == -1)


# Beyond 2^31 elements.


def sparse(shape, dtype):
    """Returns zeros that take no memory until they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    # Linux's MAP_NORESERVE, which Python 3.12 does not name.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    return np.frombuffer(mmap.mmap(-1, size, flags), dtype).reshape(shape)


def last_matrix(x_columns):
    """Returns x, codes and absmax that are zeros but for the last 256 rows of W."""
    layers, rows, columns = gpu_programs.MANY
    x, codes, absmax = product.operands(1, 256, columns, 64, jnp.bfloat16)
    all_codes = sparse((layers, rows, columns // 2), np.uint8)
    all_absmax = sparse((layers, rows, columns // 64), np.float32)
    all_codes[-1, -256:], all_absmax[-1, -256:] = codes, absmax
    all_x = sparse((layers, 8, x_columns), jnp.bfloat16)
    all_x[-1, 0] = np.resize(x, x_columns)
    return all_x, all_codes, all_absmax, codes, absmax


def test_the_last_of_many_decoded(a100):
    *_, all_codes, all_absmax, codes, absmax = last_matrix(8)
    out = sparse(gpu_programs.MANY, jnp.bfloat16)
    table = np.resize(blockwise.CODEBOOKS["nf4"], 128)
    tiles = math.prod(gpu_programs.MANY) // 4096
    kernel = a100["many decoded"].kernel
    buffers = [all_codes, all_absmax, table, out]
    emulated(kernel, buffers, (tiles, 1, 1), only=[tiles - 1])
    expected = blockwise.decoded_by_numpy(
        codes[-1, -2048:], absmax[-1, -64:], "nf4", 64, jnp.bfloat16
    )
    np.testing.assert_array_equal(
        out[-1, -1, -4096:].astype(np.float32), expected.astype(np.float32)
    )


@pytest.mark.parametrize("transpose", [True, False], ids=["products", "gradients"])
def test_the_last_of_many(transpose, a100):
    layers, rows, columns = gpu_programs.MANY
    x_columns, n = (columns, rows) if transpose else (rows, columns)
    x, all_codes, all_absmax, codes, absmax = last_matrix(x_columns)
    module = mma_forward if transpose else mma_gradient
    config = module.heuristic(1, rows, columns, layers)
    assert config.split_k == 1
    table = lookup.table(blockwise.CODEBOOKS["nf4"], np.dtype(jnp.bfloat16))
    out = sparse((layers, 1, n), jnp.bfloat16)
    grid = 1, n // config.block_n, layers
    kernel = a100["many products" if transpose else "many gradients"].kernel
    buffers = [table, all_codes, all_absmax, x, out]
    if transpose:
        buffers = [buffers[i] for i in FORWARD_ORDERS[3]]
    emulated(kernel, buffers, grid, only=[math.prod(grid) - 1])
    got = out[-1, :, -config.block_n :]
    if transpose:
        weight = codes[-config.block_n :], absmax[-config.block_n :]
        product.check(got, "nf4", x[-1, :1], *weight, 64, jnp.bfloat16, config)
    else:
        # The rows of W before these 256 are zeros.
        weight = codes[:, -config.block_n // 2 :], absmax[:, -config.block_n // 64 :]
        product.check(got, "nf4", x[-1, :1, -256:], *weight, 64, jnp.bfloat16, config)


def test_the_last_of_many_steps(a100):
    count = math.prod(gpu_programs.MANY) // 256
    rule, scalars, (signed,) = step.rule_of("momentum", True)
    grad, (moment,), param = step.state_of(
        (8, 256), (signed,), 256, *[np.dtype(jnp.bfloat16)] * 2
    )
    arrays = grad, param, moment.codes, moment.absmax
    whole = [sparse((count, *x.shape[1:]), x.dtype) for x in arrays]
    for of_all, last in zip(whole, arrays, strict=True):
        of_all[-8:] = last
    values = np.concatenate([np.stack(jax.tree.leaves(scalars)), np.zeros(4)])
    tables = step.mosaic_gpu_kernel.tables_of(signed)
    buffers = [*whole, values.astype(np.float32), *tables]
    kernel = a100["many steps"].kernel
    emulated(kernel, buffers, (count // 8, 1, 1), only=[count // 8 - 1])
    expected = step.stepped_by_numpy(rule, scalars, grad, (moment,), param, 256)
    step.check_equal([x[-8:] for x in whole[1:]], *expected)
