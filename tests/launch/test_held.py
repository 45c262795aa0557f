"""Which tasks a submission leaves out because somebody holds them already, and what it tells of those it cannot see.

Programs stand in for Slurm's: a controller that does not answer and a number that came back cannot be had at will.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from cmrhpc import files
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.launch import records, submit
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.reasons import user_name
from cmrhpc.launch.records import Record
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.submissions import as_text, write_submission
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.launch.proposed import PROFILE, SENT, propose


@pytest.mark.parametrize("first", [True, False])
def test_silence_of_slurm_stops_a_submission(ready: Workspace, program: Put, first: bool) -> None:
    if not first:
        write_submission(ready, SENT)
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(Incomplete, match="Slurm does not answer"):
        propose(ready)


def test_without_slurm_files_can_be_shown_and_nothing_be_sent(
    ready: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert propose(ready).tasks == 19
    with pytest.raises(Incomplete, match="Slurm does not answer"):
        submit.submit_all(ready, parse_profile(""), Limits(), lambda array, jobs: pytest.fail("sent"))


def test_jobs_of_who_shares_the_workspace_are_left_out(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    program("squeue", "[[ $* = *--user=* ]] || echo '7_1|PENDING|Priority||classify-real-aa|c'")
    program("sacct", "exit 1")
    assert propose(ready).queued == 2


def test_plain_sbatch_of_who_shares_the_workspace_is_left_out_where_a_record_tells(
    ready: Workspace, program: Put
) -> None:
    """A stranger's job of that number, which has another name, is not taken for it."""
    note(ready, 5, records.RUNNING, "1")
    program("sacct", "exit 1")
    for name, held in (("classify", {5: "40", 6: "40"}), ("somebody-elses", {})):
        lines = "; ".join(f"echo '40_{k}|RUNNING|None|n1|{name}|(null)'" for k in (1, 2))
        program("squeue", f"[[ $* != *--jobs=40* ]] || {{ {lines}; }}")
        assert ask_queue(ready).tasks == {("classify", index): job for index, job in held.items()}


def test_a_job_of_this_workspace_without_a_record_stops_a_submission(ready: Workspace, program: Put) -> None:
    row = f"7_0|PENDING|Priority||classify-real-aa|cmrhpc {ready.root}"
    program("squeue", f"[[ $* = *--name=* ]] || echo '{row}'")
    with pytest.raises(Incomplete, match="whose record in submissions/ is gone"):
        propose(ready)
    note(ready, 5, records.RUNNING, "0")  # of one of its tasks is known that it runs, and of the others nothing
    lines = [row.replace("7_0|PENDING|Priority|", "40_0|RUNNING||n1"), row.replace("7_0", "40_1")]
    program("squeue", f"[[ $* = *--name=* ]] || printf '%s\\n' '{lines[0]}' '{lines[1]}'")
    with pytest.raises(Incomplete, match="job 40"):
        propose(ready)
    # Another submission has sent it and noted it while the queue was asked for.
    (ready.root / "submissions").mkdir()
    (late := ready.root.parent / "late").write_text(as_text(SENT))
    record = ready.root / "submissions" / "7.json"
    program("squeue", f"[[ $* != *--user=* ]] || {{ cp {late} {record}; echo '{row}'; }}")
    assert propose(ready).queued == 0
    record.unlink()
    program("squeue", f"echo '{row.replace('PENDING', 'COMPLETED')}'; echo '{row}2'")  # ended, and of another one
    assert propose(ready).tasks == 19
    program("squeue", f"echo '{row}'")
    write_submission(ready, SENT)
    assert propose(ready).queued == 1


def test_jobs_are_sent_to_no_cluster_whose_queue_is_not_asked_for(
    ready: Workspace, program: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("squeue", "exit 0")
    monkeypatch.setenv("SBATCH_CLUSTERS", "far")
    with pytest.raises(BadInput, match="SBATCH_CLUSTERS"):
        propose(ready)
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    assert propose(ready).tasks == 19


def test_what_another_cluster_may_hold_is_told(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    program("sacct", "exit 1")
    write_submission(ready, dataclasses.replace(SENT, cluster="far"))
    here = Limits(cluster="near")

    def notes(limits: Limits) -> list[str]:
        return submit.propose(ready, parse_profile(PROFILE), ask_queue(ready), limits).notes

    assert notes(here) == [
        "sent before on the cluster far, whose queue near does not show: job 7; "
        "what is queued there still would run twice"
    ]
    assert notes(Limits(cluster="far")) == notes(Limits()) == []
    for index, element in ((0, "0"), (1, "1"), (2, "1")):
        record = Record(records.FAILED, "disk full", host="n1", pid=1, start="1", time=2e9, job="7", element=element)
        files.atomic_write(records.record_path(ready, "classify", index), json.dumps(dataclasses.asdict(record)))
    assert notes(here) == []  # the tasks themselves have told their end


def private_notes(workspace: Workspace, program: Put) -> list[str]:
    """What a submission is told on a cluster that shows jobs to their owners alone, and shows none."""
    program("squeue", "exit 0")
    program("sacct", "exit 1")
    program("scontrol", "echo 'PrivateData = accounts,jobs'")
    limits = submit.limits_for(parse_profile(PROFILE))
    assert limits.private
    return submit.propose(workspace, parse_profile(PROFILE), ask_queue(workspace), limits).notes


def asked_for(workspace: Workspace, name: str) -> Path:
    """The note of a submission that was killed before it noted Slurm's answer."""
    path = workspace.root / "submissions" / "asked" / f"{name}.json"
    files.atomic_write(path, as_text(dataclasses.replace(SENT, job="", name=name)))
    return path


def test_where_jobs_are_private_our_own_are_seen(ready: Workspace, program: Put) -> None:
    mine = asked_for(ready, "classify-real-cc")
    write_submission(ready, SENT)
    assert private_notes(ready, program) == []
    assert not mine.exists()


@pytest.mark.usefixtures("can_chown")
def test_where_jobs_are_private_a_colleague_may_hold_tasks(ready: Workspace, program: Put) -> None:
    """Nor is the note of what a colleague asked for taken away, whose answer only the colleague can find."""
    theirs = asked_for(ready, "classify-real-bb")
    write_submission(ready, SENT)
    for path in (theirs, ready.root / "submissions" / "7.json"):
        os.chown(path, 1, -1)
    (note,) = private_notes(ready, program)
    assert note.startswith(f"sent before by {user_name(1)}, and this cluster shows jobs to their owners alone: job 7;")
    assert theirs.exists()


def note(workspace: Workspace, index: int, state: str, element: str) -> None:
    record = Record(state, host="n1", pid=1, start="1", time=1e9, job="40", element=element)
    files.atomic_write(records.record_path(workspace, "classify", index), json.dumps(dataclasses.asdict(record)))


def test_plain_sbatch_is_left_out_where_a_record_tells(ready: Workspace, program: Put) -> None:
    """Elements 0 to 2 are the tasks 4 to 6: the second has begun, and the first has ended."""
    rows = ["40_0|FAILED|None|n1", "40_1|RUNNING|None|n1", "40_2|PENDING|Priority|"]
    program("squeue", "; ".join(f"echo '{row}|classify|(null)'" for row in rows))
    program("sacct", "exit 1")
    before = propose(ready)
    assert before.queued == 0
    assert before.notes == [
        "in the queue by plain sbatch, perhaps for this workspace: job 40; its tasks would run twice"
    ]
    note(ready, 5, records.RUNNING, "1")
    found = propose(ready)
    assert ask_queue(ready).tasks == {("classify", 5): "40", ("classify", 6): "40"}
    assert (found.queued, found.notes) == (2, [])
    (report,) = [array for array in found.arrays if array.stage == "aggregate"]
    assert "40" in report.after  # it waits for what was sent by hand too


def test_of_a_job_of_another_name_only_what_it_runs_now_is_left_out(ready: Workspace, program: Put) -> None:
    program("squeue", 'for k in 0 1 2; do echo "40_$k|RUNNING|None|n1|my-own|(null)"; done')
    note(ready, 4, records.FAILED, "0")
    note(ready, 5, records.RUNNING, "1")
    note(ready, 6, records.STOPPED, "2")
    assert ask_queue(ready).tasks == {("classify", 5): "40"}
    program("squeue", "echo '40_2|PENDING|BeginTime||my-own|(null)'")
    assert ask_queue(ready).tasks == {("classify", 6): "40"}


def test_queued_tasks_are_left_out_unless_the_number_is_of_another_job(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    for name, held in (("classify-real-aa", 3), ("somebody-elses", 0)):
        program("squeue", f"echo '7_0|RUNNING|None|n1|{name}|c'; echo '7_1|PENDING|Priority||{name}|c'")
        program("sacct", "exit 1")
        found = propose(ready)
        assert found.queued == held
        assert sum(len(a.tasks) for a in found.arrays if a.stage == "classify") == 10 - held


def test_a_damaged_note_of_a_killed_submission_is_cleared(ready: Workspace, program: Put, tmp_path: Path) -> None:
    program("squeue", "exit 0")
    note = ready.root / "submissions" / "asked" / "classify-real-bb.json"
    note.parent.mkdir(parents=True)
    note.write_text("{")
    propose(ready)
    assert not note.exists()
