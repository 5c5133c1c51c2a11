"""Handlers of the native CPU kernels refuse what does not fit together.

A program may be written by hand, or exported by another version. It must get an error
then: without one, a kernel would read and write outside of its arrays.
"""

import dataclasses
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import library

from jaxbnb_kernels import _cells, native
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.update_8bit.cpu_program import Op

CELLS, TABLE = _cells.of_codebook(DYNAMIC8_SIGNED.tobytes())
# (moment = moment * scalar + gradient, result = parameter - moment), of the values
# gradient, moment, parameter; result, new moment; scalar.
STEP = [[Op.FMA, 4, 1, 5, 0, 0], [Op.SUB, 3, 2, 4, 0, 0]]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a handler: ``(shape, dtype)`` of each operand and result."""

    operands: dict
    results: dict
    attributes: dict = dataclasses.field(default_factory=dict)

    def change(self, **changes):
        def update(old):
            return {name: changes.get(name, value) for name, value in old.items()}

        parts = (self.operands, self.results, self.attributes)
        return Call(*map(update, parts))

    def run(self, target):
        results = [jax.ShapeDtypeStruct(*result) for result in self.results.values()]
        arrays = [jnp.zeros(*operand) for operand in self.operands.values()]
        call = jax.ffi.ffi_call(f"jaxbnb_cpu_{target}", results)
        jax.block_until_ready(jax.jit(lambda *a: call(*a, **self.attributes))(*arrays))


def shaped(dtype, **shapes):
    return {name: (shape, dtype) for name, shape in shapes.items()}


CODES_4BIT, ABSMAX = shaped("uint8", codes=(6, 64)), shaped("float32", absmax=(6, 2))
BLOCK = {"block_size": np.int64(64)}
PRODUCT = {
    "nested_block_size": np.int64(256),
    "size": np.int64(128),
    "transpose": True,
    "compute_dtype": "bfloat16",
}
# Several matrices, so that the last one ends where the arrays end.
WEIGHT = shaped("uint8", codes=(3, 6, 64))
NESTED = shaped("float32", nested_absmax=(3, 1, 1), offset=(3, 1, 1), of_absmax=(256,))
Q, K = (2, 5, 4, 8), (2, 7, 2, 8)
SCALE = {"scale": np.float32(1)}
MASK = shaped("bool", mask=(2, 5, 7))

CALLS = {
    "matmul_dense": Call(
        shaped("float32", x=(3, 5, 128)) | shaped("bfloat16", weight=(3, 6, 128)),
        shaped("float32", y=(3, 5, 6)),
        {"transpose": True},
    ),
    "matmul_blockwise": Call(
        shaped("float32", x=(3, 5, 128))
        | WEIGHT
        | shaped("float32", absmax=(3, 6, 2), levels=(16,)),
        shaped("float32", y=(3, 5, 6)),
        BLOCK | PRODUCT,
    ),
    "matmul_blockwise, nested": Call(
        shaped("float32", x=(3, 5, 6))
        | WEIGHT
        | shaped("uint8", absmax=(3, 6, 2))
        | shaped("float32", levels=(16,))
        | NESTED,
        shaped("float32", y=(3, 5, 128)),
        BLOCK | PRODUCT | {"transpose": False},
    ),
    "matmul_int8": Call(
        shaped("bfloat16", x=(3, 5, 128))
        | shaped("int8", codes=(3, 6, 128))
        | shaped("float32", scale=(3, 6)),
        shaped("bfloat16", y=(3, 5, 6)),
        {"outlier_threshold": np.float32(6), "compute_dtype": "bfloat16"},
    ),
    "attend_dense": Call(
        shaped("bfloat16", q=Q, k=K, v=K) | MASK, shaped("bfloat16", out=Q), SCALE
    ),
    "attend_dense_gradient": Call(
        shaped("bfloat16", q=Q, k=K, v=K) | MASK | shaped("bfloat16", d_out=Q),
        shaped("bfloat16", d_q=Q, d_k=K, d_v=K),
        SCALE,
    ),
    "quantize_4bit": Call(
        shaped("float32", x=(6, 128)),
        shaped("uint8", encoded=(6, 64)) | ABSMAX,
        {"points": np.zeros(15, np.float32), "codes": np.zeros(16, np.uint8)} | BLOCK,
    ),
    "quantize_8bit": Call(
        shaped("float32", x=(6, 128)) | shaped("int32", table=TABLE.shape),
        shaped("uint8", codes=(6, 128)) | ABSMAX,
        {
            "lowest": np.float32(CELLS.lowest),
            "shift": np.int64(CELLS.shift),
            "first": np.int64(CELLS.first),
            "per_sign": np.int64(CELLS.per_sign),
            "is_signed": CELLS.is_signed,
            "code_of_nan": np.int64(255),
        }
        | BLOCK,
    ),
    "quantize_linear": Call(
        shaped("float32", x=(6, 128)), shaped("int8", codes=(6, 128)) | ABSMAX, BLOCK
    ),
    "dequantize_blockwise": Call(
        CODES_4BIT | ABSMAX | shaped("float32", levels=(16,)),
        shaped("float32", y=(6, 128)),
        BLOCK,
    ),
    "dequantize_blockwise, nested": Call(
        CODES_4BIT
        | shaped("uint8", absmax=(6, 2))
        | shaped("float32", levels=(16,), of_absmax=(256,))
        | shaped("float32", nested_absmax=(3, 1), offset=(3,)),
        shaped("float32", y=(6, 128)),
        BLOCK,
    ),
    "embed_blockwise": Call(
        shaped("int32", rows=(9,))
        | shaped("float32", absmax=(9, 2))
        | CODES_4BIT
        | shaped("float32", levels=(16,)),
        shaped("float32", y=(9, 128)),
        BLOCK,
    ),
    "update_8bit": Call(
        shaped("float32", scalars=(1,), grad=(6, 128), param=(6, 128))
        | shaped("uint8", codes=(6, 128))
        | ABSMAX,
        shaped("float32", result=(6, 128))
        | shaped("uint8", new_codes=(6, 128))
        | shaped("float32", new_absmax=(6, 2)),
        {
            "instructions": np.asarray(STEP, np.int32).reshape(-1),
            "constants": np.zeros(0, np.float32),
            "num_uniforms": np.int64(0),
            "num_temporaries": np.int64(0),
            "is_signed": np.ones(1, np.int32),
            "row_size": np.int64(128),
        }
        | BLOCK,
    ),
}
# What fits too: an odd number of codes in as many bytes, any number of rows of a table,
# and fewer masks than texts.
ALLOWED = {
    ("quantize_4bit", "x", (6, 127)),
    ("dequantize_blockwise", "y", (6, 127)),
    ("dequantize_blockwise, nested", "y", (6, 127)),
    ("embed_blockwise", "y", (9, 127)),
    ("attend_dense", "mask", (1, 5, 7)),
    ("attend_dense_gradient", "mask", (1, 5, 7)),
    ("embed_blockwise", "codes", (5, 64)),
    ("embed_blockwise", "codes", (7, 64)),
    # The program does not read the second one.
    ("update_8bit", "scalars", (2,)),
}


def program(*instructions, uniforms=0, temporaries=0):
    return {
        "instructions": np.asarray(instructions, np.int32).reshape(-1),
        "num_uniforms": np.int64(uniforms),
        "num_temporaries": np.int64(temporaries),
    }


WRONG_ATTRIBUTES = [
    *[
        (target, {"block_size": np.int64(size)})
        for target, call in CALLS.items()
        if "block_size" in call.attributes
        for size in (0, -64, 32, 2**62)
    ],
    *[
        (target, {"block_size": np.int64(65)})
        for target in ("quantize_4bit", "dequantize_blockwise", "embed_blockwise")
    ],
    ("matmul_blockwise", {"block_size": np.int64(72)}),
    ("matmul_blockwise", {"size": np.int64(-1)}),
    ("matmul_blockwise", {"size": np.int64(2**62)}),
    ("matmul_blockwise", {"compute_dtype": "int8"}),
    ("matmul_blockwise", {"transpose": False}),
    ("matmul_blockwise, nested", {"nested_block_size": np.int64(0)}),
    ("matmul_blockwise, nested", {"nested_block_size": np.int64(8)}),
    ("matmul_dense", {"transpose": False}),
    ("matmul_int8", {"compute_dtype": "float64"}),
    ("quantize_4bit", {"points": np.zeros(14, np.float32)}),
    ("quantize_4bit", {"codes": np.zeros(15, np.uint8)}),
    ("quantize_8bit", {"lowest": np.float32(0)}),
    ("quantize_8bit", {"lowest": np.float32(np.nan)}),
    ("quantize_8bit", {"shift": np.int64(CELLS.shift - 1)}),
    ("quantize_8bit", {"shift": np.int64(-1)}),
    ("quantize_8bit", {"first": np.int64(0)}),
    ("quantize_8bit", {"per_sign": np.int64(-1)}),
    ("update_8bit", {"row_size": np.int64(0)}),
    ("update_8bit", {"row_size": np.int64(100)}),
    ("update_8bit", {"is_signed": np.ones(0, np.int32)}),
    ("update_8bit", {"is_signed": np.ones(9, np.int32)}),
    ("update_8bit", {"instructions": np.zeros(7, np.int32)}),
    ("update_8bit", {"constants": np.zeros(200, np.float32)}),
    ("update_8bit", program(*STEP, temporaries=-1)),
    ("update_8bit", program(*STEP, temporaries=2**62)),
    ("update_8bit", program(*STEP, uniforms=-1)),
    ("update_8bit", program(*STEP, uniforms=3)),
    # An unknown instruction; values that are not there; inputs that are written.
    ("update_8bit", program([29, 3, 0, 0, 0, 0])),
    ("update_8bit", program([-1, 3, 0, 0, 0, 0])),
    ("update_8bit", program([Op.COPY, 3, 6, 0, 0, 0])),
    ("update_8bit", program([Op.COPY, 3, -1, 0, 0, 0])),
    ("update_8bit", program([Op.COPY, 6, 0, 0, 0, 0])),
    ("update_8bit", program([Op.COPY, 0, 1, 0, 0, 0])),
    ("update_8bit", program([Op.COPY, 5, 0, 0, 0, 0])),
    # Uniform values of an element, and one that is written to a moment.
    ("update_8bit", program([Op.COPY, 6, 4, 0, 0, 0], uniforms=1)),
    ("update_8bit", program([Op.COPY, 4, 5, 0, 0, 0], uniforms=1)),
]


def wrong_arrays(target, call):
    """Yields changes: one of another size, rank or dtype among the arrays of a call."""
    for name, (shape, dtype) in (call.operands | call.results).items():
        # No handler takes them anywhere.
        yield {name: (shape, "int16")}
        for axis, size in enumerate(shape):
            for other in (size - 1, size + 1):
                changed = (*shape[:axis], other, *shape[axis + 1 :])
                if (target, name, changed) not in ALLOWED:
                    yield {name: (changed, dtype)}


@pytest.mark.parametrize("target", CALLS)
def test_a_right_call(target):
    library()
    CALLS[target].run(target.split(",")[0])


def error_of(target, change):
    """Returns the message of a changed call's error; empty without an error."""
    try:
        CALLS[target].change(**change).run(target.split(",")[0])
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("target", CALLS)
def test_arrays_that_do_not_fit(target):
    library()
    for change in wrong_arrays(target, CALLS[target]):
        assert "INVALID_ARGUMENT" in error_of(target, change), change


@pytest.mark.parametrize(
    ("target", "change"),
    [
        ("matmul_dense", shaped("float32", x=(15, 128))),
        ("matmul_dense", shaped("bfloat16", weight=(18, 128))),
        ("matmul_dense", shaped("float32", y=(15, 6))),
        ("matmul_blockwise", shaped("float32", x=(15, 128))),
        ("matmul_blockwise", shaped("uint8", codes=(18, 64))),
        ("matmul_int8", shaped("int8", codes=(128,))),
        ("attend_dense", shaped("bfloat16", q=(10, 4, 8))),
        ("attend_dense", shaped("bfloat16", k=())),
        ("quantize_linear", shaped("float32", x=())),
        ("embed_blockwise", shaped("uint8", codes=(6 * 64,))),
        ("update_8bit", shaped("float32", scalars=())),
        # As many heads of keys as divide those of queries, but not in all arrays.
        (
            "attend_dense_gradient",
            shaped("bfloat16", d_k=(2, 7, 1, 8), d_v=(2, 7, 1, 8)),
        ),
        # Codes of another kind.
        ("dequantize_blockwise", shaped("int8", codes=(6, 64))),
        ("dequantize_blockwise", shaped("float32", levels=(256,))),
        ("dequantize_blockwise", shaped("float32", levels=(0,))),
        *WRONG_ATTRIBUTES,
    ],
)
def test_what_does_not_fit(target, change):
    library()
    assert "INVALID_ARGUMENT" in error_of(target, change)


@pytest.mark.parametrize("row", [-1, 6, 2**31 - 1])
def test_rows_that_are_not_there(row):
    library()
    call = CALLS["embed_blockwise"]
    arrays = [jnp.zeros(*operand) for operand in call.operands.values()]
    arrays[0] = arrays[0].at[5].set(row)
    result = jax.ShapeDtypeStruct(*call.results["y"])
    embed = jax.ffi.ffi_call("jaxbnb_cpu_embed_blockwise", result)
    with pytest.raises(jax.errors.JaxRuntimeError, match="must be that of a row"):
        jax.block_until_ready(embed(*arrays, **call.attributes))


WITHOUT_MEMORY = """
import pathlib, resource, sys
import jax, jax.numpy as jnp
from jaxbnb_kernels import native
from jaxbnb_kernels.quantize_blockwise import quantize_blockwise
native.LIBRARY = pathlib.Path(sys.argv[1])
size = 2**26
encode = jax.jit(lambda x: quantize_blockwise(x, None, block_size=size,
    implementation="cpu")).lower(jax.ShapeDtypeStruct((size,), jnp.bfloat16)).compile()
x = jax.block_until_ready(jnp.zeros(size, jnp.bfloat16))
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
# The codes take 64 MiB, and a block in float32 takes 256 MiB.
limit = pages * resource.getpagesize() + 192 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
encode(x)[0].block_until_ready()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_without_memory(request):
    """The process ends, but says why."""
    library()
    if request.config.getoption("native_library"):
        pytest.skip("sanitizers and emulators limit memory in their own ways")
    command = [sys.executable, "-c", WITHOUT_MEMORY, str(native.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "jaxbnb: no memory for 268435456 bytes of a kernel's" in done.stderr
    assert done.returncode == -signal.SIGABRT


def test_every_handler_is_called():
    targets = {f"jaxbnb_cpu_{name.split(',')[0]}" for name in CALLS}
    assert targets == set(native.TARGETS)
