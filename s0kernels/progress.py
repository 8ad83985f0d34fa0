"""How far a long piece of work is, on standard error: a bar where somebody watches, a line now and then in a log."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import Any

#: seconds between two lines of a log, except the first and the last
PAUSE = 30.0
_silences = 0


@contextlib.contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """Show nothing of any work, in all threads, if that is `wanted`."""
    global _silences
    _silences += wanted
    try:
        yield
    finally:
        _silences -= wanted


def watched() -> bool:
    """Whether somebody sees a bar move: on a terminal, and in a notebook that has widgets."""
    return not _silences and (sys.stderr.isatty() or _in_notebook())


def say(text: str) -> None:
    """A line on standard error, unless work is `silent`."""
    if not _silences:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Of work that has `total` units, of which some may be `done` before; None: nobody knows how many it has.

    A log gets a line at the beginning, one at the end, and between them one for each tenth of the work, but none within
    `PAUSE` seconds after another. A terminal without tqdm counts as a log.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, shown: bool = True):
        self._what, self._total, self._unit, self.done, self._note = what, total, unit, done, ""
        self._bar = None
        self._shown = shown and not _silences
        self._began = self._last = time.monotonic()
        self._said = done
        if self._shown and watched():
            self._bar = _bar(total=total, initial=done, desc=what, unit=unit)
        if self._shown and self._bar is None:
            self._say()

    def reach(self, done: int, note: str = "") -> None:
        """So many units are done; `note` says how it goes."""
        more, self.done, self._note = done - self.done, done, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(more)
        elif self._shown and time.monotonic() - self._last >= PAUSE:
            tenth = 0 if self._total is None else self._total / 10
            if done - self._said >= tenth and done != self._total:
                self._say()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self.done != self._said:
            self._say()
        self._shown, self._bar = False, None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self) -> None:
        now = time.monotonic()
        total = "" if self._total is None else f" of {self._total}"
        parts = [f"{self._what}: {self.done}{total} {self._unit}s", self._note]
        parts += [f"{now - self._began:.0f} s"] if self.done != self._said else []
        self._last, self._said = now, self.done
        say(", ".join(filter(None, parts)))


def _in_notebook() -> bool:
    return type(sys.stderr).__module__.startswith("ipykernel") and importlib.util.find_spec("ipywidgets") is not None


def _bar(**options: Any) -> Any:
    """None where tqdm is not installed."""
    try:
        if _in_notebook():
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(**options)
