"""What is looked at before a shard is believed: it may be damaged, or come from somebody who means harm.

The checksum in the first 512 bytes comes first, without the HDF5 library, which a single flipped bit of metadata can
hang. Then the structure: only plain datasets of bounded size, nothing that points elsewhere, and attributes of a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrhpc import files
from cmrhpc.errors import BadInput

if TYPE_CHECKING:
    import h5py

USER_BLOCK = 512
MAGIC = b"cmrhpc shard 1\nsha256 "
MAX_DATASET_BYTES = 2**40
MAX_NAMES = 10_000
CHUNK = 8 * 2**20  # bytes hashed at a time
KINDS = {"f4", "f8", "u1", "i8"}  # of a dataset, beside fixed-length bytes


def damage_of(path: Path) -> str:
    """Empty when the file's own checksum holds, otherwise what is wrong with it, in words."""
    try:
        with files.open_plain(path) as stream:
            block = stream.read(USER_BLOCK)
            if len(block) < USER_BLOCK or not block.startswith(MAGIC):
                return "not a shard of cmrhpc, or truncated"
            told = block[len(MAGIC) : len(MAGIC) + 64]
            if block != (MAGIC + told + b"\n").ljust(USER_BLOCK, b"\0"):
                return "its first block is damaged"
            digest = hashlib.sha256()
            while data := stream.read(CHUNK):
                digest.update(data)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if digest.hexdigest().encode() == told else "its checksum does not hold"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file open for reading. Raises what the HDF5 library does."""
    import h5py

    # No lock: a shard is never changed once it has its name, and locks fail on some NFS mounts.
    with h5py.File(path, "r", locking=False) as file:
        yield file


def refused(path: Path, what: str) -> BadInput:
    """The error for a shard that is whole but is none of ours."""
    return BadInput(f"refused shard: {what}", str(path), "it was not written by cmrhpc: take it from its source again")


_TEXTS = ("schema", "settings_sha256", "content_sha256")
_OBJECTS = ("task", "settings", "inputs", "files", "data_sha256")


def _plain(value: Any) -> Any:
    """An informing attribute as text or number."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item()


def check_tree(path: Path, file: h5py.File) -> dict[str, tuple[int, ...]]:
    """Only plain datasets of bounded size at the root. Raises BadInput otherwise; nothing is followed."""
    import h5py

    shapes: dict[str, tuple[int, ...]] = {}
    size = path.stat().st_size
    if len(file) > MAX_NAMES:
        raise refused(path, "too many datasets")
    for name in file:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise refused(path, f'"{name}" is a link')
        data = file[name]
        if not isinstance(data, h5py.Dataset):
            raise refused(path, f'"{name}" is no dataset')
        kind, stored = data.dtype, data.id.get_create_plist()
        layout = stored.get_layout()
        if layout == h5py.h5d.VIRTUAL or stored.get_external_count():
            raise refused(path, f'"{name}" keeps its data elsewhere')
        if (kind.kind != "S" and kind.str[1:] not in KINDS) or kind.itemsize == 0:
            raise refused(path, f'"{name}" has the type {kind}')
        if data.shape is None:
            raise refused(path, f'"{name}" has no shape')
        if layout == h5py.h5d.CHUNKED or max((data.nbytes, *data.shape)) > min(size, MAX_DATASET_BYTES):
            raise refused(path, f'"{name}" declares {data.nbytes} bytes in a file of {size}')
        shapes[name] = data.shape
    return shapes


def read_told(path: Path, file: h5py.File, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a shard says of itself, each part of its type. Raises BadInput when one is missing. shapes: its datasets."""

    attributes = file.attrs

    def value(name: str) -> Any:
        stored = f"header_{name}"
        if stored in shapes:
            return file[stored][()]
        return attributes[name]

    try:
        told: dict[str, Any] = {"seed": int(value("seed"))}
        for name in _TEXTS:
            told[name] = value(name).decode()
        for name in _OBJECTS:
            told[name] = json.loads(value(name))
            if not isinstance(told[name], dict):
                raise ValueError(name)
        content = json.loads(value("attributes"))
        told["attributes"] = {name: json.loads(value(name)) for name in content}
        known = {"seed", "attributes", *_TEXTS, *_OBJECTS, *content}
        told["info"] = {name: _plain(value(name)) for name in attributes if name not in known}
    except (KeyError, ValueError, AttributeError, OSError, TypeError, RecursionError) as error:
        raise refused(path, f"its attributes are not those of a shard ({error})") from None
    return told
