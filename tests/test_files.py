"""Writing: whole files or none, no access for others, stale temporary files removed and living ones kept."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cmrhpc import files
from cmrhpc.errors import BadInput


def test_others_get_no_access_and_the_group_follows_the_folder(tmp_path: Path) -> None:
    for mode, expected in ((0o700, 0o600), (0o770, 0o660), (0o777, 0o660)):
        folder = tmp_path / f"m{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        files.atomic_write(folder / "new" / "a", "text")
        assert stat.S_IMODE((folder / "new" / "a").stat().st_mode) == expected
        assert stat.S_IMODE((folder / "new").stat().st_mode) & 0o007 == 0


@pytest.mark.usefixtures("can_chown")
def test_a_container_that_cannot_give_a_group_keeps_its_own_and_folders_hand_theirs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(tmp_path, -1, 100)
    tmp_path.chmod(0o770)
    files.make_folder(tmp_path / "made")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o2770

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "chown", refuse)
    for path, group, mode in (("a", os.getegid(), 0o600), ("made/a", 100, 0o660)):
        files.atomic_write(tmp_path / path, "text")
        found = (tmp_path / path).stat()
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (group, mode)


def test_a_file_system_without_modes_is_taken_unless_it_grants_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o770)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "chmod", refuse)
    files.atomic_write(tmp_path / "new" / "a", "text")
    assert stat.S_IMODE((tmp_path / "new" / "a").stat().st_mode) == 0o600
    monkeypatch.setattr(files, "create", lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)))
    with pytest.raises(BadInput, match="Operation not permitted"):
        files.atomic_write(tmp_path / "b", "text")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["write_all", "set_permissions", "sync_file", "rename", "sync_folder"])
def test_a_refusing_file_system_leaves_the_old_file_and_no_rest(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    files.atomic_write(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, name, refuse)
        with pytest.raises(BadInput, match="No space left") as raised:
            files.atomic_write(path, "new")
    assert raised.value.exit_code == 3
    assert path.read_text() in ({"old"} if name != "sync_folder" else {"old", "new"})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["write_all", "set_permissions", "sync_file"])
def test_what_is_created_once_is_whole_on_disk_or_not_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, name, refuse)
    with pytest.raises((BadInput, OSError), match="No space left"):
        files.create_once(tmp_path / "a", "first")
    assert os.listdir(tmp_path) == []


def test_a_process_whose_start_the_system_hides_may_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "process_start", lambda pid="self": "0")
    assert files.has_ended(os.getpid(), "12345") is None
    hidden = tmp_path / f".x.tmp.{files.host_name()}.{os.getpid()}.0-1"
    hidden.write_text("half")
    assert files.remove_stale(tmp_path) == 0
    os.utime(hidden, (time.time() - 90_000,) * 2)
    assert files.remove_stale(tmp_path) == 1


def test_create_once_has_one_winner(tmp_path: Path) -> None:
    assert files.create_once(tmp_path / "a", "first")
    assert not files.create_once(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_two_threads_at_once_get_two_temporary_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, host_name = threading.Barrier(2), files.host_name

    def waits() -> str:
        both.wait(30)
        return host_name()

    monkeypatch.setattr(files, "host_name", waits)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(files.temporary_name, [tmp_path / "x"] * 2)
    assert first != second


def test_only_temporary_files_of_dead_processes_or_of_yesterday_are_removed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cmrhpc import files;"
        "p = files.temporary_name(Path(sys.argv[1]) / 'x'); p.write_text('half'); print(p.name)"
    )
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    mine = files.temporary_name(tmp_path / "x")
    mine.write_text("half")
    other_host = tmp_path / ".x.tmp.otherhost.1.1-1"
    other_host.write_text("half")
    old = tmp_path / ".y.tmp.otherhost.1.1-1"
    old.write_text("half")
    os.utime(old, (time.time() - 90_000,) * 2)
    (tmp_path / "kept.txt").write_text("whole")
    assert files.remove_stale(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([mine.name, other_host.name, "kept.txt"])
    assert dead.stdout.strip() not in os.listdir(tmp_path)


def test_the_clock_of_the_file_system_says_how_old_a_temporary_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose clock is days ahead removes nothing of another one that is at work."""
    (tmp_path / ".x.tmp.otherhost.1.1-1").write_text("half")
    ahead = time.time() + 3 * files.DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert files.remove_stale(tmp_path) == 0
    assert os.listdir(tmp_path) == [".x.tmp.otherhost.1.1-1"]
