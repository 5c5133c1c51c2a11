"""The memory of long texts, as XLA compiles a step for a GPU that is not there."""

import hopper_compiler
import pytest

from jaxbnb.benchmarks import _context


# A step of two layers of Llama 3 8B's shape takes a minute to compile.
@pytest.mark.exhaustive
@pytest.mark.parametrize("seq", [8192, 16_384])
def test_a_step_of_8b_fits(seq):
    """The goals of the page "Long context", as on an H100."""
    hopper_compiler.mesh()
    figure = _context._compile_step("H100", seq, "every layer", True)
    assert figure.value < figure.limit
    # Codes alone take half a byte for each of 7 billion weights.
    assert figure.value > 3.3
