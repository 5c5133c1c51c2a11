"""check_mesh: whether a mesh keeps heads and experts whole."""

from typing import Any

from jaxbnb.models._config import DecoderConfig


def check_mesh(config: DecoderConfig, mesh: Any) -> None:
    """Checks that a mesh does not divide single heads or experts.

    Args:
        config: sizes of the model.
        mesh: the mesh, which may be abstract.

    Raises:
        ValueError: it would; the message says which sizes fit.

    Example:
        >>> import jax
        >>> from jaxbnb.models import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        ...     head_dim=16)
        >>> check_mesh(config, jax.sharding.AbstractMesh((2,), ("tensor",)))
    """
    counts = {
        "num_attention_heads": ("tensor", config.num_attention_heads),
        "num_key_value_heads": ("tensor", config.num_key_value_heads),
        "num_experts": ("expert", config.num_experts),
    }
    for name, (axis, count) in counts.items():
        size = mesh.shape.get(axis, 1)
        if count % size or (size > 1 and not count):
            fits = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"the mesh axis {axis!r} has {size} devices, and the model has "
                f"{name}={count}; sizes that divide it are {fits or [1]}"
            )
