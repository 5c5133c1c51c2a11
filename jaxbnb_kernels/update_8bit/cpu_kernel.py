"""The whole step in one pass over memory and in place: the native kernel for CPUs.

The kernel overwrites the parameter, the codes and the absmax if they are donated or no
longer needed. It interprets the rule, which `cpu_program` compiles. Its numbers do not
depend on the number of threads.

It differs from the other implementations only by roundings: a level of a moment is off
by at most a relative 2^-21, and a sum of two products is rounded once, as by XLA.
"""

import math

import jax
import jax.ffi
import numpy as np
from jaxtyping import Array, Float

from jaxbnb_kernels.update_8bit.cpu_program import compile_rule
from jaxbnb_kernels.update_8bit.operands import Step, by_name

TARGET = "jaxbnb_cpu_update_8bit"


def update(
    scalars: Float[Array, "*batch count"], *arrays: Array, step: Step
) -> list[Array]:
    """Calls the kernel. The caller has checked that it supports the arguments.

    Args:
        scalars: scalars of the rule, in the order of the leaves; at least one.
        *arrays: gradient, parameter if there is one, codes of each moment, and absmax
            of each moment.
        step: static description of the step.

    Raises:
        NotImplementedError: the kernel does not support the rule.
    """
    grad, param, codes, absmax = by_name(arrays, len(step.signed))
    program = compile_rule(step, param is not None)
    results = [grad if param is None else param, *codes, *absmax]
    examples = scalars.ndim - 1
    inner = grad.shape[examples + step.layout.axis :]
    # The parameter or the codes follow the scalars and the gradient. The gradient
    # itself may be needed again, so an update is a new array.
    first = 1 if param is None else 0
    aliases = {2 + i: first + i for i in range(len(results) - first)}
    row_size = math.prod(inner)
    if row_size % step.layout.size == 0:
        # Rows of whole blocks are one row.
        row_size = math.prod(grad.shape[examples:])
    call = jax.ffi.ffi_call(
        TARGET,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        input_output_aliases=aliases,
    )
    outputs = call(
        scalars,
        *arrays,
        instructions=np.asarray(program.instructions, np.int32).reshape(-1),
        constants=np.asarray(program.constants, np.float32),
        num_uniforms=program.num_uniforms,
        num_temporaries=program.num_temporaries,
        is_signed=np.asarray(step.signed, np.int32),
        row_size=row_size,
        block_size=step.layout.size,
    )
    return list(outputs)
