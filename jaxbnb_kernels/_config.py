"""Which kernels run by themselves: the one setting of this package."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Final, Literal, get_args

import jax

MosaicGpu = Literal["verified", "always", "never"]
_CHOICES: Final = get_args(MosaicGpu)
_VARIABLE: Final = "JAXBNB_MOSAIC_GPU"
_OF_VARIABLE: Final[dict[str, MosaicGpu]] = {
    "": "verified",
    "1": "always",
    "0": "never",
}


class Config:
    """Settings that every traced function depends on.

    A change of a setting makes ``jax.jit`` trace again: it is part of the key under
    which JAX caches programs.

    Example:
        >>> import jaxbnb_kernels
        >>> with jaxbnb_kernels.config.override(mosaic_gpu="never"):
        ...     jaxbnb_kernels.config.mosaic_gpu
        'never'
    """

    def __init__(self):
        # None until it is set: then the environment says what holds.
        self._mosaic_gpu = jax.make_user_context(None)

    @property
    def mosaic_gpu(self) -> MosaicGpu:
        """When the Pallas kernels for GPUs run without being asked for by name.

        * "verified" (the default): on a GPU where a record says that they passed their
          checks.
        * "always": on every GPU that they are written for.
        * "never": only where ``implementation="mosaic_gpu"`` asks for them.

        The environment variable ``JAXBNB_MOSAIC_GPU`` gives the initial value: 1 for
        "always", 0 for "never". It is read when the setting is first used.

        Raises:
            ValueError: the value is none of these.
        """
        return self._mosaic_gpu.value or _from_environment()

    @mosaic_gpu.setter
    def mosaic_gpu(self, value: MosaicGpu) -> None:
        self._mosaic_gpu.set_global(_checked(value))

    @contextlib.contextmanager
    def override(self, *, mosaic_gpu: MosaicGpu) -> Iterator[None]:
        """Changes a setting within a ``with`` statement, for this thread only.

        Args:
            mosaic_gpu: value of `mosaic_gpu` inside the statement.

        Raises:
            ValueError: the value is none of those that `mosaic_gpu` lists.
        """
        with self._mosaic_gpu(_checked(mosaic_gpu)):
            yield


config: Final = Config()


def _checked(value: MosaicGpu) -> MosaicGpu:
    if value not in _CHOICES:
        raise ValueError(f"mosaic_gpu must be one of {_CHOICES}; got {value!r}")
    return value


@functools.cache
def _from_environment() -> MosaicGpu:
    setting = os.environ.get(_VARIABLE, "")
    if setting not in _OF_VARIABLE:
        raise ValueError(f"{_VARIABLE} must be 0, 1 or unset; got {setting!r}")
    return _OF_VARIABLE[setting]
