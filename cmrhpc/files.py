"""The only place that writes files: temporary file in the same folder, flush, fsync, rename, fsync of the folder.

A reader sees the old file, the new file or none, never half of one. A temporary file is named
`.NAME.tmp.HOST.PID.START`, is never read, and is removed by `remove_stale` only when its process is gone from this host
or, where that cannot be told, when it is older than a day. What lies in a workspace or came from outside is opened by
`open_plain`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from cmrhpc.errors import BadInput

DAY = 86400.0
MOST = 2**28  # bytes of a file that is read whole
PUBLIC = stat.S_ISVTX | stat.S_IWOTH  # of a folder such as /tmp
_numbers = itertools.count(1)  # of temporary files: no two threads get the same
_kept: set[Path] = set()
_TEMPORARY = re.compile(r"\..+\.tmp\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<start>\d+)-\d+", re.DOTALL)
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the number Linux gives to the one of the machine itself


def never_create(folder: Path) -> None:
    """Never recreate this folder: if it disappears (a renamed workspace), report it."""
    _kept.add(folder)


def is_linked(path: Path) -> bool:
    """Whether a link below a workspace is on the way to `path`, or `path` itself: it may be somebody else's file."""
    return any(path.is_relative_to(root) and _real(path) != _real(root) / path.relative_to(root) for root in _kept)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for links that go round in circles


def open_plain(path: str | Path, follow: bool = True) -> BinaryIO:
    """A plain file, open for reading. follow: whether it may be reached by a link that bears its name.

    Raises OSError for all else: a FIFO, which would be waited for, a device, which may never end, a folder.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from None
        raise
    _expect_plain(handle, path)
    return os.fdopen(handle, "rb")


def _expect_plain(handle: int, path: str | Path) -> None:
    """Close the handle of anything but a plain file, and raise OSError."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    os.set_blocking(handle, True)


def read_plain(path: str | Path, follow: bool = True) -> bytes:
    """The bytes of a plain file, as `open_plain`. Raises OSError for one of more than `MOST`."""
    with open_plain(path, follow) as stream:
        if os.fstat(stream.fileno()).st_size > MOST:
            raise OSError(errno.EFBIG, f"it is larger than {MOST >> 20} MiB", str(path))
        return stream.read()


def open_log(path: Path) -> int:
    """A handle that appends to a plain file, made where there is none. Raises OSError for a link and all else."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    _expect_plain(handle, path)
    return handle


def process_start(pid: int | str = "self") -> str:
    """Kernel start tick of a process, which together with its pid names it for good; "0" where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def has_ended(pid: int, start: str) -> bool | None:
    """Whether a process of this host is gone; None when the pid is in use but the system hides its owner."""
    try:
        os.kill(max(pid, 0), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's
    now = process_start(pid)
    return None if "0" in (now, start) else now != start


def host_name() -> str:
    """Host name, plus the PID namespace in a container that has its own: pids cannot be compared across namespaces."""
    name = socket.gethostname().replace(".", "_") or "host"
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return name
    return name if namespace == _FIRST_PID_NAMESPACE else f"{name}-{namespace.strip('pid:[]')}"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, thread or call uses."""
    number = next(_numbers)
    return path.with_name(f".{path.name}.tmp.{host_name()}.{os.getpid()}.{process_start()}-{number}")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, without access for others; the group follows the parent folder.

    Raises BadInput when the file system refuses, or when a link on the way leads out of the workspace.
    """
    try:
        for root in _kept:
            if folder.is_relative_to(root) and not _real(folder).is_relative_to(_real(root)):
                raise BadInput("a link leads out of the workspace", str(folder), "remove the link: it is not followed")
        missing = []
        while not folder.exists():
            if folder in _kept:
                raise FileNotFoundError(2, "the folder is gone")
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(new, 0o700)
                parent = os.stat(new.parent)
                _follow_group(new, parent, stat.S_IMODE(parent.st_mode) & 0o2770 | 0o700)
    except OSError as error:
        raise explain(error, folder) from error


def _follow_group(path: Path, parent: os.stat_result, mode: int) -> None:
    """Give `path` the group of its folder, and `mode`; without the group's part of it where that is another group.

    A new folder whose group differs from its creator's gets the setgid bit, so that files inherit the group even where
    the process cannot chown (a container without supplementary groups).
    """
    with contextlib.suppress(OSError):  # a user outside the group, and in such a container, keeps the own group
        if os.stat(path).st_gid != parent.st_gid:
            os.chown(path, -1, parent.st_gid)
            mode |= stat.S_ISGID if path.is_dir() else 0
    shared = os.stat(path).st_gid == parent.st_gid and parent.st_mode & PUBLIC != PUBLIC
    mode = mode if shared else mode & 0o700
    try:
        os.chmod(path, mode)
    except OSError as error:  # file systems that have no modes of their own
        present = stat.S_IMODE(os.stat(path).st_mode) & 0o777
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or present & ~mode:
            raise


def explain(error: OSError, path: Path) -> BadInput:
    """One clear message for a file-system error while writing `path`."""
    mends = {
        28: "free space on this file system, then run the same command again",
        122: "free space in your quota, then run the same command again",
        30: "the file system is read-only: choose another workspace folder",
        13: "give yourself write access to the folder, then run the same command again",
        21: "a folder has the name of the file: remove it, then run the same command again",
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
                write_all(temporary, _encoded(data, path))
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
        write_all(temporary, _encoded(data, path))
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


def _encoded(data: bytes | str, path: Path) -> bytes:
    try:
        return data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError:  # the name of a folder is any bytes
        mend = "rename the folder that is named there"
        raise BadInput("cannot write: a path in it is not UTF-8 text", str(path), mend) from None


@contextlib.contextmanager
def second_name(temporary: Path, path: Path) -> Iterator[Path]:
    """A hard link to a temporary file, beside `path`: what was written stays at hand when `path` is replaced."""
    kept = temporary_name(path)
    os.link(temporary, kept)
    try:
        yield kept
    finally:
        with contextlib.suppress(OSError):
            kept.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def clock(folder: Path) -> float:
    """The time of the file system that holds `folder`, which dates the files of all hosts; ours may be a day off."""
    probe = temporary_name(folder / "clock")
    try:
        create(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def remove_stale(folder: Path, leave: Collection[Path] = ()) -> int:
    """Remove temporary files below `folder` whose process is gone, or cannot be seen and they are older than a day.

    leave: real paths of folders that are not entered. Nor is `folder` where a link of the workspace leads to it.
    """
    removed = 0
    if is_linked(folder) or (folder := _real(folder)) in leave:
        return 0
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if Path(place, name) not in leave]
        for name in names:
            if (parts := _TEMPORARY.fullmatch(name)) is None:
                continue
            path = Path(place, name)
            try:
                ended = has_ended(int(parts["pid"]), parts["start"]) if parts["host"] == host_name() else None
                if ended or (ended is None and clock(Path(place)) - path.stat().st_mtime > DAY):
                    path.unlink()
                    removed += 1
            except (OSError, ValueError):
                continue  # another process was faster, or it is not ours to remove
    return removed
