"""Folders of older versions load; those of newer ones say so."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb import models
from jaxbnb.convert import UnsupportedCheckpointError
from jaxbnb.finetune._checkpoints import Checkpoints

pytest.importorskip("orbax.checkpoint")
GOLDENS = Path(__file__).parents[1] / "goldens"


def test_a_flax_folder(tmp_path):
    shutil.unpack_archive(GOLDENS / "flax_folder_0.zip", tmp_path)
    model = models.load_pretrained(tmp_path)
    logits = model(jnp.arange(4)[None])
    # As the version that wrote it had them.
    np.testing.assert_allclose(logits[0].sum(), -4.403784, rtol=1e-5)
    path = tmp_path / "flax.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
    with pytest.raises(UnsupportedCheckpointError, match=r"version 9, .* up to 1: a "):
        models.check_pretrained(tmp_path)


def test_a_checkpoint_of_a_run(tmp_path, monkeypatch):
    shutil.unpack_archive(GOLDENS / "run_checkpoint_0.zip", tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore_progress(3) == {"step": 3}
    found = checkpoints.restore_state(3, {"x": jnp.zeros(4)})
    np.testing.assert_array_equal(found["x"], np.arange(4.0))
    with monkeypatch.context() as patch:
        patch.setattr("jaxbnb.finetune._checkpoints.VERSION", 9)
        checkpoints.save(4, found, {"step": 4})
        checkpoints.wait()
    with pytest.raises(UnsupportedCheckpointError, match=r"version 9, .* up to 1: a "):
        checkpoints.restore_progress(4)
    checkpoints.close()
