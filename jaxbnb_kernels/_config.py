"""Which kernels run by themselves: the settings of this package."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Final, Literal, get_args

import jax

MosaicGpu = Literal["verified", "always", "never"]
Cpu = Literal["always", "never"]
_CHOICES: Final = {"mosaic_gpu": get_args(MosaicGpu), "cpu": get_args(Cpu)}
# What the environment variable of a setting stands for.
_INITIAL: Final[dict[str, dict[str, Any]]] = {
    "mosaic_gpu": {"": "verified", "1": "always", "0": "never"},
    "cpu": {"": "always", "1": "always", "0": "never"},
}


class Config:
    """Settings that every traced function depends on.

    A change of a setting makes ``jax.jit`` trace again: it is part of the key under
    which JAX caches programs.

    Example:
        >>> import jaxbnb_kernels
        >>> with jaxbnb_kernels.config.override(mosaic_gpu="never", cpu="never"):
        ...     jaxbnb_kernels.config.mosaic_gpu, jaxbnb_kernels.config.cpu
        ('never', 'never')
    """

    def __init__(self):
        # None until it is set: then the environment says what holds.
        self._mosaic_gpu = jax.make_user_context(None)
        self._cpu = jax.make_user_context(None)

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
        return self._mosaic_gpu.value or _from_environment("mosaic_gpu")

    @mosaic_gpu.setter
    def mosaic_gpu(self, value: MosaicGpu) -> None:
        self._mosaic_gpu.set_global(_checked("mosaic_gpu", value))

    @property
    def cpu(self) -> Cpu:
        """When the native kernels for CPUs run without being asked for by name.

        * "always" (the default): wherever their library is installed and the processor
          has the instructions.
        * "never": only where ``implementation="cpu"`` asks for them.

        The environment variable ``JAXBNB_CPU`` gives the initial value: 1 for "always",
        0 for "never". It is read when the setting is first used.

        Raises:
            ValueError: the value is none of these.
        """
        return self._cpu.value or _from_environment("cpu")

    @cpu.setter
    def cpu(self, value: Cpu) -> None:
        self._cpu.set_global(_checked("cpu", value))

    @contextlib.contextmanager
    def override(
        self, *, mosaic_gpu: MosaicGpu | None = None, cpu: Cpu | None = None
    ) -> Iterator[None]:
        """Changes settings within a ``with`` statement, for this thread only.

        Args:
            mosaic_gpu: value of `mosaic_gpu` inside the statement; None for no change.
            cpu: value of `cpu` inside the statement; None for no change.

        Raises:
            ValueError: a value is none of those that the setting lists.
        """
        with contextlib.ExitStack() as stack:
            if mosaic_gpu is not None:
                stack.enter_context(
                    self._mosaic_gpu(_checked("mosaic_gpu", mosaic_gpu))
                )
            if cpu is not None:
                stack.enter_context(self._cpu(_checked("cpu", cpu)))
            yield


config: Final = Config()


def _checked(setting: str, value: Any) -> Any:
    choices = _CHOICES[setting]
    if value not in choices:
        raise ValueError(f"{setting} must be one of {choices}; got {value!r}")
    return value


@functools.cache
def _from_environment(setting: str) -> Any:
    variable = f"JAXBNB_{setting.upper()}"
    value = os.environ.get(variable, "")
    if value not in _INITIAL[setting]:
        raise ValueError(f"{variable} must be 0, 1 or unset; got {value!r}")
    return _INITIAL[setting][value]
