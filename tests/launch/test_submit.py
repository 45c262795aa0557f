"""What a submission takes from Slurm's answers. Programs stand in for Slurm's: an out-of-memory kill, a controller that
does not answer and a number that came back cannot be had from a real one at will."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmrhpc.errors import Incomplete
from cmrhpc.launch import submit
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.submissions import Submission, write_submission
from cmrhpc.plan import COHORT, Task
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.test_plan import write_all, write_output

PROFILE = '[slurm]\nmax_memory = "20G"\nmax_time = "20:00:00"\n'
SENT = Submission("7", "classify", ((0,), (1, 2)), 1e9, time_limit_s=6 * 3600, memory="16G", name="classify-real-aa")


def propose(workspace: Workspace, text: str = PROFILE) -> submit.Proposal:
    return submit.propose(workspace, parse_profile(text), submit.ask_queue(workspace), Limits())


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """A workspace of which only the cohort is there."""
    write_output(workspace, Task("ingest"), COHORT)
    write_output(workspace, Task("ingest"), Task("ingest").output)
    return workspace


def test_silence_of_slurm_stops_a_submission(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(Incomplete, match="Slurm does not answer"):
        propose(ready)


def test_queued_tasks_are_left_out_unless_the_number_is_of_another_job(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    for name, held in (("classify-real-aa", 3), ("somebody-elses", 0)):
        program("squeue", f"echo '7_0|RUNNING|None|n1|/x|{name}|c'; echo '7_1|PENDING|Priority||/x|{name}|c'")
        program("sacct", "exit 1")
        found = propose(ready)
        assert found.queued == held
        assert sum(len(a.tasks) for a in found.arrays if a.stage == "classify") == 10 - held


def ended(program: Put, first: str, second: str) -> None:
    program("squeue", "exit 0")
    program("sacct", f"echo '7_0|{first}|0:125|n1'; echo '7_1|{second}|0:0|n1'")


def test_out_of_memory_asks_for_twice_what_a_task_had(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    ended(program, "FAILED", "OUT_OF_MEMORY")
    found = propose(ready, PROFILE + '[stages.classify]\nmemory = "4G"\n')
    # The element of two tasks had 16 GB.
    asked = {index: a.ask.memory // 1024 for a in found.arrays if a.stage == "classify" for index in a.tasks}
    assert [asked[i] for i in (0, 1, 2, 3)] == [4, 16, 16, 4]
    assert found.notes == ["classify: 2 tasks ran out of memory; asking for 16G instead of 4G"]


def test_no_more_than_the_profile_allows(ready: Workspace, program: Put) -> None:
    write_submission(ready, dataclasses.replace(SENT, time_limit_s=15 * 3600, memory="20G"))
    ended(program, "OUT_OF_MEMORY", "TIMEOUT")
    found = propose(ready, PROFILE + '[stages.classify]\nmemory = "20G"\n')
    asked = {index: a.ask.seconds // 3600 for a in found.arrays if a.stage == "classify" for index in a.tasks}
    assert [asked[i] for i in (0, 1, 2, 3)] == [6, 20, 20, 6]
    assert found.notes == [
        "classify: 2 tasks ran out of time; asking for 20:00:00 instead of 06:00:00 (max_time of the profile)",
        "classify: 1 task ran out of time or memory; asking for what the profile says, "
        "and max_time and max_memory allow no more",
    ]


def test_a_later_failure_does_not_take_the_time_away_again(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    write_submission(ready, dataclasses.replace(SENT, job="8", time=2e9, time_limit_s=12 * 3600))
    program("squeue", "exit 0")
    program("sacct", "echo '7_0|TIMEOUT|0:0|n1'; echo '8_0|FAILED|1:0|n1'; echo '8_1|COMPLETED|0:0|n1'")
    found = propose(ready)
    assert {a.ask.seconds for a in found.arrays if 0 in a.tasks and a.stage == "classify"} == {12 * 3600}


def test_without_accounting_what_the_controller_remembers_serves(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    program("squeue", "echo '7_0|TIMEOUT|TimeLimit|n1|/x|classify-real-aa|c'")
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert {a.ask.seconds for a in propose(ready).arrays if 0 in a.tasks and a.stage == "classify"} == {12 * 3600}


def test_a_finished_study_has_nothing_to_submit_but_its_report(workspace: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    write_all(workspace)
    assert [a.name for a in propose(workspace).arrays] == ["aggregate"]


def test_measured_seconds_are_what_is_expected(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    guess = propose(ready).expected["synthesize"]
    assert (guess.measured, guess.gpu_hours) == (0, 4 * 12.0)
    task = ready.tasks("synthesize")[0]
    write_output(ready, task, task.output, seconds=1800.0)
    known = propose(ready).expected["synthesize"]
    assert (known.measured, known.tasks, known.gpu_hours) == (3, 3, 1.5)


def test_limits_of_the_cluster_cut_the_arrays() -> None:
    assert submit.max_elements(Limits()) == 1000
    assert submit.max_elements(Limits(max_array_size=4)) == 4
    assert submit.max_elements(Limits(1001, 10000, 100)) == 50
    assert submit.max_elements(Limits(1001, 10000, 1)) == 1


def test_a_damaged_note_of_a_killed_submission_is_cleared(ready: Workspace, program: Put, tmp_path: Path) -> None:
    program("squeue", "exit 0")
    note = ready.root / "submissions" / "asked" / "classify-real-bb.json"
    note.parent.mkdir(parents=True)
    note.write_text("{")
    propose(ready)
    assert not note.exists()


@pytest.mark.parametrize("answer", ["n\n", "\x04"])  # no, and the end of input
def test_a_person_is_asked_and_may_refuse(ready: Workspace, program: Put, tmp_path: Path, answer: str) -> None:
    for name in ("squeue", "srun"):
        program(name, "exit 0")
    program("sbatch", f"touch {tmp_path}/sent")
    profile = tmp_path / "mine.toml"
    profile.write_text('[environment]\nlines = ["true"]\n')
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "cmrhpc.cli", "submit", str(ready.root), "--profile", str(profile)]
    asking = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, answer.encode())
    out, err = asking.communicate(timeout=120)
    assert asking.returncode == 0
    assert "GPU-hours" in out
    assert "send 19 tasks? [y/N]" in err
    assert "nothing was sent" in err
    assert not (tmp_path / "sent").exists()
