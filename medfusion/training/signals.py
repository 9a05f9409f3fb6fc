"""Ctrl-C and SIGTERM: answered between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_held() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM only make the yielded function True; Ctrl-C after either interrupts at once.

    A second SIGTERM does not: schedulers signal every process, and launchers pass on what they were sent.
    """
    asked: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield lambda: False
        return
    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
