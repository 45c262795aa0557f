"""One submission at a time: who holds, who takes over, and that two never hold at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
