"""Kills a process that saves, many times: the last complete checkpoint always loads.

Called as ``python -m tests.finetune.kill_saving FOLDER KILLS``. It imports JAX once,
and each process that is killed is a fork of it. Prints how many kills left a checkpoint
half written.
"""

import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import jax
import numpy as np
from orbax import checkpoint as _  # noqa: F401

from jaxbnb.convert import load_state, save_state
from jaxbnb.core.files import atomic_write
from jaxbnb.finetune._checkpoints import Checkpoints

SIZE = 1 << 16
# JAX warns of forks. No fork before this one has used a device.
warnings.filterwarnings("ignore", message=r"os\.fork\(\)")


def make_state(step):
    return {"x": np.full(SIZE, step, np.float32), "step": np.int32(step)}


def save(folder):
    """Saves without end; ``done`` has the last step that is complete."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    step = checkpoints.last_step or 0
    while True:
        step += 1
        state = jax.tree.map(jax.numpy.asarray, make_state(step))
        checkpoints.save(step, state, {"step": step})
        save_state(state, folder / "state.safetensors")
        checkpoints.wait()
        with atomic_write(folder / "done") as temporary:
            temporary.write_text(str(step))


def read_done(folder):
    """The last step that is known to be complete."""
    path = folder / "done"
    return int(path.read_text() or 0) if path.exists() else 0


def check(folder):
    """Loads what is left."""
    done = read_done(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    step = checkpoints.last_step
    if step is not None:
        like = jax.tree.map(jax.numpy.asarray, make_state(0))
        assert checkpoints.restore_progress(step) == {"step": step}
        found = checkpoints.restore_state(step, like)
        assert (np.asarray(found["x"]) == step).all()
        assert int(found["step"]) == step
    assert (step or 0) >= done, (step, done)
    path = folder / "state.safetensors"
    if path.exists():
        found = load_state(path, make_state(0))
        assert (found["x"] == found["step"]).all()
        assert found["step"] >= done
    checkpoints.close()


def run(function, folder, seconds=None):
    """Runs a function in a fork; kills it some seconds after it has saved once."""
    before = read_done(folder)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        while read_done(folder) == before:
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main():
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    rng, halves = random.Random(0), 0
    for number in range(kills):
        status = run(save, folder, seconds=rng.uniform(0, 0.2))
        assert status == signal.SIGKILL, f"kill {number}: it ended with {status}"
        names = [path.name for path in folder.rglob("*")]
        halves += any("tmp" in name or "partial" in name for name in names)
        assert run(check, folder) == 0, f"kill {number}"
    done = read_done(folder)
    print(f"{kills} kills, {halves} while something was half written; step {done}")


if __name__ == "__main__":
    main()
