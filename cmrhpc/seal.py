"""The seal of a report: a JSON file with what it was made from, the sha256 of its other files and of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from cmrhpc import files
from cmrhpc.shards import sha256_file, sha256_of

REPORT_FILES = ("index.html", "table.csv")  # of every report


def begin(path: Path) -> None:
    """A seal of nothing, before the first file of a report is written: one that was not finished is no damage."""
    _write(path, {"sources": {}, "files": {}})


def write(path: Path, sources: dict[str, str], names: Collection[str]) -> None:
    """Seal the named files of the folder of `path`, again while another process changes them."""
    for _ in range(10):
        _write(path, {"sources": sources, "files": _hashes(path, names)})
        if not damage(path):
            return


def _write(path: Path, told: dict[str, dict[str, str]]) -> None:
    files.atomic_write(path, json.dumps(told | {"sha256": sha256_of(told)}, indent=0))


def read(path: Path) -> dict[str, dict[str, str]] | None:
    """`sources` and `files` of the report; None where there is no seal, or a damaged one."""
    try:
        text = files.read_plain(path).decode()
        told = json.loads(text)
        parts = {"sources": dict(told["sources"]), "files": dict(told["files"])}
        right = text == json.dumps(parts | {"sha256": sha256_of(parts)}, indent=0)
        return parts if right else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def damage(path: Path) -> list[str]:
    """One line for each file of the report that is missing or not as it was written; empty where there is no report."""
    if not path.is_file():
        there = any((path.parent / name).exists() for name in REPORT_FILES)
        return [f"{path.name}: missing, so nothing vouches for the report"] if there else []
    told = read(path)
    if told is None:
        return [f"{path.name}: its checksum does not hold"]
    now = _hashes(path, told["files"])
    return [
        f"{name}: {_wrong(now.get(name, 'missing'))}"
        for name, sha256 in told["files"].items()
        if now.get(name) != sha256
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
