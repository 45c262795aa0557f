"""One submission at a time: who holds, who takes over, and that two never hold at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmrhpc import files
from cmrhpc.errors import Incomplete
from cmrhpc.launch import claim


def newest(folder: Path) -> Path:
    return sorted(folder.glob("*.json"))[-1]


def test_a_second_one_is_told_who_is_at_work(tmp_path: Path) -> None:
    with claim.hold(tmp_path), pytest.raises(Incomplete, match=f"process {os.getpid()}"), claim.hold(tmp_path):
        pass
    with claim.hold(tmp_path):
        assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_process_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\nfrom cmrhpc.launch import claim\n"
        "with claim.hold(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert not json.loads(newest(tmp_path).read_text())["released"]
    with claim.hold(tmp_path):
        pass


def test_another_host_is_believed_for_ten_minutes(tmp_path: Path) -> None:
    with claim.hold(tmp_path):
        pass
    told = json.loads(newest(tmp_path).read_text()) | {"released": False, "host": "elsewhere"}
    newest(tmp_path).write_text(json.dumps(told))
    with pytest.raises(Incomplete, match="elsewhere"), claim.hold(tmp_path):
        pass
    newest(tmp_path).write_text(json.dumps(told | {"time": 0}))  # its host's clock, which may be wrong
    with pytest.raises(Incomplete, match="elsewhere"), claim.hold(tmp_path):
        pass
    os.utime(newest(tmp_path), (time.time() - claim.PATIENCE_S - 60,) * 2)
    with claim.hold(tmp_path):
        pass


def test_whoever_lost_the_claim_hears_of_it(tmp_path: Path) -> None:
    with claim.hold(tmp_path) as ours:
        ours.renew()
        told = json.loads(newest(tmp_path).read_text())
        newest(tmp_path).write_text(json.dumps(told | {"host": "elsewhere"}))
        os.utime(newest(tmp_path), (0, 0))
        with claim.hold(tmp_path), pytest.raises(Incomplete, match="took over"):
            ours.renew()


def test_a_damaged_claim_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "00000007.json").write_text("{")
    with claim.hold(tmp_path) as ours:
        assert ours.number == 8
    (tmp_path / "00000009.json").symlink_to("nowhere")
    with claim.hold(tmp_path) as ours:
        assert ours.number == 10


@pytest.mark.parametrize("times", [1, 99])
def test_a_claim_that_cannot_be_read_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A read fails for a moment where a claim is replaced on NFS, or for longer: the one who holds it lives on."""
    read, left = files.read_plain, [None] * times

    def fails(path: Path) -> bytes:
        if left:
            left.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    words = f"process {os.getpid()}" if times == 1 else "cannot be read"
    with claim.hold(tmp_path):
        monkeypatch.setattr(files, "read_plain", fails)
        with pytest.raises(Incomplete, match=words), claim.hold(tmp_path):
            pass
        os.utime(newest(tmp_path), (time.time() - claim.PATIENCE_S - 60,) * 2)
        if times > 1:
            with claim.hold(tmp_path):
                pass


def test_a_claim_that_is_taken_over_while_it_is_read_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim.hold(tmp_path) as ours:
        first, read = newest(tmp_path), files.read_plain
        theirs = json.loads(first.read_text())

        def taken_over(path: Path) -> bytes:
            if path == first:
                (tmp_path / f"{ours.number + 1:08d}.json").write_text(json.dumps(theirs | {"host": "elsewhere"}))
                first.unlink()
            return read(path)

        monkeypatch.setattr(files, "read_plain", taken_over)
        with pytest.raises(Incomplete, match="elsewhere"), claim.hold(tmp_path):
            pass


def test_a_claim_that_cannot_be_released_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def full(path: Path, data: bytes) -> None:
        called.append(json.loads(data)["released"])
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> None:
        with claim.hold(tmp_path):
            monkeypatch.setattr(files, "write_all", full)
            raise Incomplete("the cluster takes no more")

    with pytest.raises(Incomplete, match="the cluster takes no more"):
        work()
    assert called == [True]


RACER = """
import os, pathlib, sys, time
from cmrhpc.errors import Incomplete
from cmrhpc.launch import claim
folder, inside = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
held = 0
for _ in range(40):
    try:
        with claim.hold(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails when another one is inside
            held += 1
            time.sleep(0.001)
            inside.unlink()
    except Incomplete:
        time.sleep(0.002)
print(held)
"""


def test_two_never_hold_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "claim"), str(tmp_path / "inside")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    held = [int(racer.communicate(timeout=120)[0] or -1) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sum(held) >= 4
