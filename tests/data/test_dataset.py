"""load_dataset: what is a row, where it is, and what is not one."""

import json
import tracemalloc

import pytest

from jaxbnb.data import BadRow, DataError, load_dataset

ROWS = [{"text": "a"}, {"text": "é\u2028b"}, {"prompt": "c", "completion": "d"}]


@pytest.fixture
def write(tmp_path):
    def write(name, contents):
        path = tmp_path / name
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return path

    return write


def lines(rows, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", lines(ROWS) + "\n"),
        ("a.ndjson", "\n \t\n" + lines(ROWS, "\r\n\r\n") + "\n\n"),
        ("a.JSONL", b"\xef\xbb\xbf" + lines(ROWS).encode()),
        ("a.json", json.dumps(ROWS)),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
    ],
)
def test_rows_of_files_in_any_order(write, name, contents):
    dataset = load_dataset(write(name, contents))
    assert [dataset[i] for i in (2, 0, 1, -1)] == [ROWS[i] for i in (2, 0, 1, 2)]
    assert list(dataset) == ROWS
    assert len(dataset) == 3
    with pytest.raises(IndexError, match="row 3 of 3 rows"):
        dataset[3]
    with pytest.raises(TypeError, match="one row at a time"):
        dataset[:2]


def test_several_files_and_where_each_row_is(write):
    paths = [
        write("a.jsonl", "\n" + lines(ROWS[:2], "\n\n")),
        write("b.txt", b"\xef\xbb\xbfOne\ntwo\n"),
        write("c.json", json.dumps(ROWS)),
    ]
    dataset = load_dataset([str(paths[0]), *paths[1:]])
    assert list(dataset) == [*ROWS[:2], {"text": "One\ntwo\n"}, *ROWS]
    assert [dataset.describe(i) for i in range(6)] == [
        f"{paths[0]}, line 2",
        f"{paths[0]}, line 4",
        f"{paths[1]}",
        *(f"{paths[2]}, row {i}" for i in range(3)),
    ]
    assert repr(dataset) == "Dataset(6 rows)"


def test_rows_in_memory():
    class Split:
        """What a Hugging Face dataset has."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ROWS[index]

        def __iter__(self):
            raise AssertionError("rows must be read by index")

    for source, want in (
        (ROWS, ROWS),
        (tuple(ROWS), ROWS),
        (iter(ROWS), ROWS),
        (Split(), ROWS[:2]),
    ):
        dataset = load_dataset(source)
        assert list(dataset) == want
        assert dataset.describe(1) == "row 1"


BAD = (lines(ROWS[:1]) + '\n{"text": \n[1]\n' + lines(ROWS[1:])).encode() + b"\n\xff"


def test_bad_lines_are_errors_or_left_out(write):
    path = write("a.jsonl", BAD)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .* on_error='skip'"):
        load_dataset(path)
    with pytest.warns(UserWarning, match="^3 rows are left out:\n") as warned:
        dataset = load_dataset(path, on_error="skip")
    assert len(warned) == 1
    assert [bad.place for bad in dataset.errors] == [
        f"{path}, line {n}" for n in (2, 3, 6)
    ]
    assert dataset.errors[1] == BadRow(f"{path}, line 3", "not a JSON object: [1]")
    assert "utf-8" in dataset.errors[2].reason
    assert dataset.num_errors == 3
    assert len(dataset) == 3
    assert dataset.describe(1) == f"{path}, line 4"


def test_many_bad_lines_make_one_short_warning(write):
    path = write("a.jsonl", lines(ROWS) + "\n" + "no\n" * 2000)
    with pytest.warns(UserWarning, match="2,000 rows are left out") as warned:
        dataset = load_dataset(path, on_error="skip")
    assert len(str(warned[0].message).splitlines()) == 7
    assert dataset.num_errors == 2000
    assert len(dataset.errors) == 1000


def test_bad_rows_of_a_list(write):
    path = write("a.json", json.dumps([ROWS[0], 7, ROWS[1]]))
    with pytest.raises(DataError, match=r"a\.json, row 1: not an object: 7"):
        load_dataset(path)
    with pytest.warns(UserWarning, match="1 row is left out"):
        dataset = load_dataset(path, on_error="skip")
    assert list(dataset) == ROWS[:2]
    assert dataset.describe(1) == f"{path}, row 2"


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl has no rows to train on: it is empty"),
        ("a.jsonl", "\n \n", "it is empty"),
        ("a.json", "[]", "it is empty"),
        ("a.txt", " \n", "the file is empty"),
        ("a.txt", b"a\xff", "not UTF-8"),
        ("a.json", lines(ROWS), r"its name must end in \.jsonl"),
        ("a.json", '{"data": []}', "must hold a list of objects, got dict"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, "line 1: .*nested too deeply"),
        ("a.jsonl", lines(ROWS).encode("utf-16"), "is in UTF-16; save it in UTF-8"),
        ("a.csv", "text\na\n", r"the name must end in \.jsonl, \.json"),
    ],
)
def test_files_that_are_none(write, name, contents, message):
    with pytest.raises(DataError, match=message):
        load_dataset(write(name, contents))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], DataError, "list has no rows to train on"),
        (7, TypeError, "source must be a path, .* got int"),
        ({"train": ROWS}, TypeError, "give one split"),
        ([7], DataError, "row 0 is of type int, not a dict"),
        (["Four score " * 999], FileNotFoundError, "Texts are given as rows"),
        ("no.jsonl", FileNotFoundError, r"no\.jsonl: no such file"),
        (".", DataError, "is a folder; give its files"),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=message):
        load_dataset(source)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip'"):
        load_dataset(source, on_error="ignore")


def test_a_file_that_changes_later(write):
    path = write("a.jsonl", lines(ROWS))
    dataset = load_dataset(path)
    path.write_text("x" * 100)
    with pytest.raises(DataError, match="line 2 has changed since"):
        dataset[1]


def test_sources_with_the_same_rows(write):
    rows = [{"text": str(number)} for number in range(3)]
    lines = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    other = write("b.jsonl", json.dumps(rows[0]))
    both = load_dataset([other, lines])
    same = write("c.json", json.dumps(rows))
    for source in (lines, same, [same, other], rows, iter(rows)):
        assert load_dataset(source).shares_source(both)
    for source in (rows[:2], [*rows, rows[0]], rows[::-1]):
        assert not load_dataset(source).shares_source(both)


def test_fingerprints_are_of_the_contents(write):
    def of(name, contents):
        return load_dataset(write(name, contents)).fingerprint

    rows = [{"text": f"{i:06}" + "x" * 300} for i in range(20_000)]
    whole = lines(rows)
    assert of("a.jsonl", whole) == of("b.jsonl", whole)
    prints = [
        of("a.jsonl", whole),
        of("a.jsonl", whole.replace("000000x", "00000-x")),
        of("a.jsonl", whole.replace("019999x", "01999-x")),
        of("a.jsonl", whole.replace("xxx", "xyx")),
        of("a.jsonl", lines(rows[1:])),
    ]
    prints += [load_dataset(part).fingerprint for part in (rows, rows[1:], rows[:-1])]
    assert len(set(prints)) == len(prints)
    assert load_dataset(rows).fingerprint == load_dataset(iter(rows)).fingerprint


def test_a_large_file_takes_little_memory(tmp_path):
    """64 MB in 2,000 rows: the index is 16 bytes a row, and a row is 32 kB."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 32_000}).encode() + b"\n"
    path.write_bytes(line * 2000)
    tracemalloc.start()
    try:
        dataset = load_dataset(path)
        assert dataset[1999]["text"] == "x" * 32_000
        assert dataset.fingerprint
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A few copies of a line, and one sample of 64 KiB.
    assert peak < 1_000_000


def test_parquet_without_pyarrow(write, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a \.parquet file needs pyarrow"):
        load_dataset(write("a.parquet", b"PAR1"))
