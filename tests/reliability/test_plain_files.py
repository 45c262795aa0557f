"""What stands where a file should be, a FIFO, a device or a link, holds nobody up; what is others' is left to them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cmrhpc import files
from cmrhpc.cli import main
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace
from tests.reliability.conftest import copy_of, needs_root

PATIENCE_S = 120  # of a verb that waits for ever, on however busy a machine


def said_by(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and words of one verb in a process of its own, which must end."""
    with tempfile.TemporaryFile("w+") as out:

        def verb() -> None:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = main([str(argument) for argument in arguments])
                out.flush()
            os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=verb)
        process.start()
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{arguments} waits for ever")
        out.seek(0)
        text = out.read()
    assert process.exitcode is not None
    assert "Traceback" not in text
    return process.exitcode, text


SHARD = "synthetic/dae-gan/fold0_repeat0_class0.h5"


@pytest.mark.parametrize(
    ("place", "verb", "expected"),
    [
        ("study.toml", "status", 3),
        ("index.json", "status", 0),
        ("folds.h5", "status", 0),
        ("folds.h5", "verify", 5),
        ("folds.h5", "ingest", 0),  # makes it anew
        (SHARD, "status", 0),
        (SHARD, "verify", 5),
        ("tasks/classify/0001.json", "status", 3),
        ("tasks/classify/0001.json", "verify", 5),
        ("logs/classify_0.json", "status", 0),
        ("submissions/12.json", "status", 0),
        ("report/sources.json", "status", 0),
        ("raw/cohort.csv", "ingest", 3),
    ],
)
def test_no_verb_waits_for_a_fifo(fresh: Path, tmp_path: Path, place: str, verb: str, expected: int) -> None:
    root = copy_of(fresh, tmp_path / "w")
    (root / place).unlink(missing_ok=True)
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(root / place)
    code, text = said_by(verb, root)
    assert code == expected, text
    if place.endswith(".h5") and verb == "verify":
        assert f"{place}: cannot be read: it is not a plain file" in text.replace("shard ", "")


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("here")
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    assert files.read_plain(tmp_path / "plain", follow=False) == b"here"
    assert files.read_plain(tmp_path / "link") == b"here"
    with pytest.raises(OSError, match="a link, which is not followed"):
        files.open_plain(tmp_path / "link", follow=False)
    open_before = len(os.listdir("/proc/self/fd"))
    for name in ("zero", "fifo", "."):
        with pytest.raises(OSError, match="not a plain file"):
            files.open_plain(tmp_path / name)
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a plain file"):  # somebody listens at its other end
        files.open_log(tmp_path / "fifo")
    os.close(reader)
    with pytest.raises(OSError, match="No such device"):
        files.open_log(tmp_path / "fifo")
    assert len(os.listdir("/proc/self/fd")) == open_before


# ------------------------------------------------------------------------------------------------ links


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_removed_behind_a_link_or_from_raw_folders(fresh: Path, tmp_path: Path) -> None:
    root = copy_of(fresh, tmp_path / "w")
    left_over = f".thesis.tmp.{files.host_name()}.999999.1-1"
    scratch = tmp_path / "scratch" / "dae-gan"
    (scratch / "fold0_repeat0_class0").mkdir(parents=True)
    for name in ("step_by_step_notes.txt", "step0000000001.checkpoint", left_over):
        (scratch / "fold0_repeat0_class0" / name).write_text("a year of work")
        (scratch / name).write_text("a year of work")
    there = contents(scratch)
    (root / "checkpoints").mkdir()
    (root / "checkpoints/synthetic").symlink_to(scratch.parent)
    (root / "synthetic").symlink_to(scratch.parent)
    (root / "logs").mkdir()
    (root / "logs" / left_over).write_text("half")
    (root / "raw/images" / left_over).write_text("half")
    workspace = Workspace(root)
    task = next(task for task in workspace.tasks("synthesize") if task.output == SHARD)
    workspace.clear_checkpoints(task)
    workspace.remove_stale(workspace.path(SHARD).parent)
    workspace.remove_stale(root)
    assert contents(scratch) == there
    assert (root / "raw/images" / left_over).exists()
    assert os.listdir(root / "logs") == []


def test_a_report_behind_a_link_is_left_as_it_is(copied: Path, tmp_path: Path) -> None:
    (copied / "report").rename(tmp_path / "mine")
    (copied / "report").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/classes.csv").write_text("of another study")
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    code, text = said_by("aggregate", os.path.relpath(copied))
    assert code == 3
    assert "leads out of the workspace" in text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")} == there


def test_a_task_alone_removes_what_a_killed_one_left_half_written(fresh: Path, tmp_path: Path) -> None:
    """On a cluster no `cmrhpc run` comes after it."""
    root = copy_of(fresh, tmp_path / "w")
    workspace = Workspace(root)
    for stage in ("ingest", "synthesize"):
        task = workspace.tasks(stage)[0]
        places = [workspace.path(task.output).parent, workspace.checkpoint_folder(task)]
        left = [place / f".x.tmp.{files.host_name()}.4194304.1-1" for place in places]
        for path in left:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
        run_task(workspace, stage, 0)
        assert not any(path.exists() for path in left)
    assert not (root / "checkpoints").exists() or not any((root / "checkpoints").rglob("*.tmp.*"))


def test_only_checkpoints_are_cleared_and_a_folder_among_them_stops_nothing(fresh: Path, tmp_path: Path) -> None:
    workspace = Workspace(copy_of(fresh, tmp_path / "w"))
    task = workspace.tasks("synthesize")[0]
    folder = workspace.checkpoint_folder(task)
    (folder / "step1").mkdir(parents=True)
    (folder / "step0000000002.checkpoint").mkdir()
    for name in ("step0000000001.checkpoint", "steps.txt"):
        (folder / name).write_text("")
    workspace.clear_checkpoints(task)
    assert sorted(os.listdir(folder)) == ["step0000000002.checkpoint", "step1", "steps.txt"]


# ------------------------------------------------------------------------------------------------ other users

HIDDEN = """
import ctypes, os, sys, time
from pathlib import Path
from cmrhpc import files
from cmrhpc.errors import Incomplete
from cmrhpc.launch import claim
from cmrhpc.launch.records import RUNNING, Record
folder = Path(sys.argv[1])
files.temporary_name(folder / "x").write_text("half")
ours = Record(RUNNING, "", files.host_name(), os.getpid(), files.process_start(), time.time())
with claim.hold(folder / "claim"):
    os.chmod(folder / "claim", 0o777)
    os.chmod(folder / "claim/00000001.json", 0o644)
    if os.fork() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, so that it sees itself in /proc
        print(ours.host == files.host_name(), files.process_start(ours.pid), files.remove_stale(folder), ours.alive())
        try:
            with claim.hold(folder / "claim"):
                print("held twice")
        except Incomplete:
            print("refused")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@needs_root
def test_who_cannot_see_a_process_takes_it_for_alive() -> None:
    hide = 'mount -o remount,hidepid=2 /proc && exec "$@"'
    space = ["unshare", "-m", "-p", "-f", "--mount-proc", "sh", "-c", hide, "sh"]
    probe = subprocess.run([*space, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this system hides no processes: {(probe.stderr.splitlines() or ['no word of why'])[-1]}")
    folder = tempfile.mkdtemp()  # one that the other user can reach
    os.chmod(folder, 0o777)
    done = subprocess.run([*space, sys.executable, "-c", HIDDEN, folder], capture_output=True, text=True, timeout=120)
    shutil.rmtree(folder)
    assert done.stdout.splitlines() == ["True 0 0 True", "refused"], done.stderr


AS_ANOTHER = """
import os, sys
from pathlib import Path
from cmrhpc import files
from cmrhpc.data.phantom import write_phantom
write_phantom(Path(sys.argv[2]), 4, 1)  # imports what the other user may not be able to read
os.chdir(sys.argv[1])
os.setgroups([int(group) for group in sys.argv[3:]]), os.setgid(65534), os.setuid(65534), os.umask(0o077)
files.atomic_write(Path("made/inner/file"), "patients")
write_phantom(Path("raw"), 4, 1)
for path in ("made", "made/inner", "made/inner/file", "raw", "raw/cohort.csv", next(Path("raw/images").iterdir())):
    print(os.stat(path).st_gid, oct(os.stat(path).st_mode & 0o7777))
"""


@needs_root
@pytest.mark.parametrize(
    ("owner", "mode", "groups", "folders", "inside"),
    [
        ((0, 0), 0o1777, (), "65534 0o700", "65534 0o600"),  # as /tmp
        ((0, 65534), 0o1777, (), "65534 0o700", "65534 0o600"),
        ((65534, 100), 0o770, (), "65534 0o700", "65534 0o600"),  # the folder's group is not this user's
        ((65534, 100), 0o770, (100,), "100 0o2770", "100 0o660"),
        ((65534, 100), 0o2770, (100,), "100 0o2770", "100 0o660"),
        ((0, 100), 0o1770, (100,), "100 0o2770", "100 0o660"),  # members do not remove each other's files
    ],
)
def test_the_group_gets_access_where_it_is_the_folders_own(
    tmp_path: Path, owner: tuple[int, int], mode: int, groups: tuple[int, ...], folders: str, inside: str
) -> None:
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, *owner)
    folder.chmod(mode)
    command = [sys.executable, "-c", AS_ANOTHER, str(folder), str(tmp_path / "raw"), *map(str, groups)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    shutil.rmtree(folder)
    assert done.stdout.splitlines() == [folders, folders, inside, folders, inside, inside], done.stderr
