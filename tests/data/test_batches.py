"""Batches: every token in its place once, and the same batches after a restart."""

import dataclasses
import json

import numpy as np
import pytest

from jaxbnb.data import Batches, DataError, Encoder, _reader, load_dataset
from jaxbnb.data import _batches as module

SEQ = 16


@pytest.fixture
def encoder(load):
    return Encoder(load())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in small datasets, and several calls of the tokenizer in each."""
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(_reader, "_ENCODED", 4)


def make_rows(count, seed=0):
    """Texts and completions of up to twice a window; some have no target."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        text = "".join(rng.choice([*"xyz "], rng.integers(0, 2 * SEQ)))
        prompt = {"prompt": f"{number}", "completion": text[: SEQ // 2] or "z"}
        rows.append({"text": text} if number % 2 else prompt)
    return rows


def make(rows, encoder, **options):
    settings = {"batch_size": 3, "accumulate": 2, "seq_length": SEQ, "epochs": 1}
    return Batches(load_dataset(rows), encoder, **{**settings, **options})


def documents(batch):
    """Yields the tokens and targets of each document; padding must have no target."""
    arrays = (x.reshape(-1, x.shape[-1]) for x in batch[:3])
    for tokens, mask, segments in zip(*arrays, strict=True):
        assert (np.diff(segments) >= 0).all()
        assert segments[0] == 1
        for number in np.unique(segments):
            inside = segments == number
            if mask[inside].any():
                assert not mask[inside][0]
                yield tuple(tokens[inside]), tuple(mask[inside])


def same(a, b):
    return a.rows == b.rows and all(
        np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_is_there_once(encoder, packing, shuffle):
    rows = make_rows(37)
    batches = make(rows, encoder, packing=packing, shuffle=shuffle)
    found, seen = [], set()
    for batch in batches:
        # Unpacked rows of up to 16 tokens share one bucket too.
        assert batch.tokens.shape == (2, 3, SEQ)
        assert [x.dtype for x in batch[:3]] == [np.int32, bool, np.int32]
        found += documents(batch)
        seen |= set(batch.rows)
    want, targets = [], 0
    for number, row in enumerate(rows):
        example = encoder.encode(row)
        if not example.is_target.any():
            continue
        assert number in seen
        targets += example.is_target.sum()
        # The pieces of a text, each from the last token of the one before.
        for start in range(0, len(example.tokens) - 1, SEQ - 1):
            part = slice(start, start + SEQ)
            is_target = example.is_target[part].copy()
            is_target[0] = False
            want.append((tuple(example.tokens[part]), tuple(is_target)))
    assert sorted(found) == sorted(want)
    assert (found == want) == (not packing and not shuffle)
    statistics = batches.statistics
    assert statistics.targets == targets
    assert statistics.rows == len(rows)
    assert statistics.tokens == sum(len(tokens) for tokens, _ in want)
    assert batches.count_steps() == statistics.positions / (6 * SEQ)
    assert statistics.efficiency == statistics.tokens / statistics.positions


def test_a_restart_at_every_batch_of_two_epochs(encoder):
    rows = make_rows(53)

    def start():
        return make(rows, encoder, epochs=2, seed=3)

    batches = start()
    states, given = [batches.get_state()], []
    for batch in batches:
        given.append(batch)
        states.append(batches.get_state())
    assert len(given) == start().count_steps(2) > 8
    for number, state in enumerate(states):
        fresh, text = start(), json.dumps(state)
        fresh.set_state(state)
        rest = list(fresh)
        assert len(rest) == len(given) - number
        assert all(map(same, rest, given[number:]))
        assert fresh.statistics == batches.statistics
        assert json.dumps(state) == text
    # The epochs have the same rows in another order.
    half = start().count_steps()
    assert not same(given[0], given[half])
    assert not same(given[0], next(make(rows, encoder, seed=4)))
    # Other rows share a chunk, not only their windows have another order.
    assert {*start()._rows_of(0, 0)} != {*start()._rows_of(1, 0)}


def test_a_restart_reads_one_chunk(encoder):
    dataset = load_dataset(make_rows(200))
    options = {"batch_size": 2, "seq_length": SEQ}
    batches = Batches(dataset, encoder, **options)
    for _ in range(40):
        next(batches)
    state = batches.get_state()
    assert state["chunk"] > 5
    read = []

    class Counted(Encoder):
        def encode_batch(self, rows):
            read.extend(rows)
            return super().encode_batch(rows)

    fresh = Batches(dataset, Counted(encoder.tokenizer), **options)
    fresh.set_state(state)
    next(fresh)
    assert 0 < len(read) <= 2 * module.CHUNK


def test_long_rows_make_smaller_chunks(encoder, monkeypatch):
    rows = make_rows(40)
    whole = list(make(rows, encoder, shuffle=False, packing=False))
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(_reader, "_ENCODED_CHARACTERS", 50)
    batches = make(rows, encoder, shuffle=False, packing=False)
    assert all(same(a, b) for a, b in zip(batches, whole, strict=True))
    assert 1 < batches.get_state()["settings"]["chunk_rows"] < 10


def test_data_that_shrinks_between_runs(encoder):
    """As many rows as before, but with less in them."""
    batches = make(make_rows(40), encoder, batch_size=1, accumulate=1)
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    assert state["window"] == 4
    fresh = make([{"text": "x"}] * 40, encoder, batch_size=1, accumulate=1)
    fresh.set_state(state)
    with pytest.raises(DataError, match="the data has changed since"):
        next(fresh)


def test_a_state_of_other_batches_is_refused(encoder):
    rows = make_rows(20)
    state = make(rows, encoder).get_state()
    with pytest.raises(ValueError, match=r"batch_size is 2 and was 3; seed is 1 and"):
        make(rows, encoder, batch_size=2, seed=1).set_state(state)
    with pytest.raises(ValueError, match="num_rows is 19 and was 20"):
        make(rows[1:], encoder).set_state(state)


def test_the_last_batch_is_filled_with_padding(encoder):
    batches = make([{"text": "xyz"}] * 4, encoder, epochs=None, packing=False)
    for _ in range(3):
        batch = next(batches)
        assert batch.tokens.shape == (2, 3, SEQ)
        assert batch.mask.any(axis=-1).sum() == 4
        assert sorted(batch.rows) == [0, 1, 2, 3]
    assert batches.statistics.windows == 12
    assert batches.get_state()["epoch"] == 2


def test_without_packing_there_are_few_lengths(encoder):
    rows = [{"text": "x" * length} for length in (3, 70, 140, 300)]
    batches = make(
        rows,
        encoder,
        batch_size=1,
        accumulate=1,
        seq_length=200,
        packing=False,
        shuffle=False,
    )
    lengths = [batch.tokens.shape[-1] for batch in batches]
    assert lengths == [64, 128, 200, 200, 128]


LONG = {"prompt": "x" * 12, "completion": "y" * 12}


@pytest.mark.parametrize(
    ("truncation", "want"),
    [("end", "x" * 12 + "y" * 4), ("start", "x" * 3 + "y" * 12 + "<|im_end|>")],
)
def test_long_completions_are_cut(encoder, truncation, want):
    batches = make([LONG], encoder, truncation=truncation)
    with pytest.warns(UserWarning, match=f"row 0: 25 tokens .* at their {truncation}"):
        batch = next(batches)
    decode = encoder.tokenizer.tokenizer.decode
    assert decode(batch.tokens[0, 0].tolist(), False) == want
    assert batch.mask[0, 0].sum() == (4 if truncation == "end" else 13)
    assert batches.statistics.truncated == 1


def test_long_completions_are_refused_or_skipped(encoder):
    with pytest.raises(DataError, match="row 0 has 25 tokens, more than seq_length"):
        next(make([LONG], encoder, truncation="error"))
    batches = make([LONG, {"text": "xyz"}], encoder, truncation="skip")
    assert next(batches).rows == (1,)
    assert batches.statistics.skipped == {"longer than seq_length": 1}


def test_nothing_to_learn(encoder):
    hopeless = {"prompt": "x" * 20, "completion": "y"}
    silent = {"messages": [{"role": "user", "content": "x"}]}
    batches = make([hopeless, silent, silent], encoder)
    with (
        pytest.warns(UserWarning, match="at their end .* no target.*set truncation='s"),
        pytest.raises(
            DataError,
            match=r"none of the 3 rows has a target within 16 tokens.*"
            r"1: truncation cuts all targets off.*truncation='start'",
        ) as raised,
    ):
        next(batches)
    assert "2: nothing in the row is a target" in str(raised.value)
    # Left out, and so not counted as shorter.
    assert batches.statistics.truncated == 0
    # Also before anything is trained.
    with pytest.raises(DataError, match="none of the 3 rows has a target"):
        batches.count_steps()


def test_rows_that_cannot_be_encoded(encoder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "xyz"}\n\n{"no": 1}\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: a row needs text"):
        next(make(path, encoder, shuffle=False))
    batches = make(path, encoder, shuffle=False)
    batches = Batches(
        load_dataset(path, on_error="skip"), encoder, batch_size=1, seq_length=SEQ
    )
    with pytest.warns(UserWarning, match=r"left out, as others like it") as warned:
        assert next(batches).rows == (0,)
    assert len(warned) == 1
    assert batches.statistics.skipped == {"the row cannot be encoded": 2}


def test_notes_are_counted_and_warned_of_once(encoder):
    rows = [{"prompt": "the ", "completion": "answer"}] * 5
    batches = make(rows, encoder)
    with pytest.warns(UserWarning, match="the last tokens of the prompt") as warned:
        next(batches)
    assert len(warned) == 1
    assert list(batches.statistics.notes.values()) == [5]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"accumulate": 1.0}, TypeError, r"accumulate must be an integer, got 1\.0"),
        ({"seq_length": 1}, ValueError, "seq_length must be at least 2"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"truncation": "left"}, ValueError, "truncation must be one of"),
    ],
)
def test_bad_arguments(encoder, changes, error, message):
    with pytest.raises(error, match=message):
        make([{"text": "x"}], encoder, **changes)
    with pytest.raises(TypeError, match="dataset must come from"):
        Batches([{"text": "x"}], encoder, batch_size=1, seq_length=SEQ)


def test_statistics_are_plain(encoder):
    batches = make(make_rows(9), encoder)
    assert batches.statistics.efficiency == 0
    next(batches)
    state = batches.get_state()
    assert json.loads(json.dumps(state)) == state
    assert state["statistics"] == dataclasses.asdict(batches.statistics)
