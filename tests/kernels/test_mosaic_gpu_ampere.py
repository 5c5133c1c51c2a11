"""The kernels that wait for memory, on other GPUs than Hopper, none of which is here.

Their source is that of the kernels for Hopper, which the other files test. So this file
checks what depends on the GPU: that each compiles there, without spills, how many
instructions it takes, how many of them start, and the numbers of the compiled code.
"""

import functools

import hopper_compiler
import jax
import jax.numpy as jnp
import numpy as np
import ptx_emulator
import pytest
import test_mosaic_gpu as blockwise
import test_mosaic_gpu_update as step
from kernel_checks import avals, operations_of

