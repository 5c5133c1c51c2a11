"""The checks of ops: they pass where numbers are right, and only there."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_library import library

from jaxbnb_kernels import checks, errors
from jaxbnb_kernels.codebooks import NF4
from jaxbnb_kernels.update_8bit import Moment

every_op = pytest.mark.parametrize("op", checks.CHECKS)


# The number of rows that a GPU needs takes long on a CPU.
SIZES = dataclasses.replace(checks.FULL, rows=37)


def implementations_of(op):
    known = importlib.import_module(f"jaxbnb_kernels.{op}").IMPLEMENTATIONS
    return [name for name in known if name != "mosaic_gpu"]


@pytest.mark.parametrize(
    ("op", "implementation"),
    [(op, name) for op in checks.CHECKS for name in implementations_of(op)],
)
def test_right_numbers_pass(op, implementation):
    if implementation == "cpu":
        library()
    errors = dict(checks.CHECKS[op](implementation, SIZES))
    assert errors
    assert max(errors.values()) <= 1, errors


def off_by_one(codes):
    """Flips the lowest bit of one code, or of two codes of 4 bits."""
    return codes.at[-1, -1].set(codes[-1, -1] ^ 0x11)


def in_another_place(y, row=-1):
    """Swaps two neighbours."""
    return y.at[row, -2:].set(y[row, -2:][::-1])


SPOILED = {
    "quantize_blockwise": lambda results: (off_by_one(results[0]), results[1]),
    "dequantize_blockwise": in_another_place,
    # The last of its rows does not exist.
    "embed_blockwise": functools.partial(in_another_place, row=0),
    "matmul_blockwise": in_another_place,
    "grouped_matmul_blockwise": in_another_place,
    "matmul_int8": in_another_place,
    "update_8bit": lambda results: (
        in_another_place(results[0]),
        tuple(Moment(off_by_one(m.codes), m.absmax, m.signed) for m in results[1]),
    ),
}


@every_op
def test_wrong_numbers_do_not(op, monkeypatch):
    """Two wrong elements of one row fail the check."""

    def spoil(name):
        function = getattr(checks, name)

        @functools.wraps(function)
        def spoiled(*args, implementation=None, **options):
            results = function(*args, **options)
            return SPOILED[name](results) if implementation == "xla" else results

        monkeypatch.setattr(checks, name, spoiled)

    spoil(op)
    if op == "quantize_blockwise":
        spoil("dequantize_blockwise")
    errors = dict(checks.CHECKS[op]("xla", checks.BRIEF))
    passed = {what for what, error in errors.items() if error <= 1}
    assert passed <= {"a row that does not exist, bfloat16"}, errors


@pytest.mark.parametrize(
    "spoil",
    [
        lambda codes, absmax: (codes, 1.001 * absmax),
        lambda codes, absmax: (codes, jnp.nan_to_num(absmax)),
        lambda codes, absmax: (codes, jnp.nan * absmax),
    ],
)
def test_wrong_absmax_are_seen(spoil):
    x = checks._extremes(37, np.float32)
    codes, absmax = checks.quantize_blockwise(x, NF4, block_size=64)
    assert errors.worst_code(x, codes, absmax, NF4, 64) <= 1
    codes, absmax = map(np.asarray, spoil(codes, absmax))
    assert not errors.worst_code(x, codes, absmax, NF4, 64) <= 1


def test_results_that_differ_from_call_to_call_are_seen():
    calls = iter(range(3))
    x = jnp.zeros(8)

    def differs(x):
        return x + jax.pure_callback(lambda x: x + next(calls), x, x)

    with pytest.raises(AssertionError, match="of the same call differ"):
        checks._run(differs, x)
