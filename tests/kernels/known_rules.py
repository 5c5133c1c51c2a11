"""Writes `_cpu/known_rules.h`: our optimizers' rules, as programs for the C++ compiler.

``python tests/kernels/known_rules.py`` writes the file again, after a rule or the
compiler of rules has changed. A test compares the two.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxbnb
from jaxbnb.optim._elementwise import _finish
from jaxbnb_kernels import _cpu
from jaxbnb_kernels.update_8bit import block_layout
from jaxbnb_kernels.update_8bit.cpu_program import Op, Program, compile_rule
from jaxbnb_kernels.update_8bit.operands import Step

PATH = Path(_cpu.__file__).with_name("known_rules.h")
LONGEST_LINE = 100
# Optimizers by name; a fused step of some has weight decay, of some not.
OPTIMIZERS = {
    "adam": (jaxbnb.optim.scale_by_adam8bit(), [False, True]),
    "nadam": (jaxbnb.optim.scale_by_adam8bit(nesterov=True), [False, True]),
    "lion": (jaxbnb.optim.scale_by_lion8bit(), [True]),
    "momentum": (jaxbnb.optim.trace8bit(0.9), [False]),
    "nesterov": (jaxbnb.optim.trace8bit(0.9, nesterov=True), [False]),
    "rmsprop": (jaxbnb.optim.scale_by_rms8bit(), [False]),
    "rmsprop_eps_outside": (
        jaxbnb.optim.scale_by_rms8bit(eps_in_sqrt=False),
        [False],
    ),
    "centered": (jaxbnb.optim.scale_by_stddev8bit(), [False]),
    "centered_eps_outside": (
        jaxbnb.optim.scale_by_stddev8bit(eps_in_sqrt=False),
        [False],
    ),
    "adagrad": (jaxbnb.optim.scale_by_rss8bit(), [False]),
    "ademamix": (jaxbnb.optim.scale_by_ademamix8bit(), [True]),
}


def step_of(name: str, has_param: bool, has_decay: bool) -> Step:
    """Returns the step that an optimizer calls `update_8bit` with."""
    definition = OPTIMIZERS[name][0].definition
    count = jax.ShapeDtypeStruct((), jnp.int32)
    scalars = dict(jax.eval_shape(definition.scalars, count))
    names = ["learning_rate"] * has_param + ["weight_decay"] * has_decay
    scalars |= dict.fromkeys(names, count)
    rule = dataclasses.replace(definition.rule, finish=_finish if has_param else None)
    signed = tuple(m.signed for m in definition.moments)
    return Step(rule, jax.tree.structure(scalars), signed, block_layout((256,), 256))


def steps() -> dict[str, tuple[Step, bool]]:
    """Returns ``(step, has_param)`` of all rules by a description."""
    found = {}
    for name, (_, decays) in OPTIMIZERS.items():
        found[f"{name}, an update"] = step_of(name, False, False), False
        for has_decay in decays:
            title = f"{name}, a step{' with weight decay' if has_decay else ''}"
            found[title] = step_of(name, True, has_decay), True
    return found


def header() -> str:
    """Returns the text of the file."""
    rules = [
        (title, step, has_param, compile_rule(step, has_param))
        for title, (step, has_param) in steps().items()
    ]
    programs = [program for *_, program in rules]
    longest = max(len(p.instructions) for p in programs)
    constants = max(len(p.constants) for p in programs)
    moments = max(len(step.signed) for _, step, *_ in rules)
    lines = [
        "// The rules of our optimizers, for the C++ compiler: written by "
        "tests/kernels/known_rules.py.",
        "#pragma once",
        "",
        '#include "update_8bit.h"',
        "",
        "namespace jaxbnb {",
        "",
        "// See `Step` and `Program`.",
        "struct KnownRule {",
        "  int num_moments;",
        f"  bool is_signed[{moments}];",
        "  bool has_param;",
        "  int num_scalars, num_uniforms, num_temporaries, num_constants;",
        f"  float constants[{constants}];",
        "  int num_instructions;",
        f"  Instruction instructions[{longest}];",
        "};",
        "",
        "constexpr KnownRule kKnownRules[] = {",
    ]
    for title, step, has_param, program in rules:
        lines += [f"    // {title}", *_entry(step, has_param, program)]
    lines += [
        "};",
        "",
        f"constexpr int kNumKnownRules = {len(rules)};",
        "",
        "}  // namespace jaxbnb",
        "",
    ]
    return "\n".join(lines)


def _entry(step: Step, has_param: bool, program: Program) -> list[str]:
    def braces(items):
        return "{" + ", ".join(items) + "}"

    def boolean(x):
        return "true" if x else "false"

    numbers = [
        max(step.scalars.num_leaves, 1),
        program.num_uniforms,
        program.num_temporaries,
        len(program.constants),
    ]
    first = [
        str(len(step.signed)),
        braces(map(boolean, step.signed)),
        boolean(has_param),
        *map(str, numbers),
        braces(f"{x!r}f" for x in program.constants),
        str(len(program.instructions)),
    ]
    lines = ["    {" + ", ".join(first) + ",", "     {"]
    for op, *values in program.instructions:
        name = "".join(word.capitalize() for word in Op(op).name.split("_"))
        text = braces([f"Op::k{name}", *map(str, values)])
        joined = f"{lines[-1]}{'' if lines[-1].endswith('{') else ' '}{text},"
        if len(joined) > LONGEST_LINE - 2:
            lines.append(f"      {text},")
        else:
            lines[-1] = joined
    lines[-1] = lines[-1].removesuffix(",") + "}},"
    return lines


if __name__ == "__main__":
    PATH.write_text(header())
