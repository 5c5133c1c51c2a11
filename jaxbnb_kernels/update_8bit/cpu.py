"""Which steps the native CPU kernel supports."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbnb_kernels import _selection
from jaxbnb_kernels.update_8bit.cpu_program import compile_rule
from jaxbnb_kernels.update_8bit.operands import Step

UPDATE = _selection.Kernel.for_cpu("update_8bit", "update")


def updater(
    step: Step,
    scalars: list[jax.Array],
    grad: Float[Array, "*shape"],
    param: Float[Array, "*shape"] | None,
) -> _selection.Kernel:
    """Returns the kernel; raises an error if it does not support the call."""
    for x in (grad,) if param is None else (grad, param):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"cpu does not support {x.dtype}")
    for x in scalars:
        if (x.shape, x.dtype) != ((), jnp.float32):
            raise NotImplementedError(
                f"cpu needs float32 scalars; got {x.dtype} of shape {x.shape}"
            )
    # Raises an error if the rule cannot be compiled.
    compile_rule(step, param is not None)
    return UPDATE
