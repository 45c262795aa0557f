"""What a stop signal does to a command: SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP, at every moment of its life.

Where nothing can be lost it ends the command at once (`stopping_at_once`); where work can be saved it becomes a request
(`stop_on_signals` in a task, the loop of a local run); where it would do harm it waits (`held`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that closes; under nohup it may
    STOP_SIGNALS += (signal.SIGHUP,)


class Stopped(BaseException):
    """A stop signal other than SIGINT came while nothing was under way that could be lost."""


@contextlib.contextmanager
def stopping_at_once(to_the_end: bool = False) -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and the other stop signals raise Stopped; main thread only.

    to_the_end: the process ends with this block, so that a signal after it finds nothing to stop and is ignored.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end else handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, stop signals wait; child processes that start here begin with all of them held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Take the stop signals that were held when this process started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
