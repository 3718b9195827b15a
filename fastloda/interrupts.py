"""Deferral of the signals that would end a run, until the run has saved its work."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_wait() -> Generator[list[int]]:
    """Defer SIGINT (Ctrl-C) and SIGTERM to the end of the context, and yield the list of those received.

    A second signal acts at once. Only the main thread handles signals; in other threads the list stays empty. A signal that is
    ignored (as under nohup) stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            take_effect(number)

    def take_effect(number: int) -> None:
        signal.signal(number, before[number])
        signal.raise_signal(number)

    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
