"""A long computation shows its progress: as a bar on a terminal, as a line now and then in a log."""

import io
import re
import sys
from pathlib import Path

import pytest

from fastloda import progress
from fastloda.progress import EVERY, SHORT, Progress

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that stands still until a test moves it; return a list of one number, the time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], seconds: float, steps: int = 100, **options) -> None:
    with Progress("private", steps, **options) as bar:
        vars(bar._bar).update(delay=0)  # if there were a bar, it would be drawn at once
        for step in range(steps):
            clock[0] += seconds / steps
            bar.update(note=f"loss {steps - step}" if step % 10 == 0 else "")


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    run(clock, 2.5 * EVERY)
    shown = capsys.readouterr()
    assert shown.out == "" and "\r" not in shown.err
    assert shown.err.splitlines() == [
        "private:  40% 40/100 [00:30<00:45,  1.33step/s, loss 70]",
        "private:  80% 80/100 [01:00<00:15,  1.33step/s, loss 30]",
        "private: 100% 100/100 [01:15<00:00,  1.33step/s, loss 10]",
    ]


def test_slow_steps_get_a_line_each(clock, capsys):
    run(clock, 30 * EVERY, steps=10)
    assert len(capsys.readouterr().err.splitlines()) == 11  # the last line is printed even so


def test_what_is_done_in_moments_and_what_is_not_to_be_shown_get_none(clock, capsys):
    run(clock, 0.9 * SHORT)
    run(clock, 9 * EVERY, shown=False)
    list(Progress("reading", 3, "image").over("abc"))
    assert capsys.readouterr().err == ""


def test_an_interrupted_run_says_how_far_it_came_and_a_continued_one_where_it_began(clock, capsys):
    with pytest.raises(KeyboardInterrupt), Progress("public", 100, done=20) as bar:
        clock[0] += 2 * SHORT
        bar.update(20)
        assert bar.done == 40
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "public:  40% 40/100 [00:20<01:00,  1.00step/s]\n"


def test_a_terminal_has_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("sampling", 8, "image") as bar:
        monkeypatch.setattr(bar._bar, "delay", 0)
        for _ in range(8):
            clock[0] += EVERY
            bar.update(note="all well")
    bars = re.split(r"[\r\n]+", sys.stderr.getvalue())
    assert "100%|##########| 8/8" in bars[-2] and "all well" in bars[-2]
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(clock, 9 * EVERY, shown=False)
    assert sys.stderr.getvalue() == ""


def test_nothing_else_draws_bars():
    """Other progress bars would fill a log with thousands of lines."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "fastloda").rglob("*.py"))
        if re.search(r"\btqdm\b|rich\.progress|rich\.live", path.read_text())
    ]
    assert found == ["fastloda/progress.py"]
