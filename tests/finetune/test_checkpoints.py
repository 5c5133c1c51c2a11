"""Checkpoints where the disk is full: the error names the last good one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.finetune import RunCheckpointError
from jaxbnb.finetune._checkpoints import Checkpoints
from jaxbnb.finetune._metrics import MetricsFile, read_metrics

resource = pytest.importorskip("resource")
pytest.importorskip("orbax.checkpoint")


@pytest.fixture
def limit():
    """A function that makes files end at a size, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_full_disk(tmp_path, limit):
    """The failed one leaves nothing behind, and the good one is complete."""
    key = jax.random.key(0)
    state = {"x": jax.random.normal(key, 1 << 14)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.wait()
    limit(1 << 13)
    checkpoints.save(2, jax.tree.map(jnp.negative, state), {"step": 2})
    with pytest.raises(
        RunCheckpointError, match=r"step 2 could not .* too large.*good one is .*/1$"
    ):
        checkpoints.wait()
    limit(None)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.last_step == 1
    assert checkpoints.restore_progress(1) == {"step": 1}
    like = jax.tree.map(jnp.zeros_like, state)
    np.testing.assert_array_equal(checkpoints.restore_state(1, like)["x"], state["x"])
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_full_disk_under_the_metrics(tmp_path, limit):
    metrics = MetricsFile(tmp_path, 0)
    metrics.log(1, {"loss": 2.0})
    limit(40)
    with pytest.raises(OSError, match=r"too large: .*metrics\.jsonl"):
        metrics.log(2, {"loss": 1.0})
    limit(None)
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_lost_process_while_saving(tmp_path, monkeypatch):
    """The error says so, and names the checkpoint that is complete."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, {"x": jnp.ones(4)}, {"step": 1})
    checkpoints.wait()

    def fail(*args, **kwargs):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        RunCheckpointError,
        match=r"step 2 could not .* process 0 of 4 cannot reach the others.*/1$",
    ):
        checkpoints.save(2, {"x": jnp.ones(4)}, {"step": 2})
    monkeypatch.undo()
    checkpoints.close()
