"""Training checkpoints: everything a trainer needs to go on bitwise, in files that are checked before they are parsed.

A file is the sha256 (64 hex digits and a line feed) of what follows: safetensors, whose metadata hold the
settings and the JSON state. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmrhpc.errors import BadInput, Checkpointed
from cmrhpc.files import atomic_write

SUFFIX = ".checkpoint"


@dataclass(frozen=True)
class Saved:
    """One checkpoint as it was saved; tensors on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training in one folder, the newest `keep` of them.

    settings: JSON-able; everything that decides the training. A checkpoint with other settings is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], every_seconds: float = 600.0, keep: int = 4):
        self.folder, self.every_seconds, self.keep = Path(folder), every_seconds, keep
        self.settings = json.loads(json.dumps(settings))
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last checkpoint (or since the start)."""
        return time.monotonic() - self._last >= self.every_seconds

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint durably, then remove all but the newest `keep`. Raises BadInput when the disk refuses."""
        from safetensors.torch import save

        meta = {"settings": self.settings, "state": dict(state), "step": step}
        blob = save(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            metadata={"cmrhpc": json.dumps(meta)},
        )
        digest = hashlib.sha256(blob).hexdigest().encode()
        atomic_write(self.folder / f"step{step:010d}{SUFFIX}", digest + b"\n" + blob)
        for old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)
        self._last = time.monotonic()

    def newest(self) -> Saved | None:
        """The newest good checkpoint, an older one when newer ones are damaged, None when there is none.

        Raises BadInput, listing the differences, when it was made with other settings.
        """
        for path in self._files():
            read = _read(path)
            if read is None:
                continue
            saved, settings = read
            different = differences(settings, self.settings)
            if different:
                raise BadInput(
                    "the checkpoint was made with other settings: " + "; ".join(different),
                    str(path),
                    "put the settings back, or remove this folder to start the training anew",
                )
            return saved
        return None

    def clear(self) -> None:
        """Remove all checkpoints, and the folder when nothing else is in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"step*{SUFFIX}"), reverse=True)


def _read(path: Path) -> tuple[Saved, dict[str, Any]] | None:
    """(checkpoint, its settings), or None when the file is damaged in any way."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        digest, _, blob = path.read_bytes().partition(b"\n")
        if hashlib.sha256(blob).hexdigest().encode() != digest:
            return None
        (length,) = struct.unpack_from("<Q", blob)
        meta = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["cmrhpc"])
        return Saved(int(meta["step"]), load(blob), dict(meta["state"])), meta["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error, SafetensorError):
        return None


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """'key: stored -> asked' for every leaf in which two JSON-able values differ."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in sorted({*stored, *asked}):
            lines += differences(stored.get(key), asked.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if stored == asked else [f"{path or 'settings'}: {json.dumps(stored)} -> {json.dumps(asked)}"]


def stop_here(checkpoints: Checkpoints | None, step: int, total: int) -> Checkpointed:
    """The error a trainer raises after it was asked to stop."""
    if checkpoints is None:
        return Checkpointed(f"stopped on request after step {step} of {total}, nothing kept", mend="run it again")
    return Checkpointed(
        f"stopped on request after step {step} of {total}; a checkpoint was saved",
        str(checkpoints.folder),
        "run the same task again to go on",
    )
