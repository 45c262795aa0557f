"""JSON values and files: one text for equal values, sha256, and what differs. Standard library only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cmrhpc.files import open_plain

CHUNK = 8 * 2**20  # bytes hashed at a time


def canonical(value: Any) -> str:
    """JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_of(value: Any) -> str:
    """sha256 of a JSON-able value, or of bytes."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value).encode()).hexdigest()


def sha256_file(path: Path, start: int = 0) -> str:
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        stream.seek(start)
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """'key: stored -> asked' for every leaf in which two JSON-able values differ."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in sorted({*stored, *asked}):
            lines += differences(stored.get(key), asked.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if stored == asked else [f"{path or 'settings'}: {json.dumps(stored)} -> {json.dumps(asked)}"]
