"""One call on thousands of items, side by side in forked processes where that is safe.

Reading a shard is mostly Python around the HDF5 library, so that threads would wait for each other. A forked process
starts at once with all that is loaded and, other than a spawned one, does not run the caller's script again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from cmrhpc.gpus import cores
from cmrhpc.signals import held

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST = 1000  # items from which processes are worth their start
MOST = 8  # processes: more would only crowd a shared file system


def in_order(call: Callable[[Item], Result], items: Sequence[Item], processes: int = 0) -> Iterator[Result]:
    """The result of every item, in the order of the items. `call` raises nothing; its results can be pickled.

    processes: by default one per usable core for many items; for few items, with other threads running, or off Linux
    (where system libraries do not survive a fork), this process alone. What a process cannot do, because it was not
    started or was killed, is done here.
    """
    count = processes or (_processes() if len(items) >= LEAST else 1)
    if count < 2:
        yield from map(call, items)
        return
    context = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    children = []
    try:
        for first in range(count):
            reader, writer = context.Pipe(duplex=False)
            child = context.Process(target=_work, args=(call, items[first::count], reader, writer), daemon=True)
            with held():
                readers.append(reader)
                with contextlib.suppress(OSError):  # no more processes for this user, or no memory
                    child.start()
                    children.append(child)
                writer.close()  # a child that ends is seen as the end of its pipe
        for number, item in enumerate(items):
            reader = readers[number % count]
            try:
                result = reader.recv()
            except (EOFError, OSError):  # ended, between two results or in the middle of one
                result = call(item)
            yield result
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.join()
        for reader in readers:
            reader.close()


def _processes() -> int:
    if sys.platform != "linux" or threading.active_count() > 1 or multiprocessing.current_process().daemon:
        return 1
    return min(MOST, cores())


def _work(call: Callable[[Any], Any], items: Sequence[Any], reader: Connection, writer: Connection) -> None:
    """Send the result of every item, until all are sent or the one who asked has ended."""
    # SIGINT may reach the whole group: the one who asked takes it, and ends this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    reader.close()
    with contextlib.suppress(Exception):  # the one who asked works on that item itself and sees it
        for item in items:
            writer.send(call(item))
