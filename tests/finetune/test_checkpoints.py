"""A full disk and damaged checkpoints: the error names the last good one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxbnb.finetune import RunCheckpointError
from jaxbnb.finetune._checkpoints import Checkpoints
from jaxbnb.finetune._checksums import array_checksums
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


# With 1, the good one would be the next to be removed.
@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk(tmp_path, limit, keep):
    """The failed one leaves nothing behind, and the good one is complete."""
    key = jax.random.key(0)
    state = {"x": jax.random.normal(key, 1 << 14)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=keep)
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
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=keep)
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


def test_a_byte_that_changes_on_the_disk(tmp_path):
    """Wherever it is, what is read is what was saved, or the error names the other."""
    rng = np.random.default_rng(0)
    state = {"x": jnp.asarray(rng.standard_normal(1 << 12), jnp.float32)}
    progress = {"step": 2, "rows": list(range(50))}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, progress)
    checkpoints.wait()
    like = jax.tree.map(jnp.zeros_like, state)
    noticed = []
    for path in sorted((tmp_path / "checkpoints/2").rglob("*")):
        if path.is_dir():
            continue
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            assert checkpoints.restore_progress(2) == progress
            found = checkpoints.restore_state(2, like)
            np.testing.assert_array_equal(found["x"], state["x"])
        except RunCheckpointError as error:
            name = str(path.relative_to(tmp_path))
            noticed.append((len(good), name, str(error)))
        path.write_bytes(good)
    checkpoints.close()
    # The values of the array, which Orbax does not check, and those of the progress.
    assert max(noticed)[0] > state["x"].nbytes // 2
    assert any("progress" in name for _, name, _ in noticed)
    assert all(str(tmp_path / "checkpoints/1") in message for *_, message in noticed)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "uint8", "int32", "bool", "float8_e4m3fn", "int4"]
)
def test_checksums(dtype):
    """They depend on each element and its place, and not on where the array lies."""
    values = np.random.default_rng(0).integers(0, 2, (8, 6))
    x = jnp.asarray(values, dtype)

    def of(x):
        (checksum,) = array_checksums({"x": x}).values()
        return checksum

    changed = values.copy()
    changed[7, 5] = 1 - changed[7, 5]
    others = [changed, values[::-1], values.T, 0 * values]
    # Sign bits of an even number of elements would cancel in a plain sum.
    others += [] if dtype in ("bool", "uint8") else [-values]
    checksums = [of(jnp.asarray(other, dtype)) for other in others]
    assert len({of(x), *checksums}) == 1 + len(others)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    paged = jax.device_put(x, jax.memory.Space.Host)
    assert of(divided) == of(paged) == of(x)
