"""Which implementation of an op runs: the one asked for, or the first that can."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxbnb_kernels import _hopper


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls one implementation of ``op``.

    An implementation that cannot serve these arguments raises ``NotImplementedError``
    and the next one is tried; one that is asked for by name is the only one tried.
    By default "mosaic_gpu" is called with ``required=False``: where there is no GPU for
    it, it runs something else instead of raising.

    Args:
        op: the op's name, for messages.
        implementations: name -> function, the preferred one first.
        implementation: a name, or None for the first that can.
        *args: the op's arguments.
        **kwargs: the op's arguments.

    Raises:
        ValueError: there is no implementation of that name.
        NotImplementedError: the implementation asked for cannot serve the arguments.
        ExceptionGroup: none can; it holds each one's reason.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op} has no implementation {implementation!r}; "
                f"choose one of {sorted(implementations)}, or None"
            )
        return implementations[implementation](*args, **kwargs)
    errors = []
    for name in implementations:
        if name == "mosaic_gpu" and _hopper.why_off():
            continue
        candidate = implementations[name]
        if name == "mosaic_gpu":
            candidate = functools.partial(candidate, required=False)
        try:
            return candidate(*args, **kwargs)
        except NotImplementedError as error:
            errors.append(error)
    raise ExceptionGroup(f"no implementation of {op} can serve this call", errors)
