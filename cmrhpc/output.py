"""Output that may be lost: a full disk costs lines of a log and no result."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Lossy(io.FileIO):
    """Drops what the file system does not take. A closed pipe is no fault of the disk, and raises BrokenPipeError."""

    def __init__(self, handle: int, lost: list[OSError]):
        super().__init__(handle, "w", closefd=False)
        self._lost = lost

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._lost.append(error)
            return len(data)


@contextlib.contextmanager
def lossy() -> Iterator[list[OSError]]:
    """Inside, stdout and stderr lose what cannot be written. Gives the errors of stdout, filled while it is in use.

    Streams that are no files of this process, as a notebook has them, stay as they are.
    """
    lost: list[OSError] = []
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _instead_of(sys.stdout, lost), _instead_of(sys.stderr, [])
    try:
        yield lost
    finally:
        ours = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = before
        for stream in filter(None, ours):
            stream.flush()


def _instead_of(stream: TextIO, lost: list[OSError]) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        stream.flush()
        raw = _Lossy(stream.fileno(), lost)
    except (OSError, ValueError):  # closed, or no file
        return stream
    buffer = raw if stream.write_through else io.BufferedWriter(raw)  # python -u: each write at once
    settings = {"encoding": stream.encoding, "errors": "backslashreplace", "line_buffering": stream.line_buffering}
    return io.TextIOWrapper(buffer, write_through=stream.write_through, **settings)  # type: ignore[arg-type]
