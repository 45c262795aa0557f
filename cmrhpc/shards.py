"""Shards: HDF5 files written once by one task, with a checksum in front, provenance inside and nothing hidden.

A shard starts with an HDF5 user block of 512 bytes that holds the sha256 of everything after it. A reader checks it
before the HDF5 library opens the file, because one flipped bit of metadata can hang that library. `content_sha256`
covers datasets, schema, task, settings, seed and inputs and nothing else, so that two runs can be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmrhpc import files
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.hashing import CHUNK, canonical, sha256_file, sha256_of
from cmrhpc.provenance import provenance
from cmrhpc.untrusted import (
    KINDS,
    MAGIC,
    USER_BLOCK,
    check_tree,
    damage_of,
    opened,
    read_told,
    read_whole,
    refused,
)

if TYPE_CHECKING:
    import h5py

MAX_ATTRIBUTE_BYTES = 64 * 1024  # of an HDF5 attribute; longer values are stored as byte datasets
_DATA_NAME = re.compile(r"[a-z0-9_]{1,64}")


@dataclass(frozen=True)
class Blocks:
    """A dataset that is written block by block along its first axis, in bounded memory."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Iterable[np.ndarray]


@dataclass(frozen=True)
class Header:
    """What a shard says of itself, without its datasets."""

    schema: str
    task: dict[str, Any]
    settings: dict[str, Any]
    settings_sha256: str
    inputs: dict[str, str]
    content_sha256: str
    seed: int
    attributes: dict[str, Any]
    files: dict[str, str]
    info: dict[str, Any]
    data_sha256: dict[str, str]
    identity: tuple[int, ...]  # of the file that was read, its inode number first


@dataclass(frozen=True)
class Shard(Header):
    """A shard whose checksum held when it was read. `shard["image"]` reads one dataset.

    If the file was replaced or modified since, it is checked again and must have the same content.
    """

    path: Path = field(default=Path())
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def read(self, name: str, rows: Any = slice(None)) -> np.ndarray:
        """One dataset, or its `rows` along the first axis. Raises BadInput when the shard has none of that name."""
        return self.read_many([name], rows)[name]

    def read_many(self, names: Iterable[str], rows: Any = slice(None)) -> dict[str, np.ndarray]:
        """As `read`, several datasets from one opening of the file."""
        names, found, name = list(names), {}, ""
        whole = isinstance(rows, slice) and rows == slice(None)
        try:
            if _identity(self.path) != self.identity:
                return self._again().read_many(names, rows)
            with opened(self.path) as file:
                if _identity(file.id.get_vfd_handle()) != self.identity:
                    return self._again().read_many(names, rows)
                for name in names:
                    if name not in self.shapes:
                        mend = f"it holds {', '.join(self.names)}"
                        raise BadInput(f'no dataset "{name}"', str(self.path), mend)
                    found[name] = read_whole(file, name) if whole else np.asarray(file[name][rows])
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:  # the kinds that h5py raises
            raise refused(self.path, f'"{name}" cannot be read: {error}'[:200]) from None
        return found

    def _again(self) -> Shard:
        """What lies there now, checked. Raises BadInput when it is not the same content."""
        found = read_shard(self.path)
        if found.content_sha256 != self.content_sha256:
            raise BadInput("shard replaced by another while it was read", str(self.path), "run the same command again")
        return found

    def strings(self, name: str) -> list[str]:
        """A dataset of fixed-length bytes as text."""
        return [value.decode("utf-8", "replace") for value in self.read(name).tolist()]


def text_array(values: Iterable[str], length: int = 32) -> np.ndarray:
    """Texts as fixed-length bytes. Raises BadInput for one that does not fit."""
    encoded = [value.encode() for value in values]
    for value in encoded:
        if len(value) > length:
            raise BadInput(f"an id of {len(value)} bytes", value[:40].decode("utf-8", "replace"), f"at most {length}")
    return np.array(encoded, dtype=f"S{length}")


def content_hash(header: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """`header`: schema, task, settings_sha256, seed, inputs, attributes; `data`: sha256 per dataset."""
    return sha256_of({"header": dict(header), "data": dict(data)})


# ------------------------------------------------------------------------------------------------ writing


def write_shard(
    path: Path,
    datasets: Mapping[str, np.ndarray | Blocks],
    *,
    schema: str,
    task: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    attributes: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] | None = None,
    info: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> str:
    """Write a shard and its companions; companions are renamed first, the shard last. Returns the content hash.

    attributes: JSON-able values that are content (classes, best step).
    info: texts and numbers that are not (seconds, device).
    companions: file ending -> bytes, written beside the shard (weights, log, picture).
    Where a whole shard of the same content lies already, with its companions, it stays, unless `replace`.
    Raises BadInput when the file system refuses; an older shard of that name then stays as it was. Raises Incomplete
    when another process goes on writing the same shard.
    """
    path = Path(path)
    companions = companions or {}
    names = {ending: path.with_suffix(ending).name for ending in companions}
    content_attributes = dict(attributes or {})
    header: dict[str, Any] = {
        "schema": schema,
        "task": dict(task),
        "settings_sha256": sha256_of(dict(settings)),
        "seed": seed,
        "inputs": dict(inputs),
        "attributes": content_attributes,
    }
    try:
        with contextlib.ExitStack() as stack:
            with files.atomic_path(path) as temporary:
                hashes = _write_datasets(temporary, datasets)
                content = content_hash(header, hashes)
                if not replace and _is_there(path, content):
                    raise _Finished
                told: dict[str, Any] = header | {
                    "settings": dict(settings),
                    "content_sha256": content,
                    "data_sha256": hashes,
                    "files": {names[ending]: sha256_of(data) for ending, data in companions.items()},
                    "attributes": sorted(content_attributes),
                }
                told |= {name: canonical(value) for name, value in content_attributes.items()}
                told |= provenance() | dict(info or {})
                _write_header(temporary, told)
                _stamp(temporary)
                written = stack.enter_context(files.second_name(temporary, path))
                for ending, data in companions.items():
                    files.atomic_write(path.with_suffix(ending), data)
            _settle(path, written, companions)
    except _Finished:
        pass
    return content


class _Finished(Exception):
    """Another process has written this shard meanwhile; overwriting part of it would damage it."""


def _is_there(path: Path, content: str) -> bool:
    """Whether a whole shard of this content lies there, with its companions."""
    if path.is_symlink() or not path.is_file() or damage_of(path):
        return False
    with contextlib.suppress(BadInput, OSError):
        header = read_header(path)
        return header.content_sha256 == content and not check_companions(header, path.parent)
    return False


def _settle(path: Path, written: Path, companions: Mapping[str, bytes]) -> None:
    """Two processes may write the same shard at once, and their logs differ: leave a shard with its own companions.

    A writer leaves only after it has seen, after its last write, that shard and companions agree. One that sees a
    mismatch rewrites all of its own. `written` is a name that our shard has beside `path`: an open handle would not do,
    NFS forgets a file that another host replaced. Raises Incomplete when that does not end.
    """
    for attempt in range(20):
        if _agree(path):
            return
        time.sleep(random.uniform(0, 0.1 * (attempt + 1)))  # the other process may be about to mend it
        if not _agree(path):
            for ending, data in companions.items():
                files.atomic_write(path.with_suffix(ending), data)
            with files.atomic_path(path) as temporary:
                shutil.copyfile(written, temporary)
    if not _agree(path):
        mend = "when the other process has ended, run the same command again"
        raise Incomplete("another process keeps writing this shard or its companions", str(path), mend)


def _agree(path: Path) -> bool:
    with contextlib.suppress(BadInput, OSError):
        return not check_companions(read_header(path), path.parent)
    return False


def _write_datasets(path: Path, datasets: Mapping[str, np.ndarray | Blocks]) -> dict[str, str]:
    import h5py

    hashes = {}
    # No lock, as for readers: nobody else knows the temporary name, and some file systems have none (errno 37, 95).
    with h5py.File(path, "w", userblock_size=USER_BLOCK, libver=("earliest", "v110"), locking=False) as file:
        for name in sorted(datasets):
            data = datasets[name]
            blocks = data if isinstance(data, Blocks) else Blocks(data.shape, data.dtype.str, [np.asarray(data)])
            kind = np.dtype(blocks.dtype)
            if not _DATA_NAME.fullmatch(name) or not (kind.kind == "S" or kind.str[1:] in KINDS):
                raise ValueError(f"dataset {name} of type {kind} has no place in a shard")
            stored = file.create_dataset(name, blocks.shape, kind, track_times=False)
            digest, row = hashlib.sha256(f"{kind.str}{tuple(blocks.shape)}".encode()), 0
            for block in blocks.blocks:
                block = np.ascontiguousarray(block, kind)
                if block.size:
                    stored[row : row + len(block)] = block
                digest.update(block.data)
                row += len(block)
            if row != blocks.shape[0]:
                raise ValueError(f"dataset {name} has {row} rows, {blocks.shape[0]} were announced")
            hashes[name] = digest.hexdigest()
    return hashes


def _write_header(path: Path, told: Mapping[str, Any]) -> None:
    import h5py

    with h5py.File(path, "r+", libver=("earliest", "v110"), locking=False) as file:
        for name, value in told.items():
            text = value if isinstance(value, str) else canonical(value)
            if isinstance(value, int | float):
                file.attrs[name] = value
            elif len(text.encode()) < MAX_ATTRIBUTE_BYTES - 1024:
                file.attrs[name] = np.bytes_(text.encode())
            else:  # an HDF5 attribute holds 64 KiB at most
                file.create_dataset(f"header_{name}", data=np.bytes_(text.encode()), track_times=False)


def _stamp(path: Path) -> None:
    """Write the user block: the sha256 of all that follows it."""
    digest = sha256_file(path, USER_BLOCK)
    with open(path, "r+b") as stream:
        stream.write((MAGIC + digest.encode() + b"\n").ljust(USER_BLOCK, b"\0"))


# ------------------------------------------------------------------------------------------------ reading


_Read = tuple[Shard, dict[str, np.ndarray]]


def read_shard(path: Path, schema: str = "") -> Shard:
    """Open a shard: its checksum first, then its structure. Raises BadInput for a damaged, foreign or hostile file.

    A network file system may miss a fresh rename for a moment, so a missing file is looked for three times.
    """
    return read_shard_with(path, (), schema)[0]


def read_shard_with(path: Path, names: Iterable[str], schema: str = "") -> tuple[Shard, dict[str, np.ndarray]]:
    """As `read_shard`, and those of the datasets `names` that it has, from one opening: for thousands of shards."""
    path, names = Path(path), list(names)
    for pause in (0.05, 0.2, 0):
        found, wrong = _checked(path, names)
        if wrong not in ("missing", _REPLACED) or not pause:
            break
        time.sleep(pause)
    if wrong or found is None:
        mend = "`cmrhpc run` computes it" if wrong == "missing" else "`cmrhpc run` computes it again"
        raise BadInput(f"shard {wrong}", str(path), mend)
    if schema and found[0].schema != schema:
        raise BadInput(f'a shard of schema "{found[0].schema}", not "{schema}"', str(path), "is it the right file?")
    return found


_REPLACED = "replaced while it was read"


def _checked(path: Path, names: list[str]) -> tuple[_Read | None, str]:
    """The shard whose checksum held, or why there is none: between hashing and opening another may take its name."""
    hashed = _identity(path)
    if wrong := damage_of(path):
        return None, wrong
    found = _open_checked(path, names)
    return found, "" if found[0].identity == hashed else _REPLACED


def _identity(file: Path | int) -> tuple[int, ...]:
    """Which file it is and when it was last changed: other numbers, perhaps another content. Empty where it is gone."""
    try:
        told = os.stat(file)
    except OSError:
        return ()
    return told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns


def _open_checked(path: Path, names: Iterable[str] = ()) -> _Read:
    try:
        with opened(path) as file:
            if not (identity := _identity(file.id.get_vfd_handle())):
                raise refused(path, "it went away while it was read")
            shapes = check_tree(path, file)
            told = read_told(path, file, shapes)
            data = {name: read_whole(file, name) for name in names if name in shapes}
    except (BadInput, MemoryError):  # a lack of memory is no fault of the file
        raise
    except Exception as error:  # the HDF5 library raises many kinds for a malformed file
        raise refused(path, f"{type(error).__name__}: {error}"[:200]) from None
    told_data = {name for name in shapes if not name.startswith("header_")}
    if told_data != set(told["data_sha256"]):
        raise refused(path, "its datasets are not those it lists")
    header = {k: told[k] for k in ("schema", "task", "settings_sha256", "seed", "inputs", "attributes")}
    try:
        agrees = content_hash(header, told["data_sha256"]) == told["content_sha256"]
    except (ValueError, TypeError, RecursionError):  # numbers that are none, nesting without end
        agrees = False
    if not agrees:
        raise refused(path, "its content hash does not agree with its attributes")
    return Shard(path=path, shapes={n: shapes[n] for n in sorted(told_data)}, identity=identity, **told), data


def read_header(path: Path) -> Header:
    """The header alone, without hashing the file: for lists, never for results. Raises BadInput as `read_shard`."""
    with files.open_plain(path) as stream:
        if not stream.read(USER_BLOCK).startswith(MAGIC):
            raise refused(path, "not a shard of cmrhpc")
    return _open_checked(path)[0]


def check_content(shard: Shard) -> str:
    """Hash every dataset again; empty when all agree, otherwise what does not. For `verify`."""
    name = ""
    try:
        with opened(shard.path) as file:
            for name, told in shard.data_sha256.items():
                if _dataset_digest(file[name]) != told:
                    return f'dataset "{name}" does not agree with its hash'
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        return f'dataset "{name}" cannot be read: {error}'[:200]
    return ""


def _dataset_digest(data: h5py.Dataset) -> str:
    digest = hashlib.sha256(f"{data.dtype.str}{tuple(data.shape)}".encode())
    step = max(1, CHUNK // max(1, data.nbytes // max(1, len(data))))
    for row in range(0, len(data), step):
        digest.update(np.ascontiguousarray(data[row : row + step]).data)
    return digest.hexdigest()


def check_companions(shard: Header, folder: Path) -> list[tuple[str, str]]:
    """(name, what is wrong) for each companion file that is missing or changed."""
    wrong = []
    for name, told in shard.files.items():
        path = folder / name
        try:
            if Path(name).name != name or not path.is_file() or path.is_symlink():
                wrong.append((name, "missing"))
            elif sha256_file(path) != told:
                wrong.append((name, "its checksum does not hold"))
        except OSError as error:
            wrong.append((name, f"cannot be read: {error.strerror or error}"))
    return wrong
