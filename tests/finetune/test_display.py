"""What a run shows: a bar in a terminal, and lines elsewhere."""

import pytest

from jaxbnb.finetune._display import Display

pytest.importorskip("rich")


def show(total, done=0):
    display = Display(total, done)
    display.say("before")
    for number in range(done + 1, total + 1):
        display.step(number, f"loss {number}.5", seconds_left=total - number)
    display.close()


def test_lines(capsys, monkeypatch):
    """About twenty of a long run; the last without a time that is left."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show(400)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["before", "step 1/400  loss 1.5  6:39 min left"]
    assert lines[-1] == "step 400/400  loss 400.5"
    assert len(lines) == 22


def test_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(4, done=2)
    err = capsys.readouterr().err
    assert "before" in err
    assert "4/4" in err
    assert "loss 4.5" in err
    assert "step 4/4" not in err


def test_other_processes_say_nothing(capsys):
    display = Display(2, 0, is_quiet=True)
    display.say("before")
    display.step(1, "loss 1.5", 1.0)
    display.close()
    assert capsys.readouterr() == ("", "")
