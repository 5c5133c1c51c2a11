"""Runs a kernel's PTX in NumPy, to compute what a GPU would write.

All threads execute the instructions together, as rows of arrays, so all or none must
take a branch. A register has 64 bits. Memory is checked: an access outside a buffer, or
a misaligned one, raises. Barriers only matter for a warpgroup's products, in
`wgmma_emulator`. The emulator does not show timing, or races that lockstep hides.
"""

import re

import ml_dtypes
import numpy as np
import wgmma_emulator

WARP = 32
THREADS = 128
SHARED_BYTES = 1 << 16
# Positions of the kernel's buffers and shared memory in the address space.
BUFFER_BITS = 40
SHARED = 1 << 60
BITS_OF = {16: np.uint16, 32: np.uint32, 64: np.uint64, 8: np.uint8}
FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
FLOATS["bf16"] = ml_dtypes.bfloat16


def run(ptx, buffers, grid, *, together=True, only=None, read=None):
    """Runs a kernel with one warpgroup per block.

    Args:
        ptx: text of the kernel.
        buffers: uint8 arrays in the order of the kernel's parameters, which is the
            order of their first use. The kernel writes its results to them.
        grid: number of blocks along x, y and z.
        together: whether to run all blocks at once, which is faster, or one by one, for
            blocks that branch differently.
        only: numbers of the blocks to run; None for all.
        read: arrays like the buffers, in which bytes that are read become nonzero.
    """
    count = np.prod(grid, dtype=np.uint64)
    blocks = np.arange(count) if only is None else np.asarray(only)
    blocks = blocks.astype(np.uint64)
    for group in [blocks] if together else blocks[:, None]:
        _Machine(ptx, buffers, grid, group, read).run()


class _Machine:
    def __init__(self, ptx, buffers, grid, blocks, read_bytes=None):
        self.program, self.labels = _parse(ptx)
        self.buffers = buffers
        self.read_bytes = read_bytes
        self.shape = (len(blocks), THREADS)
        self.shared = np.zeros((len(blocks), SHARED_BYTES), np.uint8)
        self.products = wgmma_emulator.Products(self.shared)
        self.row = np.indices(self.shape)[0]
        block = np.broadcast_to(blocks[:, None], self.shape)
        thread = np.broadcast_to(np.arange(THREADS, dtype=np.uint64), self.shape)
        x, y, _ = (np.uint64(extent) for extent in grid)
        self.registers = {
            "%tid.x": thread,
            "%ctaid.x": block % x,
            "%ctaid.y": block // x % y,
            "%ctaid.z": block // (x * y),
        }

    def run(self):
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.program):
                predicate, name, operands = self.program[at]
                active = self.active(predicate)
                at += 1
                if name.startswith("ret"):
                    assert active.all()
                    return
                if name.startswith("bra"):
                    assert active.all() or not active.any(), "a divergent branch"
                    at = self.labels[operands[0]] if active.all() else at
                else:
                    self.step(name.split("."), operands, active)

    def active(self, predicate):
        if predicate is None:
            return np.ones(self.shape, bool)
        value = self.read(predicate.lstrip("!")).astype(bool)
        return ~value if predicate.startswith("!") else value

    def read(self, operand):
        """Returns an operand's bits: a row for each block, a column for each thread."""
        self.products.check_read(operand)
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):
            raise KeyError(f"{operand} is read before it is written")
        if operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand.startswith("__dynamic_shmem"):
            value = SHARED
        elif operand in ("true", "false"):
            value = operand == "true"
        else:
            value = int(operand.rstrip("U"), 0)
        return np.full(self.shape, value % 2**64, np.uint64)

    def write(self, operand, value, active):
        if operand == "_":
            return
        self.products.note_write(operand)
        bits = _bits(value)
        before = self.registers.get(operand, np.zeros(self.shape, np.uint64))
        self.registers[operand] = np.where(active, bits, before)

    def typed(self, operand, kind):
        """Returns an operand as the type that an instruction names, e.g. "s32"."""
        bits = self.read(operand)
        if kind == "pred":
            return bits.astype(bool)
        width = int(kind.strip("bfsu"))
        words = bits.astype(BITS_OF[width])
        if kind in FLOATS:
            return words.view(FLOATS[kind])
        return words.view(f"i{width // 8}") if kind[0] == "s" else words

    def address(self, operand):
        base, _, offset = operand.strip("[]").partition("+")
        return self.read(base) + np.uint64(int(offset or "0", 0) % 2**64)

    def at(self, address, num_bytes, active):
        """Returns ``(memory, index)`` of each byte that active threads address."""
        address = address[active]
        offsets = np.arange(num_bytes, dtype=np.int64)
        if address.size and np.all(address >= SHARED):
            within = (address - np.uint64(SHARED)).astype(np.int64)
            return self.shared, (self.row[active][:, None], within[:, None] + offsets)
        (number,) = set((address >> np.uint64(BUFFER_BITS)).tolist())
        within = (address & np.uint64(2**BUFFER_BITS - 1)).astype(np.int64)
        assert np.all(within % num_bytes == 0), "misaligned"
        return self.buffers[number - 1], (within[:, None] + offsets,)

    def step(self, name, operands, active):
        op, *suffixes = name
        kind = suffixes[-1] if suffixes else ""
        if suffixes[:1] == ["mma_async"]:
            sums, left, descriptor = operands
            return self.products.multiply(
                ".".join(name), sums, left, descriptor, self.registers, self.shared
            )
        if op in ("bar", "barrier", "fence", "membar", "wgmma"):
            return self.products.synchronise(".".join(name), *operands)
        if op == "mma":
            return self.mma(suffixes, operands)
        if op == "cp":
            return self.copy(suffixes, operands, active)
        if op in ("ld", "st"):
            return self.memory(op, suffixes, operands, active)
        if op == "elect":
            target, predicate = operands[0].split("|")
            lane = self.registers["%tid.x"] % np.uint64(WARP)
            self.write(target, np.zeros(self.shape, np.uint32), active)
            self.write(predicate, (lane == 0).astype(np.uint8), active)
            return
        if op == "mov" and operands[0].startswith("{"):
            parts = _split(operands[0][1:-1])
            width = int(kind[1:]) // len(parts)
            bits = self.read(operands[1])
            for i, part in enumerate(parts):
                self.write(part, (bits >> np.uint64(i * width)) & _mask(width), active)
            return
        if op == "mov" and operands[1].startswith("{"):
            parts = _split(operands[1][1:-1])
            width = int(kind[1:]) // len(parts)
            bits = sum(
                (self.read(part) & _mask(width)) << np.uint64(i * width)
                for i, part in enumerate(parts)
            )
            self.write(operands[0], bits, active)
            return
        if op == "shfl":
            self.write(operands[0], self.shuffle(suffixes, operands), active)
            return
        if op == "cvt":
            self.write(operands[0], self.convert(suffixes, operands), active)
            return
        if op == "selp":
            a, b = (self.typed(x, kind) for x in operands[1:3])
            chosen = np.where(self.typed(operands[3], "pred"), a, b)
            self.write(operands[0], chosen, active)
            return
        if op == "setp":
            self.write(operands[0], self.compare(suffixes, operands), active)
            return
        if kind.endswith("16x2"):
            self.write(operands[0], self.pairs(op, suffixes, operands), active)
            return
        kind = kind if kind else "b64"
        values = [self.typed(x, kind) for x in operands[1:]]
        flush = _flush if "ftz" in suffixes else lambda x: x
        result = flush(_arithmetic(op, suffixes, kind, [flush(x) for x in values]))
        if "relu" in suffixes or "sat" in suffixes:
            raise NotImplementedError(name)
        self.write(operands[0], result, active)

    def pairs(self, op, suffixes, operands):
        """Computes with the two numbers in each 32-bit register."""
        *suffixes, kind = suffixes
        bits = [self.read(x) for x in operands[1:]]
        low, high = (
            _arithmetic(
                op,
                suffixes,
                kind[:-2],
                [(b >> shift).astype(np.uint16).view(FLOATS[kind[:-2]]) for b in bits],
            )
            for shift in (np.uint64(0), np.uint64(16))
        )
        return _bits(high) << np.uint64(16) | _bits(low)

    def memory(self, op, suffixes, operands, active):
        width = int(suffixes[-1][1:]) // 8
        target, source = operands
        if "param" in suffixes:
            number = int(re.search(r"param_(\d+)", source)[1])
            base = np.uint64((number + 1) << BUFFER_BITS)
            self.write(target, np.full(self.shape, base), active)
            return
        values, where = (target, source) if op == "ld" else (source, target)
        values = _split(values[1:-1]) if values.startswith("{") else [values]
        if not active.any():
            return
        memory, index = self.at(self.address(where), width * len(values), active)
        if op == "ld":
            if self.read_bytes is not None and memory is not self.shared:
                number = next(i for i, b in enumerate(self.buffers) if b is memory)
                self.read_bytes[number][index] = 1
            words = np.ascontiguousarray(memory[index]).view(BITS_OF[8 * width])
            for i, register in enumerate(values):
                word = np.zeros(self.shape, np.uint64)
                word[active] = words[:, i]
                if suffixes[-1][0] == "s":
                    signed = word.astype(BITS_OF[8 * width]).view(f"i{width}")
                    word = signed.astype(np.int64).view(np.uint64)
                self.write(register, word, active)
        else:
            words = [self.read(v)[active].astype(BITS_OF[8 * width]) for v in values]
            if memory is self.shared:
                self.products.note_store(index)
            memory[index] = np.stack(words, axis=-1).view(np.uint8)

    def mma(self, suffixes, operands):
        """Computes each warp's product exactly and rounds once, as `wgmma_emulator`."""
        *shape, of_sums, of_left, of_right, of_result = suffixes
        assert shape[:2] + shape[3:] == ["sync", "aligned", "row", "col"]
        # With 8 columns, there is only one half.
        halves = {"m16n8k16": 2, "m16n8k8": 1}[shape[2]]
        assert (of_sums, of_left, of_result) == ("f32", of_right, "f32")
        results, *read = (_split(operand[1:-1]) for operand in operands)
        a, b = (
            # (block, warp, row, lane of the row, register, element)
            np.stack([self.read(r).astype(np.uint32) for r in registers], axis=-1)
            .view(FLOATS[of_left])
            .astype(np.float64)
            .reshape(len(self.shared), -1, 8, 4, len(registers), 2)
            for registers in read[:2]
        )
        # The registers of the left operand are upper and lower rows of each half.
        a = a.reshape(*a.shape[:4], halves, 2, 2)
        products = np.einsum("bwrlhxe,bwclhe->bwrcx", a, b)
        # Lane l of a row has columns 2 l and 2 l + 1.
        products = products.reshape(*products.shape[:3], 4, 2, 2)
        products = products.transpose(0, 1, 2, 3, 5, 4).reshape(*self.shape, 4)
        for i, (result, before) in enumerate(zip(results, read[2], strict=True)):
            total = self.typed(before, "f32") + products[..., i]
            self.write(result, total.astype(np.float32), np.ones(self.shape, bool))

    def copy(self, suffixes, operands, active):
        """Copies at once what a GPU copies asynchronously."""
        if "shared" not in suffixes:
            return
        *where, num_bytes = operands
        target, source = (
            self.at(self.address(x), int(num_bytes), active) for x in where
        )
        if target[0] is self.shared:
            self.products.note_store(target[1])
        target[0][target[1]] = source[0][source[1]]

    def shuffle(self, suffixes, operands):
        bits, offset = (self.read(x).astype(np.int64) for x in operands[1:3])
        lane = np.arange(self.shape[1]) % WARP
        offset = offset.reshape(self.shape)
        source = {"idx": offset, "bfly": lane ^ offset, "down": lane + offset}
        source = np.clip(source[suffixes[1]], 0, WARP - 1)
        warp = np.arange(self.shape[1]) // WARP * WARP
        return np.take_along_axis(bits, source + warp, axis=1).view(np.uint64)

    def compare(self, suffixes, operands):
        kind = suffixes[-1]
        a, b = (self.typed(x, kind) for x in operands[1:3])
        relation = suffixes[0]
        unordered = relation.endswith("u") and kind in FLOATS
        results = {
            "eq": a == b,
            "ne": a != b,
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
        }
        if relation in ("nan", "num"):
            is_nan = np.isnan(a) | np.isnan(b)
            return is_nan if relation == "nan" else ~is_nan
        if unordered:
            return results[relation[:2]] | np.isnan(a) | np.isnan(b)
        result = results[
            {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(relation, relation)
        ]
        if kind in FLOATS and relation == "ne":
            result = result & ~np.isnan(a) & ~np.isnan(b)
        return result

    def convert(self, suffixes, operands):
        *rounding, target, source = suffixes
        if target in ("bf16x2", "f16x2"):
            high, low = (
                self.typed(x, source).astype(FLOATS[target[:-2]]) for x in operands[1:3]
            )
            return _bits(high) << np.uint64(16) | _bits(low)
        value = self.typed(operands[1], source)
        if source in FLOATS:
            for mode, function in (
                ("rni", np.rint),
                ("rpi", np.ceil),
                ("rmi", np.floor),
                ("rzi", np.trunc),
            ):
                value = function(value) if mode in rounding else value
        if target in FLOATS:
            return value.astype(FLOATS[target])
        width = int(target[1:])
        if source in FLOATS:
            limits = np.iinfo(f"{'i' if target[0] == 's' else 'u'}{width // 8}")
            value = np.clip(np.nan_to_num(value, nan=0), limits.min, limits.max)
            value = value.astype(np.float64).astype(np.int64)
        # Narrowing drops bits; widening repeats a signed source's sign.
        wide = value.astype(np.int64).view(np.uint64)
        return wide & _mask(width) if target[0] != "s" else wide & _mask(max(width, 32))


def _flush(x):
    """Replaces subnormal numbers by zero."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x * 0, x), x)


def _arithmetic(op, suffixes, kind, v):
    is_float = kind in FLOATS
    if op == "mul" and "wide" in suffixes:
        return v[0].astype(f"{v[0].dtype.kind}8") * v[1].astype(f"{v[0].dtype.kind}8")
    if op == "mad" and "wide" in suffixes:
        raise NotImplementedError("mad.wide")
    if op == "mul" and "hi" in suffixes:
        wide = v[0].astype(f"{v[0].dtype.kind}8") * v[1].astype(f"{v[0].dtype.kind}8")
        return (wide >> int(kind.strip("su"))).astype(v[0].dtype)
    if op in ("fma", "mad"):
        if not is_float:
            return v[0] * v[1] + v[2]
        # Rounding to 64 bits, then to 24, rounds twice in one case of 2^40.
        wide = [x.astype(np.longdouble) for x in v]
        return (wide[0] * wide[1] + wide[2]).astype(v[0].dtype)
    if op in ("min", "max") and is_float:
        nan = {"min": np.minimum, "max": np.maximum}[op]
        number = {"min": np.fmin, "max": np.fmax}[op]
        return (nan if "NaN" in suffixes else number)(*v)
    if op in ("shl", "shr"):
        amount = np.minimum(v[1].astype(np.uint32), 63).astype(np.int64)
        wide = v[0].astype(np.int64 if v[0].dtype.kind == "i" else np.uint64)
        amount = amount.astype(wide.dtype)
        shifted = wide << amount if op == "shl" else wide >> amount
        return shifted.astype(v[0].dtype)
    if op == "bfe":
        value, start, length = (x.astype(np.uint64) for x in v)
        assert kind[0] != "s"
        return (value >> start) & ((np.uint64(1) << length) - np.uint64(1))
    if op == "lop3":
        # Each bit of the last operand is the result for one set of three bits.
        places = list(zip(v[:3], (2, 1, 0), strict=True))
        result = np.zeros_like(v[0])
        for i in range(8):
            bits = [x if i >> place & 1 else ~x for x, place in places]
            chosen = np.where(v[3] >> i & 1, ~np.zeros_like(v[0]), 0)
            result |= bits[0] & bits[1] & bits[2] & chosen
        return result
    if op == "prmt":
        both = (v[1].astype(np.uint64) << np.uint64(32)) | v[0].astype(np.uint64)
        result = np.zeros_like(both)
        for i in range(4):
            selector = (v[2].astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            assert np.all(selector < 8)
            byte = (both >> (selector * np.uint64(8))) & np.uint64(255)
            result |= byte << np.uint64(8 * i)
        return result
    functions = {
        "mov": lambda a: a,
        "cvta": lambda a: a,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b if is_float else a // b,
        "rem": lambda a, b: a % b,
        "min": np.minimum,
        "max": np.maximum,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a,
        "neg": lambda a: -a,
        "abs": np.abs,
        "copysign": lambda a, b: np.copysign(b, a),
        # Exactly rounded, although a GPU may be off by a unit in the last place.
        "rcp": lambda a: np.float32(1) / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    }
    if functions.get(op) is None:
        raise NotImplementedError(".".join((op, *suffixes)))
    return functions[op](*v)


def _bits(value):
    value = np.asarray(value)
    if value.dtype == bool:
        return value.astype(np.uint64)
    return value.view(BITS_OF[8 * value.dtype.itemsize]).astype(np.uint64)


def _mask(width):
    return np.uint64(2**width - 1)


def _split(text):
    """Splits at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text)]


def _parse(ptx):
    """Returns ``[(predicate, name, operands)]`` and each label's position."""
    body = re.search(r"\.entry.*?\n\{(.*)\n\}", ptx, re.DOTALL)[1]
    program, labels = [], {}
    for line in re.sub(r"//.*", "", body).splitlines():
        line = line.strip()
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label[1]] = len(program)
        elif "wgmma.mma_async" in line:
            program.append(wgmma_emulator.parse(line))
        elif line and not line.startswith((".", "{", "}")):
            found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*?);", line)
            assert found, line
            predicate, name, operands = found.groups()
            name = name.replace("::", ".")
            program.append((predicate, name, _split(operands) if operands else []))
    return program, labels
