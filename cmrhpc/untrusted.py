"""Checks on a shard before it is trusted: it may be damaged or malicious.

The checksum in the first 512 bytes comes first, without the HDF5 library, which a single flipped bit of metadata can
hang. Then the structure: only plain datasets of bounded size, nothing that points elsewhere, and attributes of a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmrhpc import files
from cmrhpc.errors import BadInput
from cmrhpc.hashing import CHUNK

if TYPE_CHECKING:
    import h5py

USER_BLOCK = 512
MAGIC = b"cmrhpc shard 1\nsha256 "
MAX_DATASET_BYTES = 2**40
MAX_NAMES = 10_000
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


def check_tree(path: Path, file: h5py.File) -> dict[str, tuple[int, ...]]:
    """Only plain datasets of bounded size at the root. Raises BadInput otherwise; nothing is followed."""
    from h5py import h5d, h5l, h5o  # the objects above these cost several times as much, for thousands of shards

    shapes: dict[str, tuple[int, ...]] = {}
    size, root = path.stat().st_size, file.id
    if len(root) > MAX_NAMES:
        raise refused(path, "too many datasets")
    for stored_name in list(root):
        name = stored_name.decode("utf-8", "replace")
        if root.links.get_info(stored_name).type != h5l.TYPE_HARD:
            raise refused(path, f'"{name}" is a link')
        data = h5o.open(root, stored_name)
        if not isinstance(data, h5d.DatasetID):
            raise refused(path, f'"{name}" is not a dataset')
        kind, stored, shape = _dtype(data.get_type()), data.get_create_plist(), data.shape
        layout = stored.get_layout()
        if layout == h5d.VIRTUAL or stored.get_external_count():
            raise refused(path, f'"{name}" keeps its data elsewhere')
        if (kind.kind != "S" and kind.str[1:] not in KINDS) or kind.itemsize == 0:
            raise refused(path, f'"{name}" has the type {kind}')
        if shape is None:
            raise refused(path, f'"{name}" has no shape')
        declared = math.prod(shape) * kind.itemsize
        if layout == h5d.CHUNKED or max((declared, *shape)) > min(size, MAX_DATASET_BYTES):
            raise refused(path, f'"{name}" declares {declared} bytes in a file of {size}')
        shapes[name] = shape
    return shapes


def read_told(path: Path, file: h5py.File, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a shard says of itself, each part of its type. Raises BadInput when one is missing. shapes: its datasets."""
    try:
        stored = dict(_attributes(file, path.stat().st_size))
        long = [n for n, shape in shapes.items() if n.startswith("header_") and shape == ()]
        stored |= {n.removeprefix("header_"): read_whole(file, n)[()] for n in long}
        told: dict[str, Any] = {"seed": int(stored.pop("seed"))}
        for name in _TEXTS:
            told[name] = stored.pop(name).decode()
        for name in _OBJECTS:
            told[name] = json.loads(stored.pop(name))
            if not isinstance(told[name], dict):
                raise ValueError(name)
        content = json.loads(stored.pop("attributes"))
        told["attributes"] = {name: json.loads(stored.pop(name)) for name in content}
        told["info"] = {
            n: v.decode("utf-8", "replace") if isinstance(v, bytes) else v.item() for n, v in stored.items()
        }
    except (KeyError, ValueError, AttributeError, OSError, TypeError, RecursionError) as error:
        raise refused(path, f"its attributes are not those of a shard ({error})") from None
    return told


def _attributes(file: h5py.File, size: int) -> Iterator[tuple[str, Any]]:
    """Name and value of every attribute: a number, or bytes. Raises ValueError for any other."""
    from h5py import h5a

    count = h5a.get_num_attrs(file.id)
    if count > MAX_NAMES:
        raise ValueError("too many")
    for index in range(count):
        attribute = h5a.open(file.id, index=index)
        name, stored = attribute.name.decode("utf-8", "replace"), attribute.get_type()
        kind = _dtype(stored)
        if attribute.shape != () or kind.kind not in "Siuf" or not 0 < kind.itemsize <= size:
            raise ValueError(f'"{name}" is neither a number nor a text')
        value = np.empty((), kind)
        attribute.read(value, mtype=stored)
        yield name, value[()]


def _dtype(stored: Any) -> np.dtype[Any]:
    """The numpy type of an HDF5 type; h5py's own way is slow for texts."""
    from h5py import h5t

    if isinstance(stored, h5t.TypeStringID) and not stored.is_variable_str():
        return np.dtype(("S", stored.get_size()))
    return stored.dtype


def read_whole(file: h5py.File, name: str) -> np.ndarray:
    """A dataset that `check_tree` has seen."""
    from h5py import h5d, h5s

    data = h5d.open(file.id, name.encode())
    stored = data.get_type()
    values = np.empty(data.shape, _dtype(stored))
    if values.size:
        data.read(h5s.ALL, h5s.ALL, values, mtype=stored)
    return values
