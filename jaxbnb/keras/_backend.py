"""Keras on the JAX backend, or an error that says what to do."""

from typing import Any

from jaxbnb.core.extras import import_extra


def import_keras() -> Any:
    """Imports Keras.

    Raises:
        ImportError: Keras is not installed, or has another backend than JAX.
    """
    advice = "set the environment variable KERAS_BACKEND=jax before Keras is imported"
    try:
        keras: Any = import_extra("keras", needed_by="jaxbnb.keras", extra="keras")
        name = keras.backend.backend()
    except ModuleNotFoundError as error:
        # Keras's default backend, which is not installed.
        if error.name != "tensorflow":
            raise
        raise ImportError(
            f"jaxbnb.keras needs Keras with the JAX backend, got tensorflow: {advice}",
            name="tensorflow",
        ) from error
    if name != "jax":
        raise ImportError(
            f"jaxbnb.keras needs Keras with the JAX backend, got {name}: {advice}",
            name="keras",
        )
    return keras


keras: Any = import_keras()
