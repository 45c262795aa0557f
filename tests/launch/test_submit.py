"""What a submission takes from Slurm's answers. Programs stand in for Slurm's: an out-of-memory kill, a controller that
does not answer and a number that came back cannot be had from a real one at will."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cmrhpc
from cmrhpc import files
from cmrhpc.cli import main
from cmrhpc.errors import BadInput, CmrhpcError, Incomplete
from cmrhpc.launch import records, submit
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.reasons import user_name
from cmrhpc.launch.records import Record
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.status import status
from cmrhpc.launch.submissions import Submission, as_text, write_submission
from cmrhpc.planning import COHORT, Task
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.outputs import name_of_ended_process, write_all, write_output

PROFILE = '[slurm]\nmax_memory = "20G"\nmax_time = "20:00:00"\n'
SENT = Submission("7", "classify", ((0,), (1, 2)), 1e9, time_limit_s=6 * 3600, memory="16G", name="classify-real-aa")


def propose(workspace: Workspace, text: str = PROFILE) -> submit.Proposal:
    return submit.propose(workspace, parse_profile(text), ask_queue(workspace), Limits())


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """A workspace of which only the cohort is there."""
    write_output(workspace, Task("ingest"), COHORT)
    write_output(workspace, Task("ingest"), Task("ingest").output)
    return workspace


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


POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
OTHER = "echo '3|PENDING|Priority||somebody|(null)'"


@pytest.mark.parametrize(
    ("said", "queue", "kind", "words"),
    [
        # Slurm 24.11 names the limit, as here; older ones do not, and the queue tells how likely it is.
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", OTHER, BadInput, "QOSMaxWallDuration"),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", "true", Incomplete, "the same command goes on"),
        (POLICY, "true", BadInput, "mend the profile"),
        (POLICY, OTHER, Incomplete, "or the profile asks for more than the account or QOS allows"),
        ("Slurm temporarily unable to accept job, sleeping and retrying", "true", Incomplete, "goes on"),
        ("Invalid partition name specified", OTHER, BadInput, "mend the profile"),
    ],
)
def test_a_job_that_is_too_large_is_not_taken_for_one_too_many(
    ready: Workspace, program: Put, tmp_path: Path, said: str, queue: str, kind: type[CmrhpcError], words: str
) -> None:
    from submitit import AutoExecutor

    program("srun", "exit 0")
    program("squeue", queue)
    program("sbatch", f"cat >&2 <<'END'\n{said}\nEND\nexit 1")
    with pytest.raises(CmrhpcError) as raised:
        cmrhpc.submit(ready, AutoExecutor(tmp_path / "logs", cluster="slurm"))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "sent:  0 of 19 tasks" in str(raised.value)
    assert not [*(ready.root / "submissions").rglob("asked/*")]


@pytest.mark.parametrize(
    "said",
    [
        "echo sbatch: error: Batch job submission failed: Socket timed out on send/recv operation >&2; exit 1",
        "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1",
        "echo taken; exit 0",
        "kill -KILL $$",
        "printf '\\377\\n' >&2; exit 0",  # submitit cannot read it, and kills sbatch
    ],
)
def test_a_job_of_which_sbatch_does_not_tell_is_looked_for_and_not_sent_twice(
    ready: Workspace, program: Put, tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one is queued, and Slurm's answer is lost."""
    ready.root.chmod(0o2770)
    queue, count = tmp_path / "queue", tmp_path / "count"
    program("srun", "exit 0")
    program("sacct", "exit 1")
    program(
        "squeue",
        f'[ ! -e {queue} ] || if [[ $* = *--name=* ]]; then echo "9|$(cat {queue})"; else\n'
        f'for k in 0 1; do echo "9_$k|RUNNING|None|n1|$(cat {queue})|c"; done; fi',
    )
    name = "sed -n 's/^#SBATCH --job-name=//p' $1"
    program(
        "sbatch", f"echo x >> {count}; [ -e {queue} ] || {{ {name} > {queue}; {said}; }}\necho job 1$(wc -l < {count})"
    )
    (tmp_path / "mine.toml").write_text('[environment]\nlines = ["true"]\n')
    command = ["submit", str(ready.root), "--profile", str(tmp_path / "mine.toml"), "--yes"]
    assert main(command) == 4
    assert "whether it took the job" in capsys.readouterr().err
    (note,) = (ready.root / "submissions" / "asked").iterdir()
    planned = propose(ready).arrays
    assert not note.exists()
    place = ready.root / "submissions" / "submitit" / note.stem
    for path in (place, *place.iterdir()):  # a job unpickles what lies there as whoever submits
        assert not path.stat().st_mode & 0o027, path
    (first,) = (ready.root / "submissions").glob("*.json")
    told = json.loads(first.read_text())
    assert (told["job"], told["name"]) == ("9", note.stem)
    assert (ready.root / "submissions" / "submitit" / note.stem).is_dir()
    assert main(command) == 0
    sent = [json.loads(path.read_text()) for path in (ready.root / "submissions").glob("*.json")]
    assert len(sent) == len(planned) + 1 == len(count.read_text().split())
    assert [one["job"] for one in sent if one["name"] == note.stem] == ["9"]


def test_an_image_of_another_version_is_told_before_it_is_sent(
    ready: Workspace, program: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.sif", "x.sif.sha256"):
        (tmp_path / name).write_text("0" * 64)
    (tmp_path / "mine.toml").write_text('[container]\nimage = "x.sif"\n')
    for name in ("squeue", "srun"):
        program(name, "exit 0")
    program("sbatch", "echo job $$")
    program("apptainer", f"echo x >> {tmp_path}/started; echo cmrhpc 0.0.9")
    assert main(["submit", str(ready.root), "--profile", str(tmp_path / "mine.toml"), "--yes", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.endswith(f"holds cmrhpc 0.0.9, and this is cmrhpc {cmrhpc.__version__}: tasks run the image's code")
    assert (tmp_path / "started").read_text() == "x\n"


def test_limits_of_other_clusters_and_accounts_cut_no_arrays(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    program("scontrol", "echo 'ClusterName = near'")
    here, elsewhere = "echo 'heart|50||'; echo 'cpu|8||'", "echo 'heart|2||'"
    default = "*defaultaccount*) echo 'me|heart'"
    program("sacctmgr", f"case $* in *assoc*cluster=near*) {here};; *assoc*) {elsewhere};; {default};; esac")
    assert submit.limits_for(parse_profile("")) == Limits(max_submit=50, cluster="near")
    monkeypatch.setenv("SBATCH_ACCOUNT", "cpu")
    assert submit.limits_for(parse_profile("")).max_submit == 8


def test_the_narrowest_account_limits_the_arrays(program: Put) -> None:
    program("scontrol", "exit 1")
    program("sacctmgr", "[[ $* = *assoc* ]] && echo 'heart|50||'; echo 'cpu|8||'")
    text = '[slurm]\naccount = "heart"\n[stages.ingest]\naccount = "cpu"\n'
    assert submit.limits_for(parse_profile('[slurm]\naccount = "heart"\n')).max_submit == 50
    assert submit.limits_for(parse_profile(text)).max_submit == 8


def test_queued_tasks_are_left_out_unless_the_number_is_of_another_job(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    for name, held in (("classify-real-aa", 3), ("somebody-elses", 0)):
        program("squeue", f"echo '7_0|RUNNING|None|n1|{name}|c'; echo '7_1|PENDING|Priority||{name}|c'")
        program("sacct", "exit 1")
        found = propose(ready)
        assert found.queued == held
        assert sum(len(a.tasks) for a in found.arrays if a.stage == "classify") == 10 - held


def ended(program: Put, first: str, second: str) -> None:
    program("squeue", "exit 0")
    program("sacct", f"echo '7_0|{first}|0:125|n1|classify-real-aa'; echo '7_1|{second}|0:0|n1|classify-real-aa'")


def test_a_job_of_another_name_with_that_number_ran_out_of_nothing(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    program("squeue", "exit 0")
    program("sacct", "printf '7_%s|OUT_OF_MEMORY|0:125|n1|somebody-elses\\n' 0 1")
    assert propose(ready).notes == []


def test_out_of_memory_asks_for_twice_what_a_task_had(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    ended(program, "FAILED", "OUT_OF_MEMORY")
    found = propose(ready, PROFILE + '[stages.classify]\nmemory = "4G"\n')
    # The element of two tasks had 16 GB.
    asked = {index: a.request.memory // 1024 for a in found.arrays if a.stage == "classify" for index in a.tasks}
    assert [asked[i] for i in (0, 1, 2, 3)] == [4, 16, 16, 4]
    assert found.notes == ["classify: 2 tasks ran out of memory; asking for 16G instead of 4G"]


def test_a_step_out_of_memory_asks_for_more_though_its_job_only_failed(ready: Workspace, program: Put) -> None:
    """Also while the queue, which knows no steps, still shows the job."""
    write_submission(ready, dataclasses.replace(SENT, memory="20G"))
    rows = [
        "7_0|FAILED|1:0|n1|NAME",
        "7_0.0|OUT_OF_MEMORY|0:125|n1|x",
        "7_1|FAILED|1:0|n1|NAME",
        "7_1.0|FAILED|1:0|n1|x",
    ]
    rows = [row.replace("NAME", SENT.name) for row in rows]
    program("sacct", f"[[ $* = *--allocations* ]] || printf '%s\\n' {' '.join(map(repr, rows))}")
    for queue in ("exit 0", 'for k in 0 1; do echo "7_$k|FAILED|NonZeroExitCode|n1|classify-real-aa|c"; done'):
        program("squeue", queue)
        asked = {i: a.request.memory for a in propose(ready).arrays if a.stage == "classify" for i in a.tasks}
        assert [asked[i] // 1024 for i in (0, 1)] == [20, 16]
        assert [t.reason for t in status(ready).stages["classify"].tasks[:2]] == [
            "out of memory: submit again with more",
            "its job failed with exit code 1",
        ]


def test_a_task_that_failed_by_itself_beside_one_out_of_memory_gets_no_more(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    ended(program, "COMPLETED", "OUT_OF_MEMORY")
    for index, why in ((1, "disk full"), (2, "out of memory")):
        record = Record(records.FAILED, why, host="n1", pid=1, start="1", time=2e9, job="7", element="1")
        files.atomic_write(records.record_path(ready, "classify", index), json.dumps(dataclasses.asdict(record)))
    found = propose(ready, PROFILE + '[stages.classify]\nmemory = "4G"\n').arrays
    asked = {i: a.request.memory // 1024 for a in found if a.stage == "classify" for i in a.tasks}
    assert [asked[i] for i in (1, 2)] == [4, 16]


def test_no_more_than_the_profile_allows(ready: Workspace, program: Put) -> None:
    write_submission(ready, dataclasses.replace(SENT, time_limit_s=15 * 3600, memory="20G"))
    ended(program, "OUT_OF_MEMORY", "TIMEOUT")
    found = propose(ready, PROFILE + '[stages.classify]\nmemory = "20G"\n')
    asked = {index: a.request.seconds // 3600 for a in found.arrays if a.stage == "classify" for index in a.tasks}
    assert [asked[i] for i in (0, 1, 2, 3)] == [6, 20, 20, 6]
    assert found.notes == [
        "classify: 2 tasks ran out of time; asking for 20:00:00 instead of 06:00:00 (max_time of the profile)",
        "classify: 1 task ran out of time or memory; asking for what the profile says, "
        "and max_time and max_memory allow no more",
    ]


def test_no_more_time_than_the_partition_gives(ready: Workspace, program: Put) -> None:
    write_submission(ready, dataclasses.replace(SENT, time_limit_s=8 * 3600))
    ended(program, "TIMEOUT", "TIMEOUT")
    program("sinfo", "printf 'cpu*|up|1-00:00:00|9|(null)\\ngpu|up|12:00:00|4|gpu:2\\nold|up|infinite|1|gpu:1\\n'")
    for partition, hours in (("gpu", 12), ("", 16), ("old", 16), ("gpu,cpu", 16)):
        found = propose(ready, f'[slurm]\npartition = "{partition}"\n')
        assert {a.request.seconds for a in found.arrays if 0 in a.tasks and a.stage == "classify"} == {hours * 3600}
        assert (" (max_time of the partition)" in found.notes[0]) == (hours == 12)
    for most, hours, whose in (("20:00:00", 12, "partition"), ("10:00:00", 10, "profile")):  # the narrower holds
        found = propose(
            ready, f'[slurm]\npartition = "gpu"\nmax_time = "{most}"\n[stages.synthesize]\ntime = "6:00:00"\n'
        )
        assert {a.request.seconds for a in found.arrays if 0 in a.tasks and a.stage == "classify"} == {hours * 3600}
        assert f" (max_time of the {whose})" in found.notes[0]


@pytest.mark.parametrize(("job", "hours"), [("7", 6), ("6", 12)])
def test_a_task_that_failed_by_itself_beside_one_out_of_time_gets_no_more(
    ready: Workspace, program: Put, job: str, hours: int
) -> None:
    """Where it failed in that very job: of an older one nothing follows."""
    write_submission(ready, SENT)
    ended(program, "COMPLETED", "TIMEOUT")
    record = Record(records.FAILED, "disk full", host="n1", pid=1, start="1", time=1e8, job=job, element="1")
    files.atomic_write(records.record_path(ready, "classify", 1), json.dumps(dataclasses.asdict(record)))
    asked = {i: a.request.seconds // 3600 for a in propose(ready).arrays if a.stage == "classify" for i in a.tasks}
    assert [asked[i] for i in (1, 2)] == [hours, 12]


def test_an_array_that_is_refused_holds_up_no_other(ready: Workspace, program: Put) -> None:
    """Only what asks for the same is not tried, and what would read its shards; all others go, and the report."""
    program("squeue", "exit 0")
    sent, n = [], iter(range(50, 99))

    class Job:
        def __init__(self) -> None:
            self.job_id = f"{next(n)}_0"

    def send(array, jobs):  # type: ignore[no-untyped-def]
        if array.stage == "refine":
            raise BadInput("Slurm refuses the job", array.name, "mend the profile")
        assert not [name for name in array.after if name.startswith("refine")]
        sent.append(array.name)
        return [Job()]

    with pytest.raises(BadInput, match="Slurm refuses the job") as raised:
        submit.submit_all(ready, parse_profile(PROFILE), Limits(), send)
    planned = [a for a in propose(ready).arrays if a.stage != "refine"]
    waiting = [a.name for a in planned if a.stage == "classify" and any(name.startswith("refine") for name in a.after)]
    assert len(waiting) == 2
    planned = [a for a in planned if a.name not in waiting]
    assert sent == [a.name for a in planned]
    assert sent[-1] == "aggregate"
    assert f"{sum(len(a.tasks) for a in planned)} of 19 tasks" in str(raised.value)


def test_a_report_that_alone_is_missing_is_sent(workspace: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    write_all(workspace)
    sent = []

    class Job:
        job_id = "50"

    def send(array, jobs):  # type: ignore[no-untyped-def]
        sent.append(array.name)
        return [Job()]

    stale = name_of_ended_process(workspace.root / "a.h5")
    stale.touch()
    assert len(submit.submit_all(workspace, parse_profile(PROFILE), Limits(), send)) == 1
    assert not stale.exists()  # of a process that is gone
    assert sent == ["aggregate"]
    assert (workspace.root / "logs").is_dir()  # before the first job makes it with the group of its user


def test_where_all_is_refused_no_report_is_sent(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")

    def send(array, jobs):  # type: ignore[no-untyped-def]
        assert array.stage != "aggregate"
        raise BadInput("Slurm refuses the job", array.name, "mend the profile")

    with pytest.raises(BadInput, match="sent:  0 of 19 tasks"):
        submit.submit_all(ready, parse_profile(PROFILE), Limits(), send)


def test_a_later_failure_does_not_take_the_time_away_again(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    write_submission(ready, dataclasses.replace(SENT, job="8", time=2e9, time_limit_s=12 * 3600))
    program("squeue", "exit 0")
    program("sacct", "printf '%s|classify-real-aa\\n' '7_0|TIMEOUT|0:0|n1' '8_0|FAILED|1:0|n1' '8_1|COMPLETED|0:0|n1'")
    found = propose(ready)
    assert {a.request.seconds for a in found.arrays if 0 in a.tasks and a.stage == "classify"} == {12 * 3600}


def test_without_accounting_what_the_controller_remembers_serves(ready: Workspace, program: Put) -> None:
    write_submission(ready, SENT)
    program("squeue", "echo '7_0|TIMEOUT|TimeLimit|n1|classify-real-aa|c'")
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert {a.request.seconds for a in propose(ready).arrays if 0 in a.tasks and a.stage == "classify"} == {12 * 3600}


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


def test_tasks_that_share_a_gpu_take_it_as_long_as_the_longest(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    shared = propose(ready, PROFILE + '[stages.synthesize]\ntasks_per_gpu = 2\ntime = "10:00:00"\n')
    row = shared.expected["synthesize"]
    assert (row.tasks, row.elements, row.gpu_hours) == (4, 2, 2 * 10.0)


def test_limits_of_the_cluster_cut_the_arrays() -> None:
    assert submit.max_elements(Limits()) == 1000
    assert submit.max_elements(Limits(max_array_size=4)) == 4
    assert submit.max_elements(Limits(max_array_size=0)) == 1  # no arrays at all: single jobs
    assert submit.max_elements(Limits(1001, 10000, 100)) == 50
    assert submit.max_elements(Limits(1001, 10000, 1)) == 1


def test_more_than_may_be_queued_is_told_before(ready: Workspace, program: Put) -> None:
    program("squeue", "exit 0")
    profile, queue = parse_profile(""), ask_queue(ready)
    assert submit.propose(ready, profile, queue, Limits(max_submit=19)).notes == []
    (note,) = submit.propose(ready, profile, queue, Limits(max_submit=18)).notes
    assert "you may have 18 jobs queued at once, and these are 19" in note


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
