"""A progress display for long computations: a bar on a terminal; elsewhere, as in a log, a line every `EVERY` seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

EVERY = 30.0  # seconds between lines
SHORT = 10.0  # seconds; a computation that takes less prints no line at its end


class Progress:
    """The context manager that shows how much of a computation is done, as counted by `update`.

    Where there is no terminal, a last line is printed at the end of the context.

    Args:
        about: the display's label, in a word or two.
        total: the number of units when all is done.
        unit: the name of a unit in the singular, such as "step" or "image".
        done: the number of units that were done before, by a run that this one continues.
        shown: whether to show anything at all.
    """

    def __init__(self, about: str, total: int, unit: str = "step", *, done: int = 0, shown: bool = True):
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=about, unit=unit, delay=1, disable=not terminal)
        self._about = {"prefix": about, "total": total, "unit": unit, "initial": done}
        self.done, self._note, self._lines = done, "", shown and not terminal
        self._began = self._told = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done, and end the display with `note` (if it is empty, with the last one given)."""
        self.done, self._note = self.done + count, note or self._note
        if note:
            self._bar.set_postfix_str(note, refresh=not count)
        self._bar.update(count)
        if self._lines and time.monotonic() - self._told >= EVERY:
            self._tell()

    def say(self, line: str) -> None:
        """Print a line of the caller's own above the bar."""
        tqdm.write(line, file=sys.stderr)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each as done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bar.close()
        if self._lines and time.monotonic() - self._began >= SHORT:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        spent = self._told - self._began
        line = tqdm.format_meter(self.done, elapsed=spent, ncols=0, postfix=self._note or None, **self._about)
        print(line, file=sys.stderr, flush=True)
