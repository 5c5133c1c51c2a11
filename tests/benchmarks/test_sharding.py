"""What eight GPUs that are not there would send to each other."""

import hopper_compiler
import pytest

from jaxbnb.benchmarks import bench_sharding


# Three programs of Llama 3 8B, each of which takes half a minute to compile.
@pytest.mark.exhaustive
def test_limits_hold():
    hopper_compiler.mesh()
    figures = list(bench_sharding())
    limited = [figure for figure in figures if figure.limit is not None]
    assert len(limited) == 2
    for figure in limited:
        # Codes alone take half a byte for each of 7 billion weights, once or twice.
        assert 0.5 < figure.value < figure.limit
