"""What is asked for: time and memory after what Slurm says of earlier tries, and arrays within the cluster's limits.

Programs stand in for Slurm's: an out-of-memory kill cannot be had from a real one at will.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from cmrhpc import files
from cmrhpc.launch import records, submit
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.records import Record
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.status import status
from cmrhpc.launch.submissions import write_submission
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.launch.proposed import PROFILE, SENT, propose
from tests.outputs import write_output


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
