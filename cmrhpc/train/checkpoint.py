"""Training checkpoints: everything a trainer needs to go on bitwise, in files that are checked before they are parsed.

A file is the sha256 (64 hex digits and a line feed) of what follows: safetensors, whose metadata hold the
settings and the JSON state. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from cmrhpc import __version__
from cmrhpc.errors import BadInput, Checkpointed
from cmrhpc.files import atomic_write, is_linked, open_plain
from cmrhpc.hashing import differences

SUFFIX = ".checkpoint"
FORMAT = 5  # raised whenever a trainer goes on in another way from the same tensors

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Saved:
    """One checkpoint as it was saved; tensors on the CPU."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class OtherVersion(BadInput):
    """A sound checkpoint that this version of the package cannot go on from."""

    def __init__(self, checkpoints: Checkpoints, version: str, why: str):
        self.checkpoints = checkpoints
        what = f"the checkpoint was written by another version of cmrhpc ({version}): {why}"
        super().__init__(what, str(checkpoints.folder), "remove this folder to start the training anew")


def or_anew(train: Callable[P, R]) -> Callable[P, R]:
    """A trainer that starts anew, with a note, where the checkpoints are those of another version of the package.

    Going on from them would give the result of neither version.
    """

    @functools.wraps(train)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return train(*args, **kwargs)
        except OtherVersion as error:
            print(f"note: {error.what}; the training starts anew", flush=True)
            error.checkpoints.clear()
            return train(*args, **kwargs)

    return call


class Checkpoints:
    """The checkpoints of one training in one folder, the newest `keep` of them.

    settings: JSON-able; everything that decides the training. A checkpoint with other settings is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], every_seconds: float = 600.0, keep: int = 4):
        self.folder, self.every_seconds, self.keep = Path(folder), every_seconds, keep
        self.settings = json.loads(json.dumps(settings))
        self._last, self._made_by = time.monotonic(), "unknown"
        self._damaged: set[Path] = set()

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last checkpoint (or since the start)."""
        return time.monotonic() - self._last >= self.every_seconds

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint durably, then remove all but the newest `keep`. Raises BadInput when the disk refuses."""
        from safetensors.torch import save

        meta = {"settings": self.settings, "state": dict(state), "step": step}
        meta |= {"format": FORMAT, "version": __version__}
        blob = save(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
            metadata={"cmrhpc": json.dumps(meta)},
        )
        digest = hashlib.sha256(blob).hexdigest().encode()
        path = self.folder / f"step{step:010d}{SUFFIX}"
        atomic_write(path, digest + b"\n" + blob)
        # Damaged ones would count among the newest for ever. One of this step has just become a good one.
        damaged, self._damaged = self._damaged - {path}, set()
        for old in [*damaged, *[one for one in self._files() if one not in damaged][self.keep :]]:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                old.unlink()
        self._last = time.monotonic()

    def newest(self) -> Saved | None:
        """The newest good checkpoint, an older one when newer ones are damaged, None when there is none.

        Raises BadInput, listing the differences, when it was made with other settings, and OtherVersion.
        """
        for path in self._files():
            read = _read(path)
            if read is None:
                self._damaged.add(path)
                continue
            saved, settings, made_by, written_as = read
            different = differences(settings, self.settings)
            if different:
                raise BadInput(
                    "the checkpoint was made with other settings: " + "; ".join(different),
                    str(path),
                    "put the settings back, or remove this folder to start the training anew",
                )
            if written_as != FORMAT:
                raise OtherVersion(self, made_by, f"format {written_as}, now {FORMAT}")
            self._made_by = made_by
            return saved
        return None

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around what takes up a checkpoint. Raises OtherVersion when it does not fit this trainer."""
        try:
            yield
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            told = str(error).splitlines() or [type(error).__name__]
            if "CUDA" in told[0] or "memory" in told[0]:  # the device's fault
                raise
            why = f"no {told[0]} in it" if isinstance(error, KeyError) else told[0]
            raise OtherVersion(self, self._made_by, why) from None

    def clear(self) -> None:
        """Remove all checkpoints, and the folder when nothing else is in it."""
        for path in self._files():
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return [] if is_linked(self.folder) else sorted(self.folder.glob(f"step*{SUFFIX}"), reverse=True)


def _read(path: Path) -> tuple[Saved, dict[str, Any], str, Any] | None:
    """(checkpoint, its settings, version of the package, format), or None when the file is damaged in any way."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with open_plain(path, follow=False) as stream:
            digest, _, blob = stream.read().partition(b"\n")
        if hashlib.sha256(blob).hexdigest().encode() != digest:
            return None
        (length,) = struct.unpack_from("<Q", blob)
        meta = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["cmrhpc"])
        saved = Saved(int(meta["step"]), load(blob), dict(meta["state"]))
        return saved, meta["settings"], str(meta.get("version", "unknown"))[:40], meta.get("format", 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error, SafetensorError):
        return None


def stop_here(checkpoints: Checkpoints | None, step: int, total: int) -> Checkpointed:
    """The error a trainer raises after it was asked to stop."""
    if checkpoints is None:
        return Checkpointed(f"stopped on request after step {step} of {total}, nothing kept", mend="run it again")
    return Checkpointed(
        f"stopped on request after step {step} of {total}; a checkpoint was saved",
        str(checkpoints.folder),
        "run the same task again to go on",
    )
