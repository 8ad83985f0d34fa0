"""What is said of long work: bars where somebody watches, lines in a log, nothing where nothing is wanted."""

import contextlib
import pty
import re
import sys
import termios

import pytest

from s0kernels import progress
from s0kernels.progress import Progress, silent


@pytest.fixture
def clock(monkeypatch):
    """A function that lets so many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def lines(capsys) -> list[str]:
    said = capsys.readouterr()
    assert said.out == ""
    assert "\r" not in said.err
    return said.err.splitlines()


def test_a_log_gets_the_beginning_and_the_end(capsys, clock):
    with Progress("counting", 400, "step") as bar:
        for done in range(1, 401):
            clock(0.01)
            bar.reach(done, f"loss {done}")
    assert lines(capsys) == ["counting: 0 of 400 steps", "counting: 400 of 400 steps, loss 400, 4 s"]


def test_long_work_says_something_at_every_tenth(capsys, clock):
    with Progress("counting", 400, "step", done=100) as bar:
        for done in range(101, 401):
            clock(1)
            bar.reach(done)
    assert lines(capsys) == [
        "counting: 100 of 400 steps",
        *(f"counting: {done} of 400 steps, {done - 100} s" for done in range(140, 400, 40)),
        "counting: 400 of 400 steps, 300 s",
    ]


def test_few_slow_steps_are_a_line_each(capsys, clock):
    with Progress("counting", 3, "step") as bar:
        for done in range(1, 4):
            clock(1000)
            bar.reach(done)
    assert len(lines(capsys)) == 4


def test_work_of_unknown_length_says_something_now_and_then(capsys, clock):
    with Progress("checking", None, "result") as bar:
        for done in range(1, 101):
            clock(1)
            bar.reach(done)
    assert [line.split(",")[0] for line in lines(capsys)] == [
        f"checking: {done} results" for done in (0, 30, 60, 90, 100)
    ]


def test_work_that_fails_says_how_far_it_came(capsys, clock):
    with pytest.raises(OSError), Progress("counting", 9, "step") as bar:  # noqa: PT012
        bar.reach(4)
        raise OSError
    assert lines(capsys)[-1].startswith("counting: 4 of 9 steps")


def test_nothing_is_said_where_nothing_is_wanted(capsys, clock):
    def work(shown: bool) -> None:
        with Progress("counting", 9, "step", shown=shown) as bar:
            clock(1000)
            bar.reach(9)

    work(shown=False)
    with silent(), silent(False):
        work(shown=True)
        progress.say("a word")
        assert not progress.watched()
    assert lines(capsys) == []
    with silent(False):
        work(shown=True)
    assert len(lines(capsys)) == 2


@pytest.fixture
def terminal(monkeypatch):
    """A function that does a little work where standard error is a terminal, and gives what that shows."""

    def work() -> str:
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (24, 80))
        with open(ours, "rb", buffering=0) as shown:
            with open(its, "w") as stderr:
                monkeypatch.setattr(sys, "stderr", stderr)
                with Progress("counting", 4, "step") as bar:
                    for done in range(1, 5):
                        bar.reach(done, f"loss {done}")
            text = b""
            with contextlib.suppress(OSError):  # the end, since the other side is closed
                while more := shown.read(4096):
                    text += more
        return text.decode()

    return work


def test_a_terminal_gets_a_bar(terminal):
    shown = terminal()
    assert "\rcounting:   0%|" in shown
    assert re.search(r"\rcounting: 100%\|.*\| 4/4 \[.*, loss 4\]", shown)


def test_a_terminal_without_tqdm_gets_lines(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert terminal().splitlines() == ["counting: 0 of 4 steps", "counting: 4 of 4 steps, loss 4, 0 s"]
