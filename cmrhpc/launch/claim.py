"""One submission at a time per workspace, without file locks, which many cluster file systems do not keep.

Claims are numbered files in `submissions/claim/`. The highest one holds, until it is released, its process is gone from
this host, or, where that cannot be told, it was not renewed for ten minutes by the clock of the file system. A process
that takes over creates the next number, which only one can do; so none removes a claim that another has just made.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmrhpc import files
from cmrhpc.errors import BadInput, Incomplete

PATIENCE_S = 600.0
TRIES, PAUSE_S = 50, 0.1
_NAME = re.compile(r"(\d{8})\.json")


class Claim:
    """A claim that this process holds."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number

    def renew(self) -> None:
        """Say that we are still here. Raises Incomplete when another submission took over meanwhile."""
        if _numbers(self.folder)[-1:] != [self.number]:
            what = "another `cmrhpc submit` took over, because this one was not heard of for ten minutes"
            raise Incomplete(what, str(self.folder), "run the same command again")
        self._write(released=False)

    def release(self) -> None:
        self._write(released=True)

    def _write(self, released: bool) -> None:
        files.atomic_write(_path(self.folder, self.number), json.dumps(_ourselves() | {"released": released}))


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Claim]:
    """Hold the claim of a folder. Raises Incomplete when another process does."""
    claim = _take(folder)
    try:
        yield claim
    finally:
        with contextlib.suppress(BadInput):  # a full disk: that this process has ended tells the same
            claim.release()


def _take(folder: Path) -> Claim:
    for _ in range(TRIES):
        numbers = _numbers(folder)
        last = numbers[-1] if numbers else 0
        try:
            holder = _holder(_path(folder, last)) if last else ""
        except FileNotFoundError:  # somebody took over just now, and removed it
            time.sleep(PAUSE_S)
            continue
        except OSError as error:
            raise files.explain(error, folder) from error
        if holder:
            what = f"another `cmrhpc submit` is at work in this workspace: {holder}"
            raise Incomplete(what, str(_path(folder, last)), "wait for its end, then run the same command again")
        if not files.create_once(_path(folder, last + 1), json.dumps(_ourselves() | {"released": False})):
            continue
        # Who looked long ago may create a number that was used and removed meanwhile: only the highest holds.
        if _numbers(folder)[-1] == last + 1:
            for old in numbers:
                _path(folder, old).unlink(missing_ok=True)
            return Claim(folder, last + 1)
        _path(folder, last + 1).unlink(missing_ok=True)
    what = "others take over the claim of this workspace again and again"
    raise Incomplete(what, str(folder), "run the same command again")


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(found[1]) for name in os.listdir(folder) if (found := _NAME.fullmatch(name)))
    except FileNotFoundError:
        return []


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _ourselves() -> dict[str, Any]:
    return {"host": files.host_name(), "pid": os.getpid(), "start": files.process_start(), "time": time.time()}


def _holder(path: Path) -> str:
    """Who holds this claim, in words; empty when nobody does any more.

    One that cannot be read is held as long as one of another host. Raises OSError where that cannot be told, and
    FileNotFoundError when it is gone.
    """
    try:
        told = json.loads(_read(path))
        if told["released"]:
            return ""
        who = f"process {told['pid']} on {told['host']}"
        here = told["host"] == files.host_name()
        ended = files.has_ended(int(told["pid"]), told["start"]) if here else None
    except FileNotFoundError:
        if path.is_symlink():  # to nowhere, and none of ours
            return ""
        raise
    except OSError as error:
        who, ended = f"its claim cannot be read ({error.strerror})", None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    if ended is None:
        ended = files.clock(path.parent) - path.stat().st_mtime > PATIENCE_S
    return "" if ended else who


def _read(path: Path) -> bytes:
    """The bytes of a claim; on NFS one that is being replaced may fail to be read for a moment."""
    for _ in range(3):
        try:
            return files.read_plain(path)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(PAUSE_S)
    return files.read_plain(path)
