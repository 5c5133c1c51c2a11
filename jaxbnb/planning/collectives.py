"""collective_bytes: how much the devices of a compiled program send to each other."""

import collections
import math
import re
from typing import Any, Final

_BITS: Final = {"pred": 8, "bf16": 16, "token": 0}
_KINDS: Final = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# "  %name = f32[8,16]{1,0} all-gather(...), ..., body=%name, ..."
_INSTRUCTION: Final = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\((.*)$"
)
_COMPUTATION: Final = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_SHAPE: Final = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_CALLED: Final = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES: Final = re.compile(
    r"(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS: Final = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(compiled: Any) -> dict[str, int]:
    """Counts the bytes that each device gets from the collectives of a program.

    A collective in a loop counts once for each iteration. An all-gather, all-to-all or
    permutation counts with its result. An all-reduce and a reduce-scatter count with
    their operand, although the first one may send twice as much.

    Args:
        compiled: compiled function, ``jax.stages.Compiled``, or the text of its HLO.

    Returns:
        The bytes by kind of collective, without those that do not occur.

    Raises:
        ValueError: a loop with a collective has an unknown number of iterations.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> compiled = jax.jit(jnp.sin).lower(jnp.ones(4)).compile()
        >>> collective_bytes(compiled)
        {}
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _parse(text)
    return dict(sorted(_count(entry, computations, {}).items()))


_Lines = list[tuple[str, str, str]]


def _parse(text: str) -> tuple[dict[str, _Lines], str]:
    """Returns the result, operation and rest of each instruction, by computation."""
    computations: dict[str, _Lines] = {}
    entry, current = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append((match[1], match[2], match[3]))
    return computations, entry


def _count(
    name: str,
    computations: dict[str, _Lines],
    known: dict[str, collections.Counter[str]],
) -> collections.Counter[str]:
    """Counts the bytes of a computation and of those that it calls."""
    if name in known:
        return known[name]
    total: collections.Counter[str] = collections.Counter()
    for result, operation, rest in computations.get(name, []):
        kind = operation.removesuffix("-start")
        if kind in _KINDS:
            total[kind] += _measure(kind, result, operation, rest)
            continue
        called = _CALLED.findall(rest)
        for names in _BRANCHES.findall(rest):
            called += re.findall(r"%?([\w.-]+)", names)
        inner: collections.Counter[str] = collections.Counter()
        for other in called:
            inner.update(_count(other, computations, known))
        times = 1
        if operation == "while" and inner:
            trips = _TRIPS.search(rest)
            if trips is None:
                raise ValueError(
                    f"{name} has a loop with {sorted(inner)} and an unknown number of "
                    "iterations, so their bytes cannot be counted"
                )
            times = int(trips[1])
        total.update({kind: times * count for kind, count in inner.items()})
    known[name] = total
    return total


def _measure(kind: str, result: str, operation: str, rest: str) -> int:
    """Returns the bytes of a collective."""
    sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
    if operation.endswith("-start") and kind != "all-reduce" and len(sizes) > 1:
        # The result of a start is the operands, then the results.
        sizes = sizes[len(sizes) // 2 :]
    total = sum(sizes)
    if kind == "reduce-scatter":
        return total * _group_size(rest)
    return total


def _group_size(rest: str) -> int:
    """Returns the number of devices that a collective is among."""
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'\w+'", match[2]))
    raise ValueError(f"a collective does not say who takes part: {rest[:200]}")


def _size(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * max(bits, 8) // 8
