"""Tidies API pages: signatures as in the source, one reference per line."""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _signature_as_written)
    # Runs before napoleon (500), which would join them into one paragraph.
    app.connect("autodoc-process-docstring", _separate_references, priority=400)
    app.connect("source-read", _close_examples)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    return {"version": "1", "parallel_read_safe": True}


def _signature_as_written(app, what, name, obj, options, signature, returned):
    """Writes ArrayLike, not the union of eight types that it stands for.

    A class gets the arguments of its constructor, even if a metaclass hides them.
    """
    if what not in ("class", "function", "method"):
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body
    if isinstance(node, ast.FunctionDef):
        arguments = _without_self(node.args)
        returns = ast.unparse(node.returns).strip("'") if node.returns else ""
        return f"({ast.unparse(arguments)})", returns
    constructors = [
        item
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    ]
    if constructors:
        return f"({ast.unparse(_without_self(constructors[0].args))})", ""
    # A dataclass or a NamedTuple.
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return (f"({', '.join(map(ast.unparse, fields))})", "") if fields else None


def _without_self(arguments: ast.arguments) -> ast.arguments:
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    return arguments


def _separate_references(app, what, name, obj, options, lines):
    """Makes each reference, which ends in a full stop, a paragraph."""
    if "References:" in lines:
        start = lines.index("References:")
        for i in reversed(range(start, len(lines))):
            if lines[i].endswith("."):
                lines.insert(i + 1, "")


def _close_examples(app, name, source):
    """Removes the empty line that doctest needs after an example's output."""
    source[0] = re.sub(r"\n\n```(?=\n)", "\n```", source[0])
