"""The only place that writes files: temporary file in the same folder, flush, fsync, rename, fsync of the folder.

A reader sees the old file, the new file or none, never half of one. A temporary file is named
`.NAME.tmp.HOST.PID.START`, is never read, and is removed by `remove_stale` only when its process is gone from
this host or when it is older than a day.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from cmrhpc.errors import BadInput

DAY = 86400.0
_counter = 0
_kept: set[Path] = set()
_TEMPORARY = re.compile(r"\..+\.tmp\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<start>\d+)-\d+", re.DOTALL)
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the number Linux gives to the one of the machine itself


def never_create(folder: Path) -> None:
    """Have a folder that should be there, and is gone, reported instead of made anew (a renamed workspace)."""
    _kept.add(folder)


def process_start(pid: int | str = "self") -> str:
    """Kernel start tick of a process, which together with its pid names it for good; "0" where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def host_name() -> str:
    """The host, and in a container with process numbers of its own that numbering too: pids mean nothing across."""
    name = socket.gethostname().replace(".", "_") or "host"
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return name
    return name if namespace == _FIRST_PID_NAMESPACE else f"{name}-{namespace.strip('pid:[]')}"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, thread or call uses."""
    global _counter
    _counter += 1
    return path.with_name(f".{path.name}.tmp.{host_name()}.{os.getpid()}.{process_start()}-{_counter}")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, without access for others; the group follows the parent folder.

    Raises BadInput when the file system refuses, or when a link on the way leads out of the workspace.
    """
    try:
        for root in _kept:
            if folder.is_relative_to(root) and not folder.resolve().is_relative_to(root.resolve()):
                raise BadInput("a link leads out of the workspace", str(folder), "remove the link: it is not followed")
        missing = []
        while not folder.exists():
            if folder in _kept:
                raise FileNotFoundError(2, "the folder is gone")
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(new, 0o770)
                parent = os.stat(new.parent)
                _follow_group(new, parent, stat.S_IMODE(parent.st_mode) & 0o2770 | 0o700)
    except OSError as error:
        raise explain(error, folder) from error


def _follow_group(path: Path, parent: os.stat_result, mode: int) -> None:
    with contextlib.suppress(PermissionError):  # a user outside the group keeps the own group
        if os.stat(path).st_gid != parent.st_gid:
            os.chown(path, -1, parent.st_gid)
    os.chmod(path, mode)


def explain(error: OSError, path: Path) -> BadInput:
    """One clear message for a file-system error while writing `path`."""
    mends = {
        28: "free space on this file system, then run the same command again",
        122: "free space in your quota, then run the same command again",
        30: "the file system is read-only: choose another workspace folder",
        13: "give yourself write access to the folder, then run the same command again",
        2: "the folder was moved or removed: put it back, then run the same command again",
        5: "the file system reports an I/O error: ask its administrator, then run the same command again",
    }
    mend = mends.get(error.errno or 0, "mend the file system, then run the same command again")
    return BadInput(f"cannot write: {error.strerror or error}", str(path), mend)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def create(path: Path) -> None:
    """A new empty file that nobody else may open, before anything is in it."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def write_all(path: Path, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)


def set_permissions(path: Path) -> None:
    """No access for others; the group's access follows the folder that holds the file."""
    parent = os.stat(path.parent)
    _follow_group(path, parent, 0o600 | (0o060 & stat.S_IMODE(parent.st_mode)))


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on leaving, make it durable under its final name.

    Raises BadInput when the file system refuses; then the final file is as it was and nothing is left over.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        try:
            create(temporary)
            yield temporary
            set_permissions(temporary)
            sync_file(temporary)
            rename(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file so that readers see the old one or the new one. Raises BadInput as `atomic_path`."""
    for attempt in (1, 2, 3):
        try:
            with atomic_path(Path(path)) as temporary:
                write_all(temporary, data.encode() if isinstance(data, str) else data)
            return
        except BadInput as error:
            # Another process may remove an empty folder (finished checkpoints) just after we looked.
            if attempt == 3 or not isinstance(error.__cause__, FileNotFoundError):
                raise


def create_once(path: Path, data: bytes | str) -> bool:
    """Write a whole file only if none of that name exists, also against other hosts; False when one did.

    `link` is atomic on NFS too, where exclusive creation followed by writing would show half a file.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        create(temporary)
        write_all(temporary, data.encode() if isinstance(data, str) else data)
        set_permissions(temporary)
        sync_file(temporary)
        os.link(temporary, path)
        sync_folder(path.parent)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def remove_stale(folder: Path) -> int:
    """Remove temporary files below `folder` whose process is gone from this host or that are older than a day."""
    removed = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if (parts := _TEMPORARY.fullmatch(name)) is None:
                continue
            path = Path(place, name)
            try:
                old = time.time() - path.stat().st_mtime > DAY
                gone = parts["host"] == host_name() and process_start(parts["pid"]) != parts["start"]
                if old or gone:
                    path.unlink()
                    removed += 1
            except OSError:
                continue  # another process was faster, or it is not ours to remove
    return removed
