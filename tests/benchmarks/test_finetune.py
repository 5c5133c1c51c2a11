"""The benchmark of fine-tuning: both of its sides take the same step."""

import jax
import numpy as np
import pytest

from jaxbnb.benchmarks import _finetune
from tests.finetune import toy


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own
def test_both_sides_have_the_same_loss(tmp_path):
    """The second step's differ, because adapters begin at random."""
    pytest.importorskip("peft")
    toy.write_folder(tmp_path)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    # Optax's AdamW raises a float to the power of an int.
    with jax.numpy_dtype_promotion("standard"):
        ours = _finetune._make_step(tmp_path, "float32", None, tokens)
    sides = ours, _finetune._make_peer(tmp_path, None, tokens)
    first, second = zip(*([side(), side()] for side in sides), strict=True)
    np.testing.assert_allclose(*first, rtol=1e-6)
    assert all(b < a for a, b in zip(first, second, strict=True))
