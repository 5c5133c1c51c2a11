"""The table of docs/which_models.md, which is made of what there is."""

import importlib.util
import re
from pathlib import Path

from jaxbnb.models.families import FAMILIES

ROOT = Path(__file__).parents[1]


def load_table():
    path = ROOT / "docs/ext/which_models.py"
    spec = importlib.util.spec_from_file_location("which_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(table):
    cells = map(split, table.splitlines()[2:])
    return {row[1].strip("` "): (row[2], row[3].strip("` ")) for row in cells}


def test_every_family_has_a_row():
    module = load_table()
    table = rows(module.make_table())
    assert len(module.LISTED) == 39
    assert set(table) == {*module.LISTED, *module.OTHERS, *FAMILIES}
    assert {name for name, (ours, _) in table.items() if ours == "yes"} == set(FAMILIES)
    assert rows(module.make_table(["gptj"]))["gptj"][0] == "yes"


def test_a_family_in_neither_has_a_reason():
    module = load_table()
    neither = {
        row[1].strip("` ")
        for row in map(split, module.make_table().splitlines()[2:])
        if row[2:4] == ["no", "no"]
    }
    assert neither == set(module.REASONS)
    reasons = {split(line)[4] for line in module.make_table().splitlines()[2:]}
    assert reasons == {"", *module.REASONS.values()}


def test_what_it_says_of_keras_hub_is_tested():
    module = load_table()
    cells = {row[1] for row in rows(module.make_table()).values()} - {"no"}
    claimed = {cell for cell in cells if not cell.endswith(", untested")}
    tests = (ROOT / "tests/keras/test_peers_keras_hub.py").read_text()
    assert claimed == set(re.findall(r"hub\.models\.(\w+Backbone)", tests))
    untested = {cell.split("`")[0] for cell in cells - claimed}
    assert untested == set(module.UNTESTED.values())
    assert set(module.UNTESTED) <= set(FAMILIES)
