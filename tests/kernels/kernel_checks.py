"""What the tests of kernels for Hopper ask of a lowered or compiled function."""

import re

import jax


def avals(*trees):
    """The shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def lowered_for(mesh, fn, *args):
    """The text of ``fn`` lowered for the devices of ``mesh``, which all have all."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(fn, in_shardings=replicated, out_shardings=replicated)
    return jitted.lower(*avals(*args)).as_text()


def check_compiled(
    compiled,
    kernel,
    *,
    instructions,
    elements=32,
    registers=64,
    around=frozenset(),
    temporary_bytes=16,
):
    """Registers, instructions an element, and what XLA put around the kernel.

    By default nothing: no copy of an operand, and no temporary but the pointers to two
    results, which are 16 bytes.
    """
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.remarks == []
    assert kernel.registers <= registers
    assert len(kernel.sass) <= instructions * elements
    operations = operations_of(compiled)
    allowed = {"parameter", "constant", "bitcast", "custom-call"}
    allowed |= {"get-tuple-element", "tuple"}
    assert set(operations) <= allowed | around, operations
    assert operations.count("custom-call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes <= temporary_bytes


def operations_of(compiled):
    """The names of XLA's operations, of its computations too."""
    line = r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\("
    return re.findall(line, compiled.as_text(), re.MULTILINE)
