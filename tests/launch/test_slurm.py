"""What Slurm's commands print, as a real Slurm 24.11 printed it, and what becomes of a Slurm that does not answer."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace

import pytest

from cmrhpc import files
from cmrhpc.hashing import sha256_of
from cmrhpc.launch import slurm, submissions
from cmrhpc.launch.slurm import Element, Limits, Partition
from cmrhpc.launch.submissions import Submission, read_submissions, write_submission
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put

QUEUE = """\
13|PENDING|BeginTime||k.sbatch|(null)
12_0|PENDING|JobHeldUser||k.sbatch|(null)
1_0|CANCELLED|None|n1|j.sh|(null)
4|RUNNING|None|n[1-2]|j.sh|cmrhpc x|y
squeue: a word nobody asked for
"""

ACCOUNTING = """\
4|COMPLETED|0:0|n1|j
1_0|CANCELLED by 1000|0:15|n1|j
2_9|CANCELLED by 1000|0:0|None assigned|j
13|PREEMPTED|0:0|n[1-2]|j
13|NODE_FAIL|1:0|n2|j
7_3|OUT_OF_MEMORY|0:125|n1|j
8_5|FAILED|75:0|n1|j
8_5.batch|FAILED|75:0|n1|batch
8_5.extern|COMPLETED|0:0|n1|extern
8_5.0|FAILED|75:0|n1|0
10_2|FAILED|1:0|n1|j
10_2.batch|FAILED|1:0|n1|batch
10_2.0|OUT_OF_MEMORY|0:125|n1|0
11|FAILED|1:0|n1|j
11.0|OUT_OF_MEMORY|0:125|n1|0
11|RUNNING|0:0|n2|j
11.extern|RUNNING|0:0|n2|extern
14|COMPLETED|0:0|n1|j
14.0|OUT_OF_MEMORY|0:125|n1|0
9_[1-9%2]|PENDING|0:0|None assigned|j
13|PENDING|0:0|None assigned|j
"""


def test_queue_as_printed() -> None:
    assert slurm.parse_queue(QUEUE) == {
        "13": Element("PENDING", "BeginTime", name="k.sbatch"),
        "12_0": Element("PENDING", "JobHeldUser", name="k.sbatch"),
        "1_0": Element("CANCELLED", node="n1", name="j.sh"),
        "4": Element("RUNNING", node="n[1-2]", name="j.sh", comment="cmrhpc x|y"),
    }


STATES = ("FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "COMPLETED")


def test_accounting_as_printed() -> None:
    told = slurm.parse_accounting(ACCOUNTING)
    assert {element.name for element in told.values()} == {"j"}
    assert {key: replace(element, name="") for key, element in told.items()} == {
        **{f"9_{k}": Element("PENDING") for k in range(1, 10)},
        "4": Element("COMPLETED", node="n1"),
        "1_0": Element("CANCELLED", node="n1", by="1000", signal=15),
        "2_9": Element("CANCELLED", by="1000"),
        "13": Element("PENDING", before=("PREEMPTED", "NODE_FAIL")),
        "7_3": Element("OUT_OF_MEMORY", node="n1", signal=125),
        "8_5": Element("FAILED", node="n1", exit_code=75),
        "10_2": Element("OUT_OF_MEMORY", node="n1", exit_code=1),
        "11": Element("RUNNING", node="n2", before=("OUT_OF_MEMORY",)),
        "14": Element("COMPLETED", node="n1"),
    }


def test_accounting_without_a_line_for_each_element() -> None:
    """As Slurm before 23.02 prints it."""
    told = slurm.parse_accounting(
        "7_[1-2,9%2]|PENDING|0:0|None assigned|j\n7_1|RUNNING|0:0|n1|j\n"
        "8_[0-4:4]|CANCELLED by 5|0:0|None assigned|j|k\n"
        "9_[3,...]|PENDING|0:0|None assigned|j\n"
    )
    assert told == {
        "7_1": Element("RUNNING", node="n1", name="j"),
        "7_2": Element("PENDING", name="j"),
        "7_9": Element("PENDING", name="j"),
        "8_0": Element("CANCELLED", by="5", name="j|k"),
        "8_4": Element("CANCELLED", by="5", name="j|k"),
    }


def test_a_job_of_another_name_is_no_earlier_run() -> None:
    told = slurm.parse_accounting("7|PREEMPTED|0:0|n1|old\n7|NODE_FAIL|0:0|n1|new\n7|RUNNING|0:0|n1|new\n")
    assert told == {"7": Element("RUNNING", node="n1", name="new", before=("NODE_FAIL",))}


def test_of_a_federation_the_job_that_lives_counts() -> None:
    lines = ["7|RUNNING|None|n1|j|c", "7|CANCELLED|None||j|c"]
    for order in (lines, lines[::-1]):
        assert slurm.parse_queue("\n".join(order)) == {"7": Element("RUNNING", node="n1", name="j", comment="c")}
    assert not slurm.parse_queue("7|REVOKED|None||j|c")["7"].ended  # it runs on another cluster


def test_accounting_of_an_old_slurm_is_asked_for_again(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sacct knows no --array, and prints the elements of an array in one line, cut short unless told otherwise."""
    program(
        "sacct",
        "[[ $* != *--array* ]] || { echo \"sacct: unrecognized option '--array'\" >&2; exit 1; }\n"
        "[[ $* = *--clusters=far* ]] || exit 1\n"
        "[ $SLURM_BITSTR_LEN = 0 ] && echo '7_[0,2]|PENDING|0:0|None assigned|j'",
    )
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    assert slurm.accounting(["7"]) == {"7_0": Element("PENDING", name="j"), "7_2": Element("PENDING", name="j")}


def test_an_answer_needs_no_disk(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full /tmp the queue would look empty."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    program("squeue", "echo '1|RUNNING|None|n1|a|(null)'")
    assert slurm.queue() == {"1": Element("RUNNING", node="n1", name="a")}
    monkeypatch.delattr(os, "memfd_create")
    assert slurm.queue() is None


def test_a_step_out_of_memory_explains_a_failure_and_nothing_else() -> None:
    text = "".join(f"{job}|{state}|0:0|n1|j\n{job}.0|OUT_OF_MEMORY|0:125|n1|s\n" for job, state in enumerate(STATES, 1))
    assert [e.state for e in slurm.parse_accounting(text).values()] == ["OUT_OF_MEMORY", *STATES[1:]]


def test_partitions_as_printed() -> None:
    text = "gpu*|up|1-00:00:00|2|gpu:tesla:2(S:0)\ngpu*|up|1-00:00:00|3|gpu:a100:4\nold|down|infinite|1|(null)\n"
    assert slurm.parse_partitions(text) == [
        Partition("gpu", True, True, "1-00:00:00", 5, ("gpu:tesla:2", "gpu:a100:4")),
        Partition("old", False, False, "infinite", 1, ()),
    ]


def test_configuration_as_printed() -> None:
    text = """Configuration data as of 1795183589
AccountingStorageType   = accounting_storage/slurmdbd
AccountingStorageParameters = (null)
MaxArraySize            = 1001
SchedulerParameters     = sched_interval=1,bf_interval=1

Slurmctld(primary) at cmrnode is UP
"""
    told = slurm.parse_config(text)
    assert told == {
        "as of": "1795183589",
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageParameters": "(null)",
        "MaxArraySize": "1001",
        "SchedulerParameters": "sched_interval=1,bf_interval=1",
    }
    assert slurm.controller_time(told) == 1795183589.0
    assert slurm.controller_time({"as of": "2026-11-20T14:04:07"}) is None


def test_no_slurm_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.queue(["1"]) is slurm.accounting(["1"]) is slurm.partitions() is slurm.version() is None
    assert slurm.config() is None
    assert slurm.limits() == Limits()


@pytest.mark.timeout(120)
def test_slurm_that_hangs_is_left(program: Put) -> None:
    """Also when it ignores signals and its child holds the output open."""
    program("squeue", "trap '' TERM INT; sleep 1000 & echo 1\\|RUNNING; wait; sleep 1000")
    answer = slurm.ask(["squeue"], seconds=0.5)
    assert (answer.code, answer.err) == (None, "squeue did not answer within 0 s")


@pytest.mark.timeout(120)
def test_a_slow_slurm_may_be_given_more_time(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for told, seconds in (("", 10), ("60", 60), ("soon", 10), ("-1", 10), ("nan", 10)):
        monkeypatch.setenv("CMRHPC_SLURM_SECONDS", told)
        assert slurm.patience() == seconds
    program("squeue", "sleep 1000")
    for told, seconds in (("0.2", 0), ("1.2", 1)):
        monkeypatch.setenv("CMRHPC_SLURM_SECONDS", told)
        assert slurm.ask(["squeue"]).err == f"squeue did not answer within {seconds} s"
        assert slurm.queue() is None


def test_slurm_that_complains_is_none(program: Put) -> None:
    program("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert slurm.queue(["1"]) is slurm.queue() is None
    program("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert slurm.queue(["1"]) == {}
    program("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    assert slurm.accounting(["1"]) is None


def test_personal_settings_do_not_reach_the_commands(program: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SACCT_FORMAT", "jobid")
    program("squeue", "[ -z ${SQUEUE_FORMAT+x} ] && [ -z ${SACCT_FORMAT+x} ] && echo '1|RUNNING|None|n1|a|(null)'")
    assert slurm.queue() == {"1": Element("RUNNING", node="n1", name="a")}


def test_nothing_is_asked_of_no_jobs(program: Put) -> None:
    program("squeue", "exit 9")
    program("sacct", "exit 9")
    assert slurm.queue([]) == slurm.accounting([]) == {}


def test_submissions_are_read_as_written_and_damaged_ones_ignored(workspace: Workspace) -> None:
    assert read_submissions(workspace) == []
    newer = Submission("7", "synthesize", ((0, 1), (2,)), 20.0, "cl", "p", 3600, "8G", 1, ("3", "4"))
    older = Submission("12", "ingest", ((0,),), 10.0)
    for submission in (newer, older):
        write_submission(workspace, submission)
    whole = json.loads((submissions.folder(workspace) / "7.json").read_text())
    right = {name: value for name, value in whole.items() if name != "sha256"}
    wrong = [right | {"job": "9"}, right | {"stage": "x"}, right | {"elements": [1]}, [], "x"]
    wrong += [whole | {"job": "105", "gpus": 2}]  # its checksum does not hold
    for number, told in enumerate(wrong):
        (submissions.folder(workspace) / f"{100 + number}.json").write_text(json.dumps(told))
    (submissions.folder(workspace) / "8.json").write_text('{"job": "8"')
    (submissions.folder(workspace) / "note.txt").write_text("")
    assert read_submissions(workspace) == [older, newer]
    assert newer.key(1) == "7_1"


def test_what_a_newer_version_adds_to_a_submission_is_left_out(workspace: Workspace) -> None:
    told = Submission("7", "ingest", ((0,),), 10.0)
    more = {"job": "7", "stage": "ingest", "elements": [[0]], "time": 10.0, "depends_on": [], "more": 1}
    for checked in (more, more | {"sha256": sha256_of(more)}):
        files.atomic_write(submissions.folder(workspace) / "7.json", json.dumps(checked))
        assert read_submissions(workspace) == [told]
