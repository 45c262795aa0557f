"""The seal of a report: a JSON file with what it was made from, the sha256 of its other files and of itself."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from cmrhpc import files
from cmrhpc.shards import sha256_file, sha256_of


def write(path: Path, sources: dict[str, str]) -> None:
    """Seal every file of the folder of `path`, again while another process changes them."""
    for _ in range(10):
        told = {"sources": sources, "files": _hashes(path)}
        files.atomic_write(path, json.dumps(told | {"sha256": sha256_of(told)}, indent=0))
        if not damage(path):
            return


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
        return []
    told = read(path)
    if told is None:
        return [f"{path.name}: its checksum does not hold"]
    now = _hashes(path)
    return [
        f"{name}: {'its checksum does not hold' if name in now else 'missing'}"
        for name, sha256 in told["files"].items()
        if now.get(name) != sha256
    ]


def _hashes(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.parent.rglob("*")):
        if file.is_file() and not file.is_symlink() and not files.is_temporary(file.name) and file != path:
            with contextlib.suppress(FileNotFoundError):  # a second process just removed it
                found[file.relative_to(path.parent).as_posix()] = sha256_file(file)
    return found
