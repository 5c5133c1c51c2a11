"""A warpgroup's products in NumPy, and the rules for their operands.

`wgmma.mma_async` runs next to the threads. Its registers may not be read or written
before a wait, and its operands must have been fenced. This emulator computes at once,
which would hide such faults, so it checks the rules.

It sums an instruction's products exactly and rounds once; a GPU aligns and truncates
them in its own way. Sums of integers are exact in both.
"""

import re

import ml_dtypes
import numpy as np

TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "s8": np.int8}
SUMS = {"f32": np.float32, "s32": np.int32}
# Bits 7 to 9 of an address flip its bits 4 to 6, as far as the pattern is wide.
PATTERNS = {1: (128, 0b111), 2: (64, 0b11), 3: (32, 0b1)}
# States of shared memory: written, then fenced, both before a barrier of all warps.
WRITTEN, FENCED = 1, 2
IN_LINE = re.compile(
    r"\{ \.reg \.pred p; setp\.ne\.b32 p, 1, 0; "
    r"(wgmma\.mma_async\.\S+) \{(.*?)\}, \{(.*?)\}, (%\w+), p(?:, 1, 1, 0)?; \}"
)


def parse(line):
    """Parses a line with an accumulating product: ``(None, name, operands)``."""
    found = IN_LINE.fullmatch(line)
    assert found, line
    name, sums, left, descriptor = found.groups()
    return None, name, [sums.split(","), left.split(","), descriptor]


class Products:
    """The products in flight."""

    def __init__(self, shared):
        self.state = np.zeros(shared.shape, np.uint8)
        self.is_read = np.zeros(shared.shape, bool)
        self.unfenced = set()
        self.sums, self.left = set(), set()

    def check_read(self, register):
        assert register not in self.sums, f"{register} is read before the wait"

    def note_write(self, register):
        assert register not in self.left | self.sums, f"{register} is still in use"
        self.unfenced.add(register)

    def note_store(self, index):
        assert not self.is_read[index].any(), "shared memory is still read"
        self.state[index] = WRITTEN

    def synchronise(self, name, *operands):
        """Executes a barrier, or an instruction that orders products and memory."""
        if name.startswith("wgmma.fence"):
            self.unfenced.clear()
        elif name.startswith("fence.proxy.async"):
            self.state[self.state == WRITTEN] = FENCED
        elif name.startswith(("bar", "barrier")):
            self.state[self.state == FENCED] = 0
        elif name.startswith("wgmma.wait_group"):
            assert operands == ("0",), "only a wait for all of them is emulated"
            self.sums.clear()
            self.left.clear()
            self.is_read[:] = False

    def multiply(self, name, sums, left, descriptor, registers, shared):
        """Adds one instruction's product to the registers of its sums."""
        shape, of_sums, of_left, of_right = name.split(".")[-4:]
        rows, columns, depth = map(int, re.findall(r"\d+", shape))
        assert of_left == of_right
        dtype, sum_dtype = TYPES[of_left], SUMS[of_sums]
        assert (dtype == np.int8) == (sum_dtype == np.int32)
        # Elements in each lane's four bytes.
        together = 4 // np.dtype(dtype).itemsize
        assert (rows, depth) == (64, 8 * together)
        for register in left + sums:
            assert register not in self.unfenced, f"{register} is not fenced"
        assert not (set(left) & self.sums)
        blocks = len(shared)
        # (block, warp, row of eight, lane of the row, register, element)
        a = np.stack([_words(registers[r], dtype) for r in left], axis=-2)
        a = a.reshape(blocks, 4, 8, 4, 2, 2, together).astype(np.float64)
        # to (block, (warp, upper or lower rows, row), (half of depth, lane, element))
        a = a.transpose(0, 1, 5, 2, 4, 3, 6).reshape(blocks, rows, depth)
        index = _right_operand(registers[descriptor], columns, depth, 4 // together)
        index = np.arange(blocks)[:, None, None, None], index
        assert np.all(self.state[index] == 0), "shared memory is not committed"
        self.is_read[index] = True
        b = np.ascontiguousarray(shared[index]).view(dtype)[..., 0].astype(np.float64)
        product = np.einsum("bmk,bnk->bmn", a, b)
        # (block, warp, upper or lower rows, row, columns in eights, lane, pair)
        product = product.reshape(blocks, 4, 2, 8, columns // 8, 4, 2)
        product = product.transpose(0, 1, 3, 5, 4, 2, 6).reshape(blocks, 128, -1)
        for i, register in enumerate(sums):
            before = registers[register].astype(np.uint32).view(sum_dtype)
            after = (before + product[..., i]).astype(sum_dtype)
            registers[register] = after.view(np.uint32).astype(np.uint64)
        self.sums |= set(sums)
        self.left |= set(left)


def _words(bits, dtype):
    """Returns the numbers in each 32-bit register."""
    words = np.ascontiguousarray(bits.astype(np.uint32))
    return words.view(dtype).reshape(*bits.shape, -1)


def _right_operand(descriptor, columns, depth, itemsize):
    """Reads (block, column, depth): contiguous along the depth, in a pattern."""
    (value,) = {tuple(row) for row in descriptor.T.tolist()}
    value = np.array(value, np.uint64).astype(object)[:, None, None]
    start = (value & 0x3FFF) << 4
    stride = (value >> 32 & 0x3FFF) << 4
    width, mask = PATTERNS[int(value.flat[0]) >> 62]
    column = np.arange(columns)[:, None].astype(object)
    within = itemsize * np.arange(depth)[None, :].astype(object)
    address = start + column // 8 * stride + column % 8 * width + within
    address = address ^ ((address >> 7 & mask) << 4)
    return address.astype(np.int64)[..., None] + np.arange(itemsize)
