"""The memory of long texts: compiled for a GPU that is not there, and measured."""

import pathlib

import hopper_compiler
import pytest

from jaxbnb.benchmarks import _context, _context_peak


# A step of Llama 3 8B takes half a minute to compile.
@pytest.mark.exhaustive
@pytest.mark.parametrize("seq", [8192, 16_384])
def test_a_step_of_8b_fits(seq):
    """The goals of the page "Long context", as on an H100."""
    hopper_compiler.mesh()
    figure = _context._compile_step("H100", seq, "every layer", True)
    assert figure.value < figure.limit
    # Codes alone take half a byte for each of 7 billion weights.
    assert figure.value > 3.3


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux"
)
def test_the_measured_peak_is_about_the_compiled_one():
    lengths = {_context_peak.PREFILL: (512, 1024)}
    *peaks, growth = _context_peak.measure_peaks(lengths)
    assert growth.value == peaks[1].value / peaks[0].value
    for figure in peaks:
        # Results alone take 4 MiB. XLA's scratch memory is not in its analysis.
        assert 4 < figure.value < 4 * figure.data["compiled"] / 2**20
