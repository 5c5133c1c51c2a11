"""The arguments of optimizers: those for storage, and errors for unknown ones."""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, cast

import jax
import optax

MaskOrFn = Any | Callable[[optax.Params], Any] | None
_Make = TypeVar("_Make", bound=Callable[..., Any])


class Storage(TypedDict, total=False):
    """How an optimizer holds its moments: arguments that all optimizers take.

    Attributes:
        state_bits: 8 by default; 4 or "fp8", see `quantize_state`; 32 for Optax's own.
        block_size: largest number of elements that share an absmax, by default 256, or
            128 in 4 bits. A block runs along the last axis, or over several whole rows
            if that axis is short.
        min_quantized_size: size below which a parameter keeps float32 moments, by
            default 4096.
    """

    state_bits: Literal[4, 8, 32, "fp8"] | None
    block_size: int | None
    min_quantized_size: int | None


# Names in PyTorch, bitsandbytes and Keras, and ours. Only those that a factory takes
# count.
_OURS = {
    "betas": ("b1", "b2", "b3"),
    "beta1": ("b1",),
    "beta2": ("b2", "decay"),
    "beta3": ("b3",),
    "beta_1": ("b1",),
    "beta_2": ("b2", "decay"),
    "momentum": ("b1",),
    "alpha": ("decay",),
    "rho": ("decay",),
    "epsilon": ("eps",),
    "lr": ("learning_rate",),
    "wd": ("weight_decay",),
    "use_nesterov": ("nesterov",),
    "optim_bits": ("state_bits",),
    "bits": ("state_bits",),
    "blocksize": ("block_size",),
    "min_8bit_size": ("min_quantized_size",),
    "min_quant_size": ("min_quantized_size",),
    "t_alpha": ("alpha",),
    "t_beta3": ("b3",),
}
_STATE_BITS = 'state_bits decides how moments are stored: 8, 4, "fp8" or 32'
_DECAY = "put optax.add_decayed_weights before or after it in an optax.chain"
_FUSED = "leave it out: under jax.jit, XLA fuses the step"
_CLIP = "put optax.clip_by_global_norm before it in an optax.chain"
# What to do if the factory has no such argument under another name.
_INSTEAD = {
    "mu_dtype": _STATE_BITS,
    "accumulator_dtype": _STATE_BITS,
    "momentum_dtype": _STATE_BITS,
    "amsgrad": "jaxbnb.quantize_state(optax.amsgrad(...)) is AMSGrad in 8 bits",
    "lr": "chain it with optax.scale_by_learning_rate",
    "learning_rate": "chain it with optax.scale_by_learning_rate",
    "weight_decay": _DECAY,
    "wd": _DECAY,
    "lr_decay": "give a schedule as learning_rate",
    "clipnorm": _CLIP,
    "max_grad_norm": _CLIP,
    "percentile_clipping": (
        "put jaxbnb.optim.percentile_clipping before it in an optax.chain"
    ),
    "is_paged": "use the paged_ form of the optimizer, or jaxbnb.optim.paged",
    "block_wise": "it always is; block_size says how",
    "params": "the parameters go to init and update",
    "fused": _FUSED,
    "foreach": _FUSED,
    "capturable": _FUSED,
    "differentiable": "leave it out: JAX differentiates update as any function",
    "maximize": "negate the loss, or put optax.scale(-1) before it in an optax.chain",
}


def names_arguments(make: _Make) -> _Make:
    """Makes a factory's error for an unknown argument say what to give instead."""

    @functools.wraps(make)
    def checked(*args, **kwargs):
        check_arguments(make, kwargs)
        return make(*args, **kwargs)

    return cast(_Make, checked)


def check_arguments(make: Callable, keywords: Any, *, name: str | None = None) -> None:
    """Raises TypeError for a keyword that ``make`` does not take.

    Args:
        make: factory that takes only the keywords of its signature.
        keywords: keywords of the call.
        name: name of the factory in the error; its own by default.
    """
    taken = list(inspect.signature(make).parameters)
    for argument in keywords:
        if argument not in taken:
            raise TypeError(not_taken(name or make.__name__, argument, taken))


def not_taken(name: str, argument: str, taken: Sequence[str], source: str = "") -> str:
    """The message for an argument that is not among those taken.

    Args:
        name: name of the factory.
        argument: the argument that it does not take.
        taken: arguments that it does take.
        source: origin of the argument, if it was not in a call.
    """
    where = f", of {source}" if source else ""
    instead = _instead(argument, taken)
    hint = f": {instead}. It" if instead else "; it"
    return (
        f"{name} takes no argument {argument!r}{where}{hint} takes {', '.join(taken)}"
    )


def _instead(argument: str, taken: Sequence[str]) -> str:
    ours = [name for name in _OURS.get(argument, ()) if name in taken]
    if ours:
        return "give " + ", ".join([*ours[:-2], " and ".join(ours[-2:])])
    instead = _INSTEAD.get(argument)
    of_muon = inspect.signature(optax.contrib.muon).parameters
    if "muon" in taken and argument == "momentum":
        argument = "beta"
    if "muon" in taken and argument in of_muon and instead != _STATE_BITS:
        return f'give muon={{"{argument}": ...}}'
    if instead and (instead != _STATE_BITS or "state_bits" in taken):
        return instead
    near = difflib.get_close_matches(argument, taken, 1)
    return f"perhaps {near[0]}" if near else ""


def takes_storage(make: _Make) -> _Make:
    """Shows the arguments of `Storage` in the signature of an optimizer.

    ``optax.inject_hyperparams`` reads the signature, and leaves alone what is None. The
    error for an argument outside the signature says what to give instead.
    """
    signature = inspect.signature(make)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in Storage.__annotations__
    ]
    make.__signature__ = signature.replace(parameters=named)
    return names_arguments(make)


def chosen_storage(storage: Any) -> dict[str, Any]:
    """The arguments of `Storage` that are not None."""
    for name in Storage.__annotations__:
        if isinstance(storage.get(name), jax.Array):
            raise TypeError(
                f"{name} decides the shapes of the state and so cannot be an array; "
                f"under optax.inject_hyperparams give static_args={name!r}"
            )
    return {name: value for name, value in storage.items() if value is not None}
