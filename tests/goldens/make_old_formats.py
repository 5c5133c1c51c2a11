"""Makes flax_folder_0.zip and run_checkpoint_0.zip: run it with jaxbnb at 660cb96.

It wrote neither with a format version. Needs that commit's folder in PYTHONPATH.
"""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp

from jaxbnb import QuantConfig, models
from jaxbnb.finetune._checkpoints import Checkpoints
from tests.finetune import toy

HERE = Path(__file__).parent


def main():
    toy.CONFIG |= {"num_hidden_layers": 1, "vocab_size": 8}
    toy.CONFIG |= {"eos_token_id": None, "pad_token_id": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        toy.write_folder(folder / "model")
        for file in (folder / "model").glob("tokenizer*"):
            file.unlink()
        models.convert_to_flax(
            folder / "model", folder / "flax", quant=QuantConfig("nf4")
        )
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        checkpoints.save(3, {"x": jnp.arange(4.0)}, {"step": 3})
        checkpoints.wait()
        checkpoints.close()
        shutil.make_archive(str(HERE / "flax_folder_0"), "zip", folder / "flax")
        checkpoints = folder / "checkpoints"
        shutil.make_archive(str(HERE / "run_checkpoint_0"), "zip", checkpoints)


if __name__ == "__main__":
    main()
