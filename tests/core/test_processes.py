"""What the errors of several processes mean. `make multihost` runs the collectives."""

import jax
import pytest

from jaxbnb.core import processes

LOST = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"


@pytest.mark.parametrize(
    ("message", "count", "expected"),
    [
        (LOST, 4, True),
        (LOST, 1, False),
        ("UNAVAILABLE: failed to connect", 2, True),
        ("RESOURCE_EXHAUSTED: Out of memory", 4, False),
        ("no such file: UNKNOWN: a name", 4, False),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_lost_process_is_known_by_the_status(
    monkeypatch, kind, message, count, expected
):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert processes.is_loss(kind(message)) == expected
    wrapped = RuntimeError("a library failed")
    wrapped.__cause__ = kind(message)
    assert processes.is_loss(wrapped) == expected
