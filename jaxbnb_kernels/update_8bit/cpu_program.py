"""Compiles a rule into the instructions that the native kernel interprets.

The kernel keeps a few hundred elements of each value in the first-level cache, and runs
one instruction after another over them. An instruction is a loop over vectors, so
looking it up costs little. Rules thus have one definition, in jnp, and everyone's own
rule runs as fast as ours.

Values are numbered in the order of `update_8bit.h`: gradient, old moments, parameter;
result, new moments; scalars, constants, uniform results; temporaries. A value that is
the same for all elements is uniform. Instructions that compute uniform values come
first, and run once for many elements.
"""

import collections
import dataclasses
import enum
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxbnb_kernels.update_8bit.operands import Step


class Op(enum.IntEnum):
    """Instructions, as `update_8bit.h` numbers them. Truth is one or zero."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    DIV = 4
    MAX = 5
    MIN = 6
    ABS = 7
    NEG = 8
    SIGN = 9
    SQRT = 10
    RSQRT = 11
    IS_FINITE = 12
    LT = 13
    LE = 14
    EQ = 15
    NE = 16
    NOT = 17
    SELECT = 18  # a ? b : c
    FMA = 19  # a * b + c
    FMS = 20  # a * b - c
    FNMA = 21  # c - a * b
    SUM_OF_PRODUCTS = 22  # a * b + c * d
    PRODUCT = 23  # a * b * c
    DIV_BY_SUM = 24  # a / (b + c)
    QUOTIENT = 25  # (a * b) / (c + d)
    SQRT_OF_FMA = 26  # sqrt(a * b + c)
    SELECT_FINITE = 27  # is_finite(a) ? b : c
    SELECT_FINITE_SUM = 28  # is_finite(a + b) ? c : d


_DIRECTLY: Final = {
    "add": Op.ADD,
    "sub": Op.SUB,
    "mul": Op.MUL,
    "div": Op.DIV,
    "max": Op.MAX,
    "min": Op.MIN,
    "abs": Op.ABS,
    "neg": Op.NEG,
    "sign": Op.SIGN,
    "sqrt": Op.SQRT,
    "rsqrt": Op.RSQRT,
    "is_finite": Op.IS_FINITE,
    "lt": Op.LT,
    "le": Op.LE,
    "eq": Op.EQ,
    "ne": Op.NE,
    "not": Op.NOT,
    # Their operands are ones and zeros.
    "and": Op.MUL,
    "or": Op.MAX,
}
_SWAPPED: Final = {"gt": Op.LT, "ge": Op.LE}
_CALLS: Final = ("jit", "pjit")
_DTYPES: Final = (np.dtype(np.float32), np.dtype(bool))
# Limits of `update_8bit.h`.
MOST_MOMENTS: Final = 8
MOST_VALUES: Final = 128


@dataclasses.dataclass(frozen=True)
class Program:
    """A rule as instructions.

    Attributes:
        instructions: rows of six integers: an `Op`, the number of the value that it
            writes, and the numbers of four operands; unused operands are zero.
        constants: numbers in the rule.
        num_uniforms: how many instructions, the first ones, compute uniform values.
        num_temporaries: how many temporaries the other ones need.
    """

    instructions: tuple[tuple[int, ...], ...]
    constants: tuple[float, ...]
    num_uniforms: int
    num_temporaries: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A value within a rule: an input, a constant, or the result of an operation.

    Attributes:
        op: operation, or None for an input or constant.
        operands: operands of the operation.
        is_uniform: whether all elements are the same.
        constant: value of a constant.
    """

    op: Op | None
    operands: tuple["_Value", ...]
    is_uniform: bool
    constant: float | None = None


@functools.lru_cache(256)
def compile_rule(step: Step, has_param: bool) -> Program:
    """Compiles the rule of a step.

    Args:
        step: static description of the step.
        has_param: whether the step writes the parameter.

    Raises:
        NotImplementedError: the rule uses an operation, a dtype or a captured array
            that the native kernel does not support, or too many of them.
    """
    num_moments, num_scalars = len(step.signed), step.scalars.num_leaves
    if not 1 <= num_moments <= MOST_MOMENTS:
        raise NotImplementedError(
            f"the native kernel supports 1 to {MOST_MOMENTS} moments; got {num_moments}"
        )
    scalar, element = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((), (1,)))
    args = [
        step.scalars.unflatten([scalar] * num_scalars),
        element,
        (element,) * num_moments,
        *([element] * has_param),
    ]
    jaxpr = jax.make_jaxpr(step.rule.apply_to if has_param else step.rule.apply)(*args)
    scalars = [_Value(None, (), is_uniform=True) for _ in range(num_scalars)]
    elements = [_Value(None, (), False) for _ in range(1 + num_moments + has_param)]
    tracer = _Tracer()
    outputs = tracer.trace(jaxpr, [*scalars, *elements])
    values, outputs = _fuse(tracer.known.values(), outputs)
    # An operand of XLA is better not empty, so there is always a scalar.
    scalars = scalars or [_Value(None, (), is_uniform=True)]
    program = _assemble(elements, scalars, values, outputs)
    num_values = len((*elements, *outputs, *scalars, *program.constants))
    num_values += program.num_uniforms + program.num_temporaries
    if num_values > MOST_VALUES:
        raise NotImplementedError(
            f"the native kernel supports rules of up to {MOST_VALUES} values; this one "
            f"has {num_values}"
        )
    return program


class _Tracer:
    """Turns a jaxpr into values. Equal operations on equal operands are one value.

    Attributes:
        known: the values, operands first.
    """

    def __init__(self):
        self.known: dict[Any, _Value] = {}

    def trace(self, jaxpr: ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """Returns the results for these inputs."""
        if jaxpr.consts:
            raise NotImplementedError(
                "the native kernel does not support a rule that captures arrays; pass "
                "them as scalars"
            )
        values: dict[Any, _Value] = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))

        def read(atom):
            return self._constant(atom) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _apply(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        name = equation.primitive.name
        if name in _CALLS:
            return self.trace(equation.params["jaxpr"], operands)
        for atom in (*equation.invars, *equation.outvars):
            _check_dtype(atom.aval.dtype)
        if name in _DIRECTLY:
            return [self._value(_DIRECTLY[name], *operands)]
        if name in _SWAPPED:
            return [self._value(_SWAPPED[name], *reversed(operands))]
        if name == "square" or (name, equation.params.get("y")) == ("integer_pow", 2):
            return [self._value(Op.MUL, *operands, *operands)]
        if name == "select_n" and equation.invars[0].aval.dtype == bool:
            which, if_false, if_true = operands
            return [self._value(Op.SELECT, which, if_true, if_false)]
        if name == "broadcast_in_dim":
            return operands
        # To float32: truth is one or zero anyway.
        if name == "convert_element_type" and equation.outvars[0].aval.dtype != bool:
            return operands
        raise NotImplementedError(
            f"the native kernel does not support {name} in a rule"
        )

    def _constant(self, literal: Any) -> _Value:
        _check_dtype(literal.aval.dtype)
        number = np.float32(literal.val)
        # The bytes tell zeros from each other, and are the same for the same NaN.
        new = _Value(None, (), is_uniform=True, constant=float(number))
        return self.known.setdefault(number.tobytes(), new)

    def _value(self, op: Op, *operands: _Value) -> _Value:
        is_uniform = all(x.is_uniform for x in operands)
        new = _Value(op, operands, is_uniform)
        return self.known.setdefault((op, *operands), new)


def _check_dtype(dtype: np.dtype) -> None:
    if dtype not in _DTYPES:
        raise NotImplementedError(
            f"the native kernel does not support {dtype} in a rule"
        )


def _needed(values: Iterable[_Value], outputs: Sequence[_Value]) -> list[_Value]:
    """Returns the values that outputs are computed from, in the same order."""
    needed, found = set(outputs), []
    for value in reversed(list(values)):
        if value in needed:
            needed.update(value.operands)
            found.append(value)
    return found[::-1]


def _fuse(
    values: Iterable[_Value], outputs: Sequence[_Value]
) -> tuple[list[_Value], list[_Value]]:
    """Fuses operations with the operands that only they use, by the table `_FUSIONS`.

    Products are fused with sums, as XLA's compiler does on a CPU. All other fusions
    compute the same numbers, in fewer passes over the first-level cache.

    Returns:
        The values that are left, operands first, and the outputs.
    """
    outputs = list(outputs)
    for fusions in _FUSIONS:
        values = _needed(values, outputs)
        uses = collections.Counter(outputs)
        uses.update(x for value in values for x in value.operands)
        fused: dict[_Value, _Value] = {}
        for value in values:
            operands = tuple(fused.get(x, x) for x in value.operands)
            is_free = [
                uses[x] == 1 and x.op is not None and not x.is_uniform
                for x in value.operands
            ]
            new = dataclasses.replace(value, operands=operands)
            fused[value] = next(
                (f for fuse in fusions if (f := fuse(new, is_free)) is not None), new
            )
        outputs = [fused.get(x, x) for x in outputs]
        values = fused.values()
    return _needed(values, outputs), outputs


def _fusion(op: Op, position: int, inner: Op, new: Op, order: str):
    """Returns a function that fuses one operand of an operation with it.

    Args:
        op: operation.
        position: position of the operand.
        inner: operation that computes the operand.
        new: operation that computes both.
        order: its operands, numbered as those of ``inner`` and then the other ones of
            ``op``.
    """

    def fuse(value: _Value, is_free: list[bool]) -> _Value | None:
        if value.op is not op or not is_free[position]:
            return None
        operand, others = value.operands[position], list(value.operands)
        if operand.op is not inner:
            return None
        del others[position]
        operands = (*operand.operands, *others)
        operands = tuple(operands[int(i)] for i in order)
        return dataclasses.replace(value, op=new, operands=operands)

    return fuse


# In each pass, the first fusion that fits an operation is done.
_FUSIONS: Final = (
    (
        _fusion(Op.ADD, 0, Op.MUL, Op.FMA, "012"),
        _fusion(Op.ADD, 1, Op.MUL, Op.FMA, "012"),
        _fusion(Op.SUB, 0, Op.MUL, Op.FMS, "012"),
        _fusion(Op.SUB, 1, Op.MUL, Op.FNMA, "012"),
        _fusion(Op.SELECT, 0, Op.IS_FINITE, Op.SELECT_FINITE, "012"),
    ),
    (
        _fusion(Op.FMA, 2, Op.MUL, Op.SUM_OF_PRODUCTS, "2301"),
        _fusion(Op.MUL, 0, Op.MUL, Op.PRODUCT, "012"),
        _fusion(Op.MUL, 1, Op.MUL, Op.PRODUCT, "012"),
        _fusion(Op.SQRT, 0, Op.FMA, Op.SQRT_OF_FMA, "012"),
        _fusion(Op.DIV, 1, Op.ADD, Op.DIV_BY_SUM, "201"),
        _fusion(Op.SELECT_FINITE, 0, Op.ADD, Op.SELECT_FINITE_SUM, "0123"),
    ),
    (_fusion(Op.DIV_BY_SUM, 0, Op.MUL, Op.QUOTIENT, "0123"),),
)


def _assemble(
    elements: list[_Value],
    scalars: list[_Value],
    values: list[_Value],
    outputs: list[_Value],
) -> Program:
    """Numbers the values and lists their instructions."""
    constants = [x for x in values if x.constant is not None]
    uniforms = [x for x in values if x.op is not None and x.is_uniform]
    others = [x for x in values if x.op is not None and not x.is_uniform]
    numbers: dict[_Value, int] = {}
    numbers.update(zip(elements, range(len(elements)), strict=True))
    first_output = len(elements)
    first = first_output + len(outputs)
    for number, value in enumerate((*scalars, *constants, *uniforms), first):
        numbers[value] = number
    # An output is written where it belongs, if it is computed, and not several at once.
    targets: dict[_Value, int] = {}
    for number, output in enumerate(outputs, first_output):
        if output in others:
            targets.setdefault(output, number)
    uses = collections.Counter(x for value in others for x in value.operands)
    result, count = outputs[0], len(set(outputs))
    # The result may overwrite an input in memory, so nothing may follow it.
    if uses[result] or len(outputs) != count:
        targets.pop(result, None)
    kept = {x for x in outputs if x not in targets}
    first_temporary = first + len(scalars) + len(constants) + len(uniforms)
    temporaries = _Temporaries(first_temporary, others, kept)
    lines = [_line(x, numbers[x], numbers) for x in uniforms]
    for index, value in enumerate(others):
        temporaries.release(index, numbers)
        to = targets.get(value)
        numbers[value] = temporaries.take() if to is None else to
        if value is not result or to is None:
            lines.append(_line(value, numbers[value], numbers))
    # In this order, so that the result comes last.
    for number, output in reversed([*enumerate(outputs, first_output)]):
        if targets.get(output) != number:
            lines.append((int(Op.COPY), number, numbers[output], 0, 0, 0))
    if result in targets:
        lines.append(_line(result, first_output, numbers))
    return Program(
        tuple(lines),
        tuple(x.constant for x in constants if x.constant is not None),
        len(uniforms),
        temporaries.count,
    )


class _Temporaries:
    """The numbers of temporaries: free again after the last use of a value.

    Attributes:
        count: how many there are.
    """

    def __init__(self, first: int, values: list[_Value], kept: set[_Value]):
        self.first, self.count = first, 0
        self.free: list[int] = []
        last = {x: i for i, value in enumerate(values) for x in value.operands}
        self.ends: dict[int, list[_Value]] = {}
        for value, index in last.items():
            if value not in kept:
                self.ends.setdefault(index, []).append(value)

    def take(self) -> int:
        if not self.free:
            self.free.append(self.first + self.count)
            self.count += 1
        return self.free.pop()

    def release(self, index: int, numbers: dict[_Value, int]) -> None:
        """Frees what instruction ``index`` reads last: it may overwrite that."""
        for value in self.ends.get(index, ()):
            if numbers[value] >= self.first:
                self.free.append(numbers[value])


def _line(value: _Value, to: int, numbers: dict[_Value, int]) -> tuple[int, ...]:
    assert value.op is not None
    operands = [numbers[x] for x in value.operands]
    return int(value.op), to, *(*operands, 0, 0, 0, 0)[:4]
