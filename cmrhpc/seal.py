"""The seal of a report: JSON with what it was made from, how it ended, the sha256 of its other files and of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmrhpc import files
from cmrhpc.errors import Incomplete
from cmrhpc.hashing import sha256_file, sha256_of

REPORT_FILES = ("index.html", "table.csv")  # of every report


@dataclass(frozen=True)
class Counts:
    """What a report ended with: leaks, and of the expected predictions those that are missing."""

    leaks: int = 0
    missing: int = 0
    expected: int = 0


@dataclass(frozen=True)
class Seal:
    """sources: path -> content hash of what the report was made from, empty until it is finished.

    files: name -> sha256.
    """

    sources: dict[str, str]
    files: dict[str, str]
    counts: Counts = Counts()


def begin(path: Path) -> None:
    """A seal of nothing, before the first file of a report is written: one that was not finished is no damage."""
    _write(path, Seal({}, {}))


def write(path: Path, sources: dict[str, str], written: dict[str, str], counts: Counts) -> None:
    """Seal the files of a report: name -> sha256 of what was written; again while another process changes them.

    The sources are of these files only: where another process has replaced some, the report counts as not finished.
    Raises Incomplete when that does not end.
    """
    for _ in range(10):
        found = _hashes(path, written)
        _write(path, Seal(sources if found == written else {}, found, counts))
        if not damage(path):
            return
    raise Incomplete("another process keeps writing this report", str(path.parent), "make it again when that has ended")


def _write(path: Path, seal: Seal) -> None:
    files.atomic_write(path, _text(asdict(seal)))


def _text(told: dict[str, Any]) -> str:
    return json.dumps(told | {"sha256": sha256_of(told)}, indent=0)


def read(path: Path) -> Seal | None:
    """The seal of a report; None where there is none, or a damaged one."""
    try:
        text = files.read_plain(path).decode()
        told = json.loads(text)
        del told["sha256"]
        if text != _text(told):
            return None
        counts = told.get("counts", {})  # earlier versions have none
        numbers = {name: int(number) for name, number in counts.items()}
        return Seal(dict(told["sources"]), dict(told["files"]), Counts(**numbers))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def damage(path: Path) -> list[str]:
    """One line for each file of the report that is missing or not as it was written; empty where there is no report."""
    if not path.is_file():
        there = any((path.parent / name).exists() for name in REPORT_FILES)
        return [f"{path.name}: missing, so nothing vouches for the report"] if there else []
    told = read(path)
    if told is None:
        return [f"{path.name}: its checksum does not hold"]
    now = _hashes(path, told.files)
    return [
        f"{name}: {_wrong(now.get(name, 'missing'))}" for name, sha256 in told.files.items() if now.get(name) != sha256
    ]


def _wrong(found: str) -> str:
    """In words: what `_hashes` could not read says so itself."""
    return "its checksum does not hold" if re.fullmatch("[0-9a-f]{64}", found) else found


def _hashes(path: Path, names: Collection[str]) -> dict[str, str]:
    """sha256 of those files of the folder that are named, or why one cannot be read.

    What an editor or a file system leaves there is not ours.
    """
    found = {}
    for file in sorted(path.parent.rglob("*")):
        name = file.relative_to(path.parent).as_posix()
        if name in names and file.is_file() and not file.is_symlink():
            try:
                found[name] = sha256_file(file)
            except FileNotFoundError:
                pass  # a second process just removed it
            except OSError as error:
                found[name] = f"cannot be read: {error.strerror or error}"
    return found
