"""The log of each task, `logs/STAGE_INDEX.log`: lines are added, try after try."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from cmrhpc import files
from cmrhpc.errors import CmrhpcError, explained
from cmrhpc.output import lossy
from cmrhpc.workspace import Workspace


@contextlib.contextmanager
def all_to_log(workspace: Workspace, stage: str, index: int) -> Iterator[None]:
    """Send stdout and stderr of this process, C libraries included, to the task's log."""
    handle = _open(workspace, stage, index)
    _flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        with lossy():
            print(_heading(stage, index), flush=True)
            yield
    finally:
        _flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for number in (*saved, handle):
            os.close(number)


@contextlib.contextmanager
def to_log_too(workspace: Workspace, stage: str, index: int) -> Iterator[Callable[[str], None]]:
    """What Python prints goes to the task's log as well, and an error; not where all output goes there already.

    Yields a function that writes to the log alone. Unexpected errors are logged with their traceback.
    """
    if _is_output(workspace.log_path(stage, index)):  # task.sh sees to it
        with contextlib.suppress(OSError):
            files.set_permissions(workspace.log_path(stage, index))
        try:
            yield lambda text: None
        except Exception as error:
            sys.stdout.write(_traceback(error))
            raise
        return
    handle, closed = _open(workspace, stage, index), False

    def note(text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk loses lines of a log and no result
            if not closed:
                os.write(handle, text.encode("utf-8", "backslashreplace"))

    try:
        note(f"{_heading(stage, index)}\n")
        out, errors = _Both(sys.stdout, note), _Both(sys.stderr, note)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            yield note
    except Exception as error:
        note(f"{_traceback(error)}{explained(error)}\n")
        raise
    finally:
        closed = True  # who keeps the stream, as a logging handler does, writes to it only
        os.close(handle)


def _traceback(error: Exception) -> str:
    """Of a fault of the program; an OSError may name a file, and so a patient."""
    if isinstance(error, CmrhpcError | MemoryError | OSError):
        return ""
    return "".join(traceback.format_exception(error))


class _Both(io.TextIOBase):
    """A stream that notes what is written to it. There is no stream where it was closed."""

    def __init__(self, stream: TextIO | None, note: Callable[[str], None]):
        self._stream, self._note = stream or io.StringIO(), note

    def write(self, text: str) -> int:
        self._note(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _open(workspace: Workspace, stage: str, index: int) -> int:
    """Raises BadInput for a link in the place of the log, and where the file system refuses."""
    path = workspace.log_path(stage, index)
    files.make_folder(path.parent)
    try:
        handle = files.open_log(path)
    except OSError as error:
        raise files.explain(error, path) from error
    with contextlib.suppress(OSError):
        files.set_permissions(path)
    return handle


def _is_output(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(1), os.stat(path))
    except OSError:
        return False


def _heading(stage: str, index: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {stage} {index}"


def _flush() -> None:
    """What is printed goes out; a full disk loses lines of a log and no result."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
