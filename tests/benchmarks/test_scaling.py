"""`jaxbnb bench scaling`: small sizes, in processes of their own, and the plot."""

import os

import pytest

from jaxbnb.benchmarks import bench_scaling


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot limit threads")
def test_every_size_with_one_thread_and_with_all(tmp_path):
    plot = tmp_path / "scaling.png"
    setting = {"parameters": [2**14], "rows": [1, 5], "size": 256, "rounds": 1}
    figures = list(bench_scaling(plot, **setting))
    threads = sorted({1, len(os.sched_getaffinity(0))})
    measured = [(f.data["threads"], f.data["what"], f.data["count"]) for f in figures]
    cases = [("NF4 product", 1), ("NF4 product", 5), ("adamw8bit step", 2**14)]
    assert measured == [(number, *case) for number in threads for case in cases]
    for figure in figures:
        assert figure.value > 0
        assert {"jaxbnb"} < set(figure.data["seconds"])
    assert plot.read_bytes().startswith(b"\x89PNG")
