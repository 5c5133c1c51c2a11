"""The peak of a process is its own."""

import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxbnb.core import process_memory

_SIZE = 96 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's status")
def test_a_peak_is_not_that_of_the_parent():
    ours = np.ones(4 * _SIZE, np.uint8)
    assert process_memory.resident_bytes() > ours.nbytes
    code = (
        "from jaxbnb.core import process_memory as p; held = bytearray(b'x') * "
        f"{_SIZE}; del held; print(p.resident_bytes(), p.peak_bytes()); "
        "p.reset_peak(); print(p.peak_bytes())"
    )
    command = [sys.executable, "-P", "-c", code]
    lines = subprocess.run(command, check=True, capture_output=True).stdout.split()
    now, peak, after = map(int, lines)
    assert now + 0.9 * _SIZE < peak < ours.nbytes
    assert after < now + 0.1 * _SIZE


def test_a_device_that_counts_for_itself(monkeypatch):
    for stats, expected in (({"peak_bytes_in_use": 7}, 7), (None, 5), ({}, 5)):
        device = types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        monkeypatch.setattr(process_memory, "peak_bytes", lambda: 5)
        assert process_memory.peak_device_bytes() == expected
