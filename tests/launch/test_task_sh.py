"""task.sh, in which every element of a job array ends: logs, exit codes, signals and requeueing.

A stand-in for `cmrhpc` says which task it is and ends as told; with Slurm and the real one see tests/cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmrhpc.errors import Incomplete
from cmrhpc.launch.element import TASK_SH, run_element
from tests.conftest import ROOT
from tests.launch.conftest import Put

# Ends with code I for index I, as a task that was asked to stop (75) when it may listen, and never alone.
LISTENS = """
trap 'echo asked; exit 75' USR2
echo "began $*"; touch began.$6
[ $6 -lt 100 ] || for _ in $(seq 600); do sleep 0.05; done
exit $6
"""
# Slurm's own command notes what it is asked for, and knows whether the job is being preempted.
SCONTROL = 'echo "$*" >> scontrol.said; [ "$1" != show ] || echo "PreemptTime=$PREEMPTED"'


@pytest.fixture
def place(program: Put, tmp_path: Path) -> Path:
    program("cmrhpc", LISTENS)
    program("scontrol", SCONTROL)
    return tmp_path


def start(
    place: Path, tasks: str, *words: str, stage: str = "classify", stderr: int | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    more = {"CMRHPC_TASKS": tasks, "SLURM_JOB_ID": "9", "PREEMPTED": "None"} | environment
    command = ["bash", str(TASK_SH), stage, ".", *words]
    return subprocess.Popen(command, cwd=place, env=os.environ | more, stderr=stderr)


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.02)


def requeued(place: Path) -> bool:
    said = place / "scontrol.said"
    return said.exists() and "requeue 9" in said.read_text()


def test_each_task_has_its_log_and_the_worst_exit_code_is_told(place: Path) -> None:
    assert start(place, "0 4 3").wait(60) == 4
    for index in (0, 3, 4):
        log = (place / "logs" / f"classify_{index}.log").read_text()
        assert log == f"began task {place} --stage classify --index {index}\n"
    assert not requeued(place)


def test_the_index_comes_from_the_array_and_an_offset(place: Path) -> None:
    assert start(place, "", SLURM_ARRAY_TASK_ID="2").wait(60) == 2
    assert start(place, "", SLURM_ARRAY_TASK_ID="2", CMRHPC_OFFSET="5").wait(60) == 7
    for word, code in (("5", 7), ("08", 10), ("x", 2)):
        assert start(place, "", word, SLURM_ARRAY_TASK_ID="2").wait(60) == code


def test_a_job_that_is_no_array_runs_no_training(place: Path) -> None:
    """sbatch takes `--array=` without anything, as a stage that is done gives, for a job that is none."""
    assert start(place, "").wait(60) == 2
    assert not (place / "logs").exists()


def test_the_folder_of_logs_has_the_group_and_the_access_of_the_workspace(
    place: Path, request: pytest.FixtureRequest
) -> None:
    group = next((g for g in os.getgroups() if g != place.stat().st_gid), None)
    if group is None:  # this user is in no other: one of somebody else's
        request.getfixturevalue("can_chown")
        group = 4321
    os.chown(place, -1, group)
    for mode, expected in ((0o2775, 0o2770), (0o750, 0o2750), (0o711, 0o2710)):
        place.chmod(mode)
        assert start(place, "0").wait(60) == 0
        made = (place / "logs").stat()
        assert (made.st_gid, oct(stat.S_IMODE(made.st_mode))) == (group, oct(expected))
        shutil.rmtree(place / "logs")


def test_a_log_that_cannot_be_written_is_told_before_the_task_begins(place: Path) -> None:
    (place / "logs").write_text("a file in the place of the folder")
    told = start(place, "0", stderr=subprocess.PIPE)
    assert b"cannot be written" in told.communicate(timeout=60)[1]
    assert told.returncode == 3
    assert not (place / "began.0").exists()


def test_an_element_of_no_task_does_not_pass_for_one_that_is_done(place: Path) -> None:
    assert start(place, " ").wait(60) == 3
    assert not (place / "logs").exists()


def test_no_part_of_it_needs_a_temporary_file() -> None:
    """As a here-string is one before bash 5.1: on a full /tmp the list of tasks would be empty."""
    assert "<<" not in TASK_SH.read_text()


def test_a_workspace_that_apptainer_would_cut_is_told(place: Path) -> None:
    (place / "a:b").mkdir()
    inside = {"CMRHPC_TASKS": "0", "CMRHPC_CONTAINER": "x.sif"}
    line = ["bash", str(TASK_SH), "classify", "a:b"]
    told = subprocess.run(line, cwd=place, env=os.environ | inside, capture_output=True, text=True)
    assert told.returncode == 3
    assert "rename the folder" in told.stderr


@pytest.mark.parametrize(
    ("number", "preempted", "back"),
    [
        (signal.SIGUSR2, "None", True),
        (signal.SIGUSR1, "None", True),
        (signal.SIGUSR2, "2026-01-01T00:00:00", False),  # Slurm puts a preempted job back itself
        (signal.SIGTERM, "None", False),  # whoever sends that has decided
    ],
)
def test_every_task_is_asked_to_stop_and_the_job_goes_back_once(
    place: Path, number: int, preempted: str, back: bool
) -> None:
    running = start(place, "100 101 0", PREEMPTED=preempted)
    wait_for(place / "began.100", place / "began.101", place / "began.0")
    running.send_signal(number)
    assert running.wait(60) == 75
    assert "asked" in (place / "logs/classify_100.log").read_text()
    assert "asked" in (place / "logs/classify_101.log").read_text()
    assert requeued(place) == back
    if back:
        assert (place / "scontrol.said").read_text().count("requeue") == 1


@pytest.mark.parametrize("stage", ["ingest", "aggregate"])
def test_what_keeps_no_checkpoint_runs_into_its_limit(place: Path, program: Put, stage: str) -> None:
    """Slurm warns, and at the limit it ends the job: one that went back into the queue would never be done."""
    running = start(place, "100", stage=stage)
    wait_for(place / "began.100")
    for number in (signal.SIGUSR2, signal.SIGUSR1):
        running.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.3)
    log = place / "logs" / f"{stage}_100.log"
    assert "asked" not in log.read_text()
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 75
    assert "asked" in log.read_text()
    program("cmrhpc", "kill -USR2 $$")  # Slurm may signal every process of a job
    assert start(place, "1", stage=stage).wait(60) == 75
    assert not requeued(place)


def test_a_controller_that_is_away_for_a_moment_is_asked_again(place: Path, program: Put) -> None:
    program("scontrol", f"[ -e asked ] || {{ touch asked; exit 1; }}; {SCONTROL}")
    running = start(place, "100")
    wait_for(place / "began.100")
    running.send_signal(signal.SIGUSR2)
    assert running.wait(60) == 75
    assert requeued(place)


def test_only_its_own_element_goes_back(place: Path) -> None:
    """One element of an array has the number of the whole array as its own."""
    more = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    running = start(place, "100", **more)
    wait_for(place / "began.100")
    running.send_signal(signal.SIGUSR2)
    assert running.wait(60) == 75
    assert (place / "scontrol.said").read_text().splitlines() == ["show job 9_3", "requeue 9_3"]


def test_a_signal_before_a_task_listens_loses_nothing(place: Path, program: Put) -> None:
    program("cmrhpc", "touch began; kill -USR2 $$")
    assert start(place, "1").wait(60) == 75
    assert requeued(place)


def test_a_task_that_is_killed_says_so_in_its_log(place: Path, program: Put) -> None:
    program("cmrhpc", "kill -KILL $$")
    assert start(place, "1").wait(60) == 137
    assert "ended by signal 9" in (place / "logs/classify_1.log").read_text()


def test_the_element_passes_signals_on_and_fails_with_its_tasks(place: Path) -> None:
    code = (
        "import pathlib, sys; from cmrhpc.launch.element import run_element\n"
        "sys.stdout.write(run_element(sys.argv[1], 'classify', [100, 101], {'CMRHPC_CONTAINER': ''}))"
    )
    more = {"PREEMPTED": "None", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(place)]
    running = subprocess.Popen(command, cwd=place, env=os.environ | more, stderr=subprocess.PIPE)
    wait_for(place / "began.100", place / "began.101")
    running.send_signal(signal.SIGUSR2)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert b"exit code 75" in said
    assert "asked" in (place / "logs/classify_100.log").read_text()


def test_the_element_returns_what_happened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = signal.getsignal(signal.SIGUSR2)
    assert run_element(str(place), "classify", [0], {"CMRHPC_CONTAINER": ""}) == "classify 0: exit code 0"
    with pytest.raises(Incomplete, match=r"classify_4\.log"):
        run_element(str(place), "classify", [0, 4], {"CMRHPC_CONTAINER": ""})
    assert signal.getsignal(signal.SIGUSR2) is before


def test_binds_of_the_site_stay_beside_ours(place: Path, program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    program("apptainer", f"echo $APPTAINER_BIND >> {place}/bound")
    (place / "x.sif.sha256").write_text("0" * 64)
    told = {"CMRHPC_CONTAINER": str(place / "x.sif"), "APPTAINER_BIND": "/raw"}
    monkeypatch.setenv("SINGULARITY_BIND", "/old")
    run_element(str(place), "classify", [0], told)
    monkeypatch.setenv("APPTAINER_BIND", "/site")
    run_element(str(place), "classify", [0], told)
    assert (place / "bound").read_text().split() == ["/raw,/old", "/raw,/site"]


@pytest.mark.parametrize("what", ["link", "fifo", "folder of logs"])
def test_a_log_that_is_no_plain_file_is_neither_followed_nor_waited_for(place: Path, tmp_path: Path, what: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "profile").write_text("mine\n")
    log = place / "logs" / "classify_4.log"
    if what == "folder of logs":
        (place / "logs").symlink_to(theirs)
    else:
        log.parent.mkdir()
        log.symlink_to(theirs / "profile") if what == "link" else os.mkfifo(log)
    assert start(place, "4").wait(60) == 3
    assert (theirs / "profile").read_text() == "mine\n"
    assert os.listdir(theirs) == ["profile"]
    assert not list(place.glob("began.*"))
