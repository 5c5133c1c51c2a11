"""The entries of a bitsandbytes optimizer's ``state_dict()``, one a parameter."""

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

# Newer versions of bitsandbytes hide the tensors of an entry from FSDP under this key.
WRAPPER: Final = "__bnb_optimizer_quant_state__"
CODEBOOKS: Final = {True: DYNAMIC8_SIGNED, False: DYNAMIC8_UNSIGNED}
# Elements in a block of the flattened tensor; before version 0.44 there were 2048.
BLOCK_SIZE: Final = 256
_BLOCK_SIZES: Final = (BLOCK_SIZE, 2048)
_SMALLEST_POSITIVE: Final = {True: 128, False: 1}
_TENSORS: Final = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a moment is in an entry.

    Attributes:
        field: field of Optax's state.
        number: 1 for ``state1``, 2 for ``state2``.
        row: index of the moment in an array that stacks two, or None.
        is_signed: whether bitsandbytes stores it with the signed map.
        can_be_negative: whether its values can be negative.
    """

    field: str
    number: int
    row: int | None = None
    is_signed: bool = True
    can_be_negative: bool = True


_SECOND: Final = Moment("nu", 2, is_signed=False, can_be_negative=False)
_SQUARES: Final = (Moment("nu", 1, can_be_negative=False),)

# Types of Optax's states by name, as some of the types are not public.
FAMILIES: Final[dict[str, tuple[Moment, ...]]] = {
    "ScaleByAdamState": (Moment("mu", 1), _SECOND),
    "ScaleByAdemamixState": (Moment("m1", 1, row=0), Moment("m2", 1, row=1), _SECOND),
    "ScaleByLionState": (Moment("mu", 1),),
    "ScaleByRmsState": _SQUARES,
    "ScaleByRmsWithCountState": _SQUARES,
    "ScaleByRssState": (Moment("sum_of_squares", 1, can_be_negative=False),),
    "TraceState": (Moment("trace", 1),),
}


@dataclasses.dataclass(frozen=True)
class Blocks8bit:
    """A moment in 8 bits, in blocks of the flattened tensor.

    Attributes:
        codes: uint8 array with the tensor's shape.
        absmax: float32, one for each block.
        levels: the 256 values that the codes index.
        block_size: elements in a block.
    """

    codes: np.ndarray
    absmax: np.ndarray
    levels: np.ndarray
    block_size: int

    def decode(self) -> np.ndarray:
        absmax = np.repeat(self.absmax, self.block_size)[: self.codes.size]
        return self.levels[self.codes] * absmax.reshape(self.codes.shape)


def encode(values: np.ndarray, moment: Moment) -> tuple[np.ndarray, np.ndarray]:
    """Encodes as bitsandbytes does, except that no positive square becomes zero.

    Args:
        values: values of the moment, in torch's shape.
        moment: which moment it is.

    Returns:
        ``(codes, absmax)``.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    # Divides a flat array into the same blocks as bitsandbytes.
    blocks = StateFormat(8, BLOCK_SIZE, moment.is_signed)
    codes, absmax = (np.array(x) for x in blocks.encode_exactly(flat))
    if not moment.can_be_negative:
        positive = _SMALLEST_POSITIVE[moment.is_signed]
        codes[(flat > 0) & (codes < positive)] = positive
    return codes.reshape(values.shape), absmax


@dataclasses.dataclass(frozen=True)
class Entry:
    """The state of a parameter in the file.

    Attributes:
        name: name in error messages.
        step: number of steps that the optimizer has taken with this parameter.
        tensors: NumPy arrays by bitsandbytes' names.
    """

    name: str
    step: int
    tensors: Mapping[str, np.ndarray]

    def read(self, moment: Moment, shape: tuple[int, ...]) -> np.ndarray | Blocks8bit:
        """Returns a moment of a parameter that has this shape in torch."""
        values = self._get(f"state{moment.number}")
        is_stacked = moment.row is not None
        expected = (2, *shape) if is_stacked else shape
        if values.shape != expected:
            hint = "Check that order is the optimizer's, and that transposed is right"
            if values.shape == (shape if is_stacked else (2, *shape)):
                hint = "AdEMAMix has two moments in it, all others one"
            raise CheckpointError(
                f"{self.name}: state{moment.number} has shape {values.shape}, but tx "
                f"requires {expected}. {hint}"
            )
        part = slice(None) if moment.row is None else moment.row
        if np.issubdtype(values.dtype, np.floating):
            return np.asarray(values[part], np.float32)
        if values.dtype != np.uint8:
            raise UnsupportedCheckpointError(
                f"{self.name}: state{moment.number} is {values.dtype}; bitsandbytes "
                "stores float32, or uint8 codes"
            )
        levels = self._get(f"qmap{moment.number}")
        if levels.shape != (256,):
            raise CheckpointError(
                f"{self.name}: qmap{moment.number} has shape {levels.shape}, not (256,)"
            )
        absmax = self._get(f"absmax{moment.number}")
        if is_stacked and absmax.shape[:1] != (2,):
            raise CheckpointError(
                f"{self.name}: absmax{moment.number} has shape {absmax.shape}, but "
                "must have a row for each of AdEMAMix's two moments"
            )
        absmax = absmax[part].reshape(-1) if is_stacked else absmax.reshape(-1)
        count = math.prod(shape)
        sizes = [n for n in _BLOCK_SIZES if -(-count // n) == absmax.size]
        if not sizes:
            blocks = " or ".join(str(-(-count // n)) for n in _BLOCK_SIZES)
            raise CheckpointError(
                f"{self.name}: absmax{moment.number} has {absmax.size} elements for "
                f"one moment, but must have {blocks}: one for each "
                f"{' or '.join(map(str, _BLOCK_SIZES))} of {count} elements"
            )
        absmax, levels = (np.asarray(x, np.float32) for x in (absmax, levels))
        return Blocks8bit(values[part], absmax, levels, sizes[0])

    def check_family(self, family: str) -> None:
        """Raises unless the entry has the moments of Optax's state of this name."""
        self._get("state1")
        expected = {f"state{moment.number}" for moment in FAMILIES[family]}
        found = {"state1", "state2"} & self.tensors.keys()
        if found != expected:
            names = {True: "Adam, AdamW, LAMB or AdEMAMix", False: "another optimizer"}
            raise CheckpointError(
                f"{self.name}: the file has {' and '.join(sorted(found))}, like "
                f"{names['state2' in found]}, but tx keeps a {family}, which needs "
                f"{' and '.join(sorted(expected))}"
            )

    def _get(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise MissingTensorError(
                f"{self.name} has no tensor {name}; it has {sorted(self.tensors)}"
            )
        return self.tensors[name]


def read_entries(state_dict: Mapping[str, Any]) -> list[Entry | None]:
    """Returns the entries in the order of the parameters; None without state."""
    keys = _read_keys(state_dict)
    states = state_dict["state"]
    if not isinstance(states, Mapping):
        raise CheckpointError(
            f"'state' must be a dict of the parameters' states; got {states!r:.100}"
        )
    unknown = [key for key in states if key not in keys]
    if unknown:
        raise CheckpointError(
            f"state has entries for {unknown[:5]}, which are not in any of param_groups"
        )
    return [_read_entry(f"state[{key!r}]", states.get(key, {})) for key in keys]


def _read_keys(state_dict: Any) -> list[Any]:
    """Returns the parameters' keys in the order in which the optimizer got them."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(
        state_dict
    ):
        raise CheckpointError(
            "expected the result of optimizer.state_dict(), a dict with 'state' and "
            f"'param_groups'; got {str(state_dict)[:100]}"
        )
    return list_keys(state_dict["param_groups"])


def list_keys(param_groups: Any) -> list[Any]:
    """Returns the parameters' keys, group after group."""
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
        raise CheckpointError("param_groups have a parameter twice")
    return keys


def _read_entry(name: str, state: Any) -> Entry | None:
    hidden = state.get(WRAPPER, {}) if isinstance(state, Mapping) else None
    if not isinstance(hidden, Mapping):
        raise CheckpointError(
            f"{name} must be a dict of tensors, and so must its entry {WRAPPER!r} if "
            f"it has one; got {state!r:.100}"
        )
    if not state:
        return None
    state = {key: value for key, value in state.items() if key != WRAPPER} | {**hidden}
    if "max1" in state:
        raise UnsupportedCheckpointError(
            f"{name} has max1, so it is in the tensor-wise 8 bits of bitsandbytes "
            "before 0.50. jaxbnb reads only blockwise state"
        )
    if "state1" not in state and not {"absmax1", "qmap1"} & state.keys():
        raise UnsupportedCheckpointError(
            f"{name} has {sorted(map(str, state))}, so it does not belong to an "
            "optimizer of bitsandbytes, which calls its moments state1 and state2"
        )
    if "step" not in state:
        raise MissingTensorError(f"{name} has no step")
    tensors = {
        key: _to_numpy(f"{name}[{key!r}]", state[key])
        for key in _TENSORS
        if key in state
    }
    return Entry(name, _to_step(name, state["step"]), tensors)


def _to_step(name: str, value: Any) -> int:
    """Returns a number of steps, which may be stored as a tensor of one element."""
    array = _to_numpy(f"{name}['step']", value)
    # The range of an int32 counter. NaN compares as false.
    if array.size != 1 or not 0 <= array.item() < 2**31:
        raise CheckpointError(
            f"{name} must have a step from 0 to 2**31 - 1; got {value!r:.100}"
        )
    return int(array.item())


def _to_numpy(name: str, x: Any) -> np.ndarray:
    """Returns a NumPy array; also converts tensors of torch."""
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
