"""SIGKILL while a run saves: see `kill_saving`."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("orbax.checkpoint")


@pytest.mark.skipif(os.name != "posix", reason="needs os.fork")
def test_the_last_complete_checkpoint_loads(tmp_path, request):
    kills = request.config.getoption("kills") or 3
    command = [sys.executable, "-m", "tests.finetune.kill_saving", str(tmp_path)]
    done = subprocess.run(
        [*command, str(kills)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert f"{kills} kills" in done.stdout
