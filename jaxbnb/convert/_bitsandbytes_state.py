"""What an entry of a bitsandbytes optimizer's ``state_dict()`` holds of a parameter."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from jaxbnb.convert._errors import (
    CheckpointError,
    MissingTensorError,
    UnsupportedCheckpointError,
)
from jaxbnb.optim.state_format import StateFormat
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED, DYNAMIC8_UNSIGNED

# What hides the tensors of an entry from FSDP; its newer versions write it.
WRAPPER: Final = "__bnb_optimizer_quant_state__"
CODEBOOKS: Final = {True: DYNAMIC8_SIGNED, False: DYNAMIC8_UNSIGNED}
# Elements of a block of the flattened tensor; before version 0.44 it had more.
BLOCK_SIZE: Final = 256
_BLOCK_SIZES: Final = (BLOCK_SIZE, 2048)
_SMALLEST_POSITIVE: Final = {True: 128, False: 1}
_TENSORS: Final = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a moment is in an entry.

    Attributes:
        field: what Optax's state calls it.
        number: of ``state1`` or ``state2``.
        row: which part of it, where two moments are stacked.
        signed: the map in which bitsandbytes holds it.
        negative: whether the moment can be negative.
    """

    field: str
    number: int
    row: int | None = None
    signed: bool = True
    negative: bool = True


_SECOND: Final = Moment("nu", 2, signed=False, negative=False)
_SQUARES: Final = (Moment("nu", 1, negative=False),)

# By the name of Optax's state, as not all of them are public.
FAMILIES: Final[dict[str, tuple[Moment, ...]]] = {
    "ScaleByAdamState": (Moment("mu", 1), _SECOND),
    "ScaleByAdemamixState": (Moment("m1", 1, row=0), Moment("m2", 1, row=1), _SECOND),
    "ScaleByLionState": (Moment("mu", 1),),
    "ScaleByRmsState": _SQUARES,
    "ScaleByRmsWithCountState": _SQUARES,
    "ScaleByRssState": (Moment("sum_of_squares", 1, negative=False),),
    "TraceState": (Moment("trace", 1),),
}


@dataclasses.dataclass(frozen=True)
class Blocks8bit:
    """A moment in 8 bits, in blocks of the flattened tensor.

    Attributes:
        codes: uint8, of the tensor's shape.
        absmax: float32, one a block.
        levels: the 256 that the codes index.
        block_size: elements of a block.
    """

    codes: np.ndarray
    absmax: np.ndarray
    levels: np.ndarray
    block_size: int

    def decode(self) -> np.ndarray:
        absmax = np.repeat(self.absmax, self.block_size)[: self.codes.size]
        return self.levels[self.codes] * absmax.reshape(self.codes.shape)


def encode(values: np.ndarray, moment: Moment) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax as bitsandbytes has them, but no positive square becomes zero.

    Args:
        values: of the shape that torch has.
        moment: which.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    # A flat array lies in the same blocks here.
    form = StateFormat(8, BLOCK_SIZE, moment.signed)
    codes, absmax = (np.array(x) for x in form.encode_exactly(flat))
    if not moment.negative:
        positive = _SMALLEST_POSITIVE[moment.signed]
        codes[(flat > 0) & (codes < positive)] = positive
    return codes.reshape(values.shape), absmax


@dataclasses.dataclass(frozen=True)
class Entry:
    """The state of a parameter in the file.

    Attributes:
        name: what messages call it.
        step: how many the optimizer has taken with this parameter.
        tensors: by bitsandbytes' names, of NumPy.
    """

    name: str
    step: int
    tensors: Mapping[str, np.ndarray]

    def read(self, moment: Moment, shape: tuple[int, ...]) -> np.ndarray | Blocks8bit:
        """A moment of a parameter that has this shape in torch."""
        values = self._tensor(f"state{moment.number}")
        stacked = moment.row is not None
        want = (2, *shape) if stacked else shape
        if values.shape != want:
            hint = "Is order that of the optimizer, and transposed right?"
            if values.shape == (shape if stacked else (2, *shape)):
                hint = "AdEMAMix has two moments there, all others one"
            raise CheckpointError(
                f"{self.name}: state{moment.number} has shape {values.shape}, and must "
                f"have {want} for tx. {hint}"
            )
        part = slice(None) if moment.row is None else moment.row
        if np.issubdtype(values.dtype, np.floating):
            return np.asarray(values[part], np.float32)
        if values.dtype != np.uint8:
            raise UnsupportedCheckpointError(
                f"{self.name}: state{moment.number} is {values.dtype}; bitsandbytes "
                "has float32, or uint8 codes"
            )
        levels = self._tensor(f"qmap{moment.number}")
        if levels.shape != (256,):
            raise CheckpointError(
                f"{self.name}: qmap{moment.number} has shape {levels.shape}, not (256,)"
            )
        absmax = self._tensor(f"absmax{moment.number}")
        if stacked and absmax.shape[:1] != (2,):
            raise CheckpointError(
                f"{self.name}: absmax{moment.number} has shape {absmax.shape}, and "
                "must have a row for each of AdEMAMix' two moments"
            )
        absmax = absmax[part].reshape(-1) if stacked else absmax.reshape(-1)
        count = math.prod(shape)
        sizes = [n for n in _BLOCK_SIZES if -(-count // n) == absmax.size]
        if not sizes:
            blocks = " or ".join(str(-(-count // n)) for n in _BLOCK_SIZES)
            raise CheckpointError(
                f"{self.name}: absmax{moment.number} has {absmax.size} elements for "
                f"one moment, and must have {blocks}: one for each "
                f"{' or '.join(map(str, _BLOCK_SIZES))} of {count}"
            )
        absmax, levels = (np.asarray(x, np.float32) for x in (absmax, levels))
        return Blocks8bit(values[part], absmax, levels, sizes[0])

    def check_family(self, family: str) -> None:
        """Raises if it has other moments than Optax's state of this name."""
        if "state1" not in self.tensors:
            self._tensor("state1")
        want = {f"state{moment.number}" for moment in FAMILIES[family]}
        have = {"state1", "state2"} & self.tensors.keys()
        if have != want:
            names = {True: "Adam, AdamW, LAMB or AdEMAMix", False: "another optimizer"}
            raise CheckpointError(
                f"{self.name}: the file has {' and '.join(sorted(have))}, as "
                f"{names['state2' in have]} has; tx keeps a {family}, of "
                f"{' and '.join(sorted(want))}"
            )

    def _tensor(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise MissingTensorError(
                f"{self.name} has no tensor {name}; it has {sorted(self.tensors)}"
            )
        return self.tensors[name]


def read_entries(state_dict: Mapping[str, Any]) -> list[Entry | None]:
    """The entries in the order of the parameters; None where there is no state."""
    keys = read_keys(state_dict)
    states = state_dict["state"]
    if not isinstance(states, Mapping):
        raise CheckpointError(
            f"'state' must be a dict of the parameters' states; got {states!r:.100}"
        )
    unknown = [key for key in states if key not in keys]
    if unknown:
        raise CheckpointError(
            f"state has entries for {unknown[:5]}, which are in no param_groups"
        )
    return [_entry(f"state[{key!r}]", states.get(key, {})) for key in keys]


def read_keys(state_dict: Any) -> list[Any]:
    """The keys of the parameters, in the order in which the optimizer got them."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(
        state_dict
    ):
        raise CheckpointError(
            "expected what optimizer.state_dict() returns, a dict with 'state' and "
            f"'param_groups'; got {str(state_dict)[:100]}"
        )
    return keys_of(state_dict["param_groups"])


def keys_of(param_groups: Any) -> list[Any]:
    """The parameters of all groups, one after the other."""
    if not isinstance(param_groups, list | tuple):
        raise CheckpointError(
            f"param_groups must be a list of dicts; got {param_groups!r:.100}"
        )
    for i, group in enumerate(param_groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, list | tuple) or not all(
            isinstance(key, int | str) for key in keys
        ):
            raise CheckpointError(
                f"param_groups[{i}] must be a dict with 'params', a list of numbers or "
                f"names; got {group!r:.100}"
            )
    keys = [key for group in param_groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise CheckpointError("a parameter is twice in param_groups")
    return keys


def _entry(name: str, state: Any) -> Entry | None:
    hidden = state.get(WRAPPER, {}) if isinstance(state, Mapping) else None
    if not isinstance(hidden, Mapping):
        raise CheckpointError(
            f"{name} must be a dict of tensors, and so must its entry {WRAPPER!r}, if "
            f"there is one; got {state!r:.100}"
        )
    if not state:
        return None
    state = {key: value for key, value in state.items() if key != WRAPPER} | {**hidden}
    if "max1" in state:
        raise UnsupportedCheckpointError(
            f"{name} has max1: it is of the tensor-wise 8 bits that bitsandbytes had "
            "before 0.50. Only blockwise state is read"
        )
    if "state1" not in state and not {"absmax1", "qmap1"} & state.keys():
        raise UnsupportedCheckpointError(
            f"{name} has {sorted(map(str, state))}, so it is not of an optimizer of "
            "bitsandbytes, whose moments are called state1 and state2"
        )
    if "step" not in state:
        raise MissingTensorError(f"{name} has no step")
    tensors = {
        key: _numpy(f"{name}[{key!r}]", state[key]) for key in _TENSORS if key in state
    }
    return Entry(name, _step(name, state["step"]), tensors)


def _step(name: str, value: Any) -> int:
    """A number of steps, perhaps a tensor of one element."""
    array = _numpy(f"{name}['step']", value)
    # The most that an int32 counter holds. NaN compares as false.
    if array.size != 1 or not 0 <= array.item() < 2**31:
        raise CheckpointError(
            f"{name} must have a step from 0 to 2**31 - 1; got {value!r:.100}"
        )
    return int(array.item())


def _numpy(name: str, x: Any) -> np.ndarray:
    """An array of NumPy, of a tensor of torch too."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        # NumPy has no bfloat16.
        x = (x.float() if x.is_floating_point() else x).numpy()
    if isinstance(x, np.ndarray | np.generic | jax.Array | int | float):
        array = np.asarray(x)
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if is_float or np.issubdtype(array.dtype, np.integer):
            return array
    raise CheckpointError(f"{name} must be a tensor of numbers; got {x!r:.100}")
