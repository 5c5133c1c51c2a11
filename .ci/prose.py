"""Holds the countable rules of CONTRIBUTING's "Plain English", as part of `make lint`.

Reads docstrings, comments, error messages, the command line's help, and Markdown.
Code, and what stands in backticks, does not count.

    python .ci/prose.py              # each finding, a table, and whether limits hold
    python .ci/prose.py --count      # the table alone
    python .ci/prose.py jaxbnb/optim # part of the tree; limits are for all of it
"""

import argparse
import ast
import collections
import dataclasses
import io
import pathlib
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator

PATHS = (
    *("jaxbnb", "jaxbnb_kernels", "tests", "docs", "examples"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci"),
)
_PREPOSITIONS = (
    "about|across|after|against|along|among|as|at|before|beside|besides|between|beyond"
    "|by|for|from|in|into|like|of|on|onto|over|per|since|through|to|toward|towards"
    "|under|until|upon|via|with|within|without"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is looked for, and how many of it the whole tree may have.

    Attributes:
        pattern: matches at a finding.
        limit: the findings allowed; below 1, their share of the entries.
        advice: what to write instead.
    """

    pattern: re.Pattern[str]
    limit: float
    advice: str


PREPOSITION = "preposition"
RULES = {
    # At the start of an entry of Args, Attributes, Returns, Raises or Yields.
    PREPOSITION: Rule(
        re.compile(rf"(?:{_PREPOSITIONS})(?![\w-])", re.IGNORECASE),
        limit=0.03,
        advice='begin an entry with a noun: "dtype of the result", not "of the result"',
    ),
    "Of": Rule(
        re.compile(r"(?:^|(?<=[.!?:] ))(?:Of|(?:To|By|With) which)\b"),
        limit=0,
        advice='begin a sentence with its subject, not with "Of" or "By which"',
    ),
    "is no": Rule(
        re.compile(r"(?<!there )\b(?:is|are) no\b(?! longer)", re.IGNORECASE),
        limit=5,
        advice='write "is not a"',
    ),
    "there is no": Rule(
        re.compile(r"\bthere (?:is|are) no\b(?! longer)", re.IGNORECASE),
        limit=40,
        advice='"without", "unknown" or "does not ... any" often say it better',
    ),
    "of which": Rule(
        re.compile(r"\bof which\b", re.IGNORECASE),
        limit=12,
        advice="let a noun or a verb do the work, or make two sentences",
    ),
    "whose": Rule(
        re.compile(r"\bwhose\b", re.IGNORECASE),
        limit=40,
        advice="let a noun or a verb do the work, or make two sentences",
    ),
}

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Warns):$")
_OTHER_SECTION = re.compile(r"(Example|Examples|References|Note|Notes):$")
_NAME = re.compile(r"^[\w*`.]+(?:, [\w*`.]+)*(?: \([^)]*\))?: +")
_BULLET = re.compile(r"^(?:[-*+]|\d+\.) +")
_CODE = re.compile(r"``.+?``|`[^`]+`")


@dataclasses.dataclass
class Passage:
    """A paragraph, an entry of a section, an item of a list, or a cell of a table.

    Attributes:
        is_entry: whether it explains an argument, an attribute, a result or an error.
        lines: number and text of each line.
    """

    is_entry: bool = False
    lines: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """On one line, with a letter for each character of code."""
        joined = " ".join(line for _, line in self.lines)
        return _CODE.sub(lambda code: "x" * len(code[0]), joined)

    def line_at(self, offset: int) -> tuple[int, str]:
        """The number and the text of the line at an offset into `text`."""
        for number, line in self.lines:
            if offset <= len(line):
                return number, line
            offset -= len(line) + 1
        return self.lines[-1]


def read_file(path: pathlib.Path) -> Iterator[Passage]:
    """Yields the passages of a file."""
    source = path.read_text("utf-8")
    if path.suffix == ".md":
        yield from _markdown(source)
    else:
        yield from _docstrings_and_messages(source)
        yield from _comments(source)


def _markdown(source: str) -> Iterator[Passage]:
    fence, passage = "", Passage()
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.strip()
        mark = re.match(r"`{3,}|~{3,}|:{3,}|\$\$", text)
        is_table = text.startswith("|")
        if fence or mark or not text or is_table or _BULLET.match(text):
            yield passage
            passage = Passage()
        if fence:
            fence = "" if text == fence else fence
        elif mark:
            # A directive with colons holds text; one with backticks holds code.
            is_open = mark[0][0] in "`~" or text == "$$"
            fence = mark[0] if is_open else ""
        elif is_table:
            for cell in filter(None, map(str.strip, text.split("|"))):
                yield Passage(lines=[(number, cell)])
        elif text:
            passage.lines.append((number, _BULLET.sub("", text.lstrip("#> "), 1)))
    yield passage


def _docstrings_and_messages(source: str) -> Iterator[Passage]:
    numbered = list(enumerate(source.splitlines(), start=1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            yield from _docstring(numbered[node.lineno - 1 : node.end_lineno])
        elif isinstance(node, ast.Raise) or (
            isinstance(node, ast.keyword) and node.arg in ("help", "description")
        ):
            for part in filter(_is_text, ast.walk(node)):
                yield Passage(lines=[(part.lineno, " ".join(part.value.split()))])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _docstring(numbered: list[tuple[int, str]]) -> Iterator[Passage]:
    passage, entry_indent, in_entries, in_doctest = Passage(), None, False, False
    for number, line in numbered:
        text = re.sub(r'^\w{0,2}"""|"""$', "", line.strip()).strip()
        indent = len(line) - len(line.lstrip())
        in_doctest = text.startswith(">>>") or (in_doctest and bool(text))
        starts_section = _SECTION.match(text) or _OTHER_SECTION.match(text)
        if in_entries and text and not starts_section and entry_indent is None:
            entry_indent = indent
        is_entry = in_entries and indent == entry_indent
        if starts_section or in_doctest or not text or is_entry or _BULLET.match(text):
            yield passage
            passage = Passage(is_entry=is_entry)
        if starts_section:
            in_entries, entry_indent = bool(_SECTION.match(text)), None
        elif text and not in_doctest:
            if is_entry:
                text = _NAME.sub("", text, 1)
            passage.lines.append((number, _BULLET.sub("", text, 1)))
    yield passage


def _comments(source: str) -> Iterator[Passage]:
    passage = Passage()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        number = token.start[0]
        if not passage.lines or passage.lines[-1][0] != number - 1:
            yield passage
            passage = Passage()
        passage.lines.append((number, token.string.lstrip("#: ").strip()))
    yield passage


def find(passage: Passage) -> Iterator[tuple[str, int]]:
    """Yields the rule and the offset of each finding in a passage."""
    text = passage.text()
    for name, rule in RULES.items():
        if name != PREPOSITION:
            yield from ((name, match.start()) for match in rule.pattern.finditer(text))
        elif passage.is_entry and rule.pattern.match(text):
            yield name, 0


def _files(roots: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix in (".py", ".md") and "_build" not in path.parts:
                yield path


def _folder(path: pathlib.Path) -> str:
    return "/".join(path.parts[: min(2, len(path.parts) - 1)]) or "pages"


def _print_table(counts: dict[str, Counter], limits: dict[str, int]) -> None:
    columns = ["entries", *RULES]
    print(f"\n{'':32}" + "".join(f"{column:>12}" for column in columns))
    for folder, count in counts.items():
        print(f"{folder:32}" + "".join(f"{count[column]:12}" for column in columns))
    print(f"{'limit':44}" + "".join(f"{limit:12}" for limit in limits.values()))


def main() -> int:
    """Prints findings and table; returns 1 where the whole exceeds a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="default: all")
    parser.add_argument("--count", action="store_true", help="print the table alone")
    arguments = parser.parse_args()

    counts: dict[str, Counter] = collections.defaultdict(Counter)
    for file in _files(arguments.paths or [pathlib.Path(path) for path in PATHS]):
        for passage in filter(lambda passage: passage.lines, read_file(file)):
            count = counts[_folder(file)]
            count["entries"] += passage.is_entry
            for rule, offset in find(passage):
                count[rule] += 1
                if not arguments.count:
                    number, line = passage.line_at(offset)
                    print(f"{file}:{number}: {rule}: {line[:80]}")

    total = sum(counts.values(), Counter())
    limits = {
        name: int(rule.limit if rule.limit >= 1 else rule.limit * total["entries"])
        for name, rule in RULES.items()
    }
    _print_table(dict(sorted(counts.items())) | {"all": total}, limits)
    exceeded = [name for name, limit in limits.items() if total[name] > limit]
    for name in exceeded:
        print(f"{name}: {total[name]}, more than {limits[name]}: {RULES[name].advice}")
    return 1 if exceeded and not arguments.count else 0


if __name__ == "__main__":
    sys.exit(main())
