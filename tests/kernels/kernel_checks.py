"""Checks of lowered and compiled functions, for the tests of Hopper kernels."""

import re

import jax


def avals(*trees):
    """Returns the shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def lowered_for(mesh, fn, *args):
    """Lowers ``fn`` for the devices of ``mesh``, with replicated arrays."""
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
    """Checks registers, instructions per element, and XLA's additions to the kernel.

    By default XLA must not add anything: no copy of an operand, and no temporary except
    the pointers to two results, which are 16 bytes.
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
    """Returns the names of XLA's operations, including its computations'."""
    line = r"^\s+(?:ROOT )?%\S+ = .*? ([\w-]+)\("
    return re.findall(line, compiled.as_text(), re.MULTILINE)
