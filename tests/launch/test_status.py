"""Every state in words: from a record, from what squeue and sacct say, and from both."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmrhpc import files
from cmrhpc.errors import UsageError
from cmrhpc.launch import records, show
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.records import Record
from cmrhpc.launch.show import as_json, as_text, watch
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.status import TaskStatus, status
from cmrhpc.launch.submissions import Submission, write_submission
from cmrhpc.launch.submit import propose
from cmrhpc.planning import COHORT, FOLDS, Task
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put
from tests.outputs import write_output

STAGE = "synthesize"
FAR = Record(records.RUNNING, "", "far_away", 17, "1", time.time(), "40", "1")  # as element 1 of array 40
HERE = Record(records.RUNNING, "", files.host_name(), os.getpid(), files.process_start(), time.time())
OFF = "echo Slurm accounting storage is disabled >&2; exit 1"


def note(workspace: Workspace, record: Record, index: int = 1) -> None:
    path = records.record_path(workspace, STAGE, index)
    files.atomic_write(path, json.dumps(asdict(record)))
    path.with_suffix(".log").write_text("")


def judged(workspace: Workspace, index: int = 1) -> TaskStatus:
    return next(task for task in status(workspace).stages[STAGE].tasks if task.state.index == index)


SUBMITTED = Submission(
    "40", STAGE, ((0,), (1,), (2, 3)), time.time() - 50, time_limit_s=7200, gpus=1, depends_on=("38", "39")
)


@pytest.mark.parametrize(
    ("state", "queue", "sacct", "expected"),
    [
        # In the queue.
        ("", "PENDING|Priority|", "PENDING|0:0|", ("waiting", "waits in the queue: other jobs go first (Priority)")),
        ("", "PENDING|Resources|", "", ("waiting", "waits in the queue: no free resources (Resources)")),
        ("", "PENDING|Dependency|", "", ("waiting", "waits for another job, 39 (Dependency)")),
        ("", "PENDING|AssocGrpGRES|", "", ("waiting", "a limit of the user, account or quality of service")),
        ("", "PENDING|SomethingNew|", "", ("waiting", "waits in the queue (SomethingNew)")),
        ("", "PENDING|DependencyNeverSatisfied|", "", ("failed", "never starts, a job it waits for failed")),
        # Back in the queue.
        ("stopped", "PENDING|BeginTime|", "", ("waiting", "checkpointed and requeued; waits in the queue")),
        (
            "stopped",
            "PENDING|Priority|",
            "PREEMPTED|0:0|n1",
            ("waiting", "checkpointed, preempted by another job and req"),
        ),
        ("running", "PENDING|BeginTime|", "", ("waiting", "requeued by Slurm (preempted, or its node failed)")),
        ("running", "PENDING|BeginTime|", "NODE_FAIL|1:0|n1", ("waiting", "its node failed, requeued; waits")),
        # Running.
        ("running", "RUNNING|None|n1", "", ("running", "on n1")),
        ("", "RUNNING|None|n1", "", ("running", "starting on n1")),
        ("stopped", "RUNNING|None|n2", "", ("running", "starting on n2")),
        ("running", "COMPLETING|None|n1", "", ("running", "on n1 (completing)")),
        ("failed", "RUNNING|None|n1", "", ("failed", "the reason of the record")),
        # Ended, as the queue or accounting or both remember.
        ("running", "CANCELLED|None|n1", "CANCELLED by 0|0:15|n1", ("failed", "cancelled by user root")),
        ("running", "CANCELLED|None|n1", "", ("failed", "cancelled")),
        ("", "", "CANCELLED by 4294967|0:0|", ("failed", "cancelled by user 4294967")),
        ("stopped", "", "CANCELLED by 0|0:15|n1", ("failed", "cancelled by user root; its checkpoint is kept")),
        ("", "CANCELLED|DependencyNeverSatisfied|", "", ("failed", "cancelled by Slurm: a job it waited for failed")),
        ("running", "", "OUT_OF_MEMORY|0:125|n1", ("failed", "out of memory: submit again with more")),
        ("running", "TIMEOUT|None|n1", "TIMEOUT|0:0|n1", ("failed", "out of time: its job reached its time limit")),
        ("stopped", "", "TIMEOUT|0:0|n1", ("failed", "reached its time limit; its checkpoint is kept")),
        ("running", "", "NODE_FAIL|1:0|n1", ("failed", "its node failed")),
        ("running", "", "FAILED|0:9|n1", ("failed", "its process was ended by SIGKILL (killed, or out of memory)")),
        ("running", "", "FAILED|9:0|n1", ("failed", "its process was ended by SIGKILL (killed, or out of memory)")),
        ("running", "", "FAILED|11:0|n1", ("failed", "its process was ended by SIGSEGV")),
        ("running", "", "FAILED|4:0|n1", ("failed", "its job failed with exit code 4")),
        ("running", "", "FAILED|137:0|n1", ("failed", "its process was ended by SIGKILL (killed, or out of memory)")),
        ("", "", "FAILED|255:0|n1", ("failed", "its job failed with exit code 255")),
        ("failed", "FAILED|None|n1", "", ("failed", "the reason of the record")),
        ("failed", "", "OUT_OF_MEMORY|0:125|n1", ("failed", "out of memory")),
        ("failed", "TIMEOUT|None|n1", "TIMEOUT|0:0|n1", ("failed", "the reason of the record")),  # a sibling's time
        ("stopped", "", "FAILED|75:0|n1", ("waiting", "checkpointed, not requeued: submit again")),
        ("done", "COMPLETED|None|n1", "", ("waiting", "not started")),
        # Forgotten by Slurm, which answers.
        ("running", "", "", ("failed", "its job has left the queue: killed, cancelled, out of time")),
        ("stopped", "", "", ("waiting", "checkpointed: run or submit it again")),
        ("failed", "", "", ("failed", "the reason of the record")),
        ("", "", "", ("failed", "its job left the queue and the task left no record")),
    ],
)
def test_states(
    workspace: Workspace, program: Put, state: str, queue: str, sacct: str, expected: tuple[str, str]
) -> None:
    write_submission(workspace, SUBMITTED)
    if state:
        note(workspace, replace(FAR, state=state, reason="the reason of the record\nand more"))
    others = "echo '38|COMPLETED|None|n1|x|(null)'; echo '39_0|RUNNING|None|n1|x|(null)'"
    program("squeue", f"{others}; echo '40_1|{queue}|cmrhpc|(null)'" if queue else "exit 0")
    # Where accounting says nothing, it may as well be off.
    for accounting in [f"echo '40_1|{sacct}|cmrhpc'"] if sacct else ["exit 0", OFF]:
        program("sacct", accounting)
        found = judged(workspace)
        assert found.word == expected[0]
        assert expected[1] in found.reason
        assert "and more" not in found.reason
        assert found.log == (str(workspace.log_path(STAGE, 1)) if state else "")


def test_slurm_that_does_not_answer(workspace: Workspace, program: Put) -> None:
    program("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    program("sacct", OFF)
    write_submission(workspace, replace(SUBMITTED, time=time.time() - 3 * files.DAY))
    note(workspace, FAR)
    note(workspace, replace(FAR, time=time.time() - 2 * files.DAY, element="0"), 0)
    found = status(workspace)
    assert "Slurm does not answer" in found.slurm
    assert [(t.word, t.reason) for t in found.stages[STAGE].tasks] == [
        ("failed", "its process ended without a word (killed?)"),
        ("running", "on far_away"),
        ("waiting", "submitted as job 40"),
        ("waiting", "submitted as job 40"),
    ]


def test_accounting_answers_when_the_controller_does_not(workspace: Workspace, program: Put) -> None:
    program("squeue", "exit 1")
    program("sacct", "echo '40_1|RUNNING|0:0|n1|x'; echo '40_0|CANCELLED by 0|0:15|n1|x'")
    write_submission(workspace, SUBMITTED)
    note(workspace, FAR)
    found = status(workspace)
    assert found.slurm.startswith("Slurm does not answer")
    assert [t.reason for t in found.stages[STAGE].tasks[:2]] == ["cancelled by user root", "on far_away"]


def test_without_slurm_the_process_is_asked(workspace: Workspace) -> None:
    note(workspace, HERE)
    note(workspace, replace(HERE, pid=2**30), 0)
    found = status(workspace)
    assert found.slurm == ""
    assert [(t.word, t.reason) for t in found.stages[STAGE].tasks][:3] == [
        ("failed", "its process ended without a word (killed?)"),
        ("running", f"on {files.host_name()}"),
        ("waiting", "waits for its inputs"),
    ]


def test_plain_arrays_are_known_by_their_records(workspace: Workspace, program: Put) -> None:
    """Tasks 0 and 2 of the same array have no record yet."""
    note(workspace, FAR)
    program("squeue", "printf '40_%s|PENDING|Resources||x|(null)\\n' 0 2; echo '40_1|RUNNING|None|n2|x|(null)'")
    program("sacct", OFF)
    assert [(t.word, t.job) for t in status(workspace).stages[STAGE].tasks] == [
        ("waiting", "40_0"),
        ("running", "40_1"),
        ("waiting", "40_2"),
        ("waiting", ""),
    ]


def test_plain_arrays_with_an_offset(workspace: Workspace, program: Put) -> None:
    note(workspace, replace(FAR, element="0"), index=2)
    program("squeue", "echo '40_1|PENDING|Resources||x|(null)'; echo '40_0|RUNNING|None|n2|x|(null)'")
    program("sacct", OFF)
    assert [t.job for t in status(workspace).stages[STAGE].tasks] == ["", "", "40_0", "40_1"]


def test_array_that_has_not_begun_is_guessed_by_its_name(workspace: Workspace, program: Put) -> None:
    program("squeue", f"echo '40_3|PENDING|Resources||{STAGE}|(null)'")
    assert "perhaps in job 40_3: waits in the queue: no free" in judged(workspace, 3).reason
    assert "perhaps" not in judged(workspace, 2).reason
    program("squeue", f"echo '41_3|FAILED|None|n1|{STAGE}|(null)'; echo '40_3|PENDING|Resources||{STAGE}|(null)'")
    found = judged(workspace, 3)
    assert found.reason == "not started; job 41_3 of this name may have been its own: its job failed"
    assert not found.queued


def test_several_tasks_of_one_element(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, SUBMITTED)
    program("squeue", "echo '40_2|RUNNING|None|n1|x|(null)'")
    program("sacct", "exit 0")
    assert [(judged(workspace, index).word, judged(workspace, index).job) for index in (2, 3)] == [
        ("running", "40_2")
    ] * 2


def test_array_of_one_without_a_number(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, Submission("41", STAGE, ((1,),), time.time()))
    program("squeue", "echo '41|RUNNING|None|n1|x|(null)'")
    program("sacct", "exit 0")
    assert judged(workspace).job == "41"


def test_a_number_that_came_back_is_somebody_elses(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, replace(SUBMITTED, name="synthesize-aa"))
    program("sacct", OFF)
    for name, word in (("synthesize-aa", "running"), ("somebody-elses", "failed")):
        program("squeue", f"echo '40_1|RUNNING|None|n3|{name}|(null)'")
        assert judged(workspace).word == word


@pytest.mark.parametrize(
    ("queue", "word", "reason"),
    [
        (
            "exit 0",
            "failed",
            "its job left the queue and the task left no record: cancelled, failed, or its node was lost",
        ),
        (
            "echo '40_1|PENDING|Priority||synthesize-aa|(null)'",
            "waiting",
            "waits in the queue: other jobs go first (Priority)",
        ),
    ],
)
def test_what_accounting_has_of_another_job_of_that_number_is_not_believed(
    workspace: Workspace, program: Put, queue: str, word: str, reason: str
) -> None:
    write_submission(workspace, replace(SUBMITTED, name="synthesize-aa"))
    program("squeue", queue)
    program("sacct", "echo '40_1|CANCELLED by 0|0:0|n1|somebody-elses'")
    found = judged(workspace)
    assert (found.word, found.reason) == (word, reason)


def test_a_job_that_ended_before_its_task_began_shows_what_slurm_wrote(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, replace(SUBMITTED, name="synthesize-aa"))
    program("squeue", "echo '40_1|FAILED|NonZeroExitCode|n1|synthesize-aa|(null)'")
    program("sacct", "echo '40_1|FAILED|127:0|n1|synthesize-aa'")
    assert judged(workspace).log == ""
    said = workspace.root / "submissions/submitit/synthesize-aa/40_1_0_log.out"
    said.parent.mkdir(parents=True)
    said.write_text("no such module: cuda\n")
    assert judged(workspace).log == str(said)


@pytest.mark.parametrize(
    ("newer", "expected"),
    [
        ("echo '50_1|PENDING|Priority||x|(null)'", ("waiting", "50_1")),
        ("echo '50_1|CANCELLED|None||x|(null)'", ("failed", "50_1")),
        ("echo '50_1|PENDING|Priority||x|(null)'; echo '40_1|RUNNING|None|n1|x|(null)'", ("waiting", "50_1")),
        ("echo '40_1|RUNNING|None|n1|x|(null)'; echo '50_1|CANCELLED|None||x|(null)'", ("running", "40_1")),
    ],
)
def test_the_newest_try_counts_and_one_that_lives_first(
    workspace: Workspace, program: Put, newer: str, expected: tuple[str, str]
) -> None:
    write_submission(workspace, SUBMITTED)
    write_submission(workspace, replace(SUBMITTED, job="50", time=SUBMITTED.time + 10))
    note(workspace, replace(FAR, state="failed", reason="before") if "40_1|RUNNING" not in newer else FAR)
    program("squeue", newer)
    program("sacct", OFF)
    assert (judged(workspace).word, judged(workspace).job) == expected


def test_a_later_run_by_hand_counts(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, SUBMITTED)
    program("squeue", "echo '40_1|CANCELLED|None|n1|x|(null)'")
    program("sacct", OFF)
    note(workspace, replace(HERE, state="failed", reason="by hand"))
    assert judged(workspace).reason == "by hand"
    note(workspace, HERE)
    assert judged(workspace).word == "running"


def test_json_and_text_agree(workspace: Workspace, program: Put) -> None:
    write_submission(workspace, SUBMITTED)
    note(workspace, replace(FAR, state="failed", reason="a word"))
    program("squeue", "printf '40_%s|PENDING|Priority||x|(null)\\n' 0 2")
    program("sacct", OFF)
    found = status(workspace)
    told = as_json(found)
    counts = told["stages"][STAGE]
    assert (counts["total"], counts["done"], counts["missing"]) == (4, 0, 4)
    assert (counts["running"], counts["waiting"], counts["failed"]) == (0, 3, 1)
    # Two hours for each, two of them on one GPU.
    assert (counts["gpu_hours_left"], counts["gpu_hours_from"]) == (4.0, "at most, from the time limit")
    assert told["stages"]["refine"]["gpu_hours_left"] is None
    assert told["accounting"] is False
    log = workspace.log_path(STAGE, 1)
    assert as_text(found).splitlines()[:3] == [
        "stage        total   done  running  waiting  failed  GPU-hours left",
        "ingest           1      0        0        1       0               0",
        "synthesize       4      0        0        3       1             4.0  at most, from the time limit",
    ]
    assert f"failed   dae-gan fold 0 repeat 0 class 1 (job 40_1): a word: {log}" in as_text(found)
    words = "waiting  dae-gan fold 0 repeat 0 class 0 and 2 more of synthesize: waits in the queue: other jobs go first"
    assert f"{words} (Priority)" in as_text(found)


def test_hours_left_are_those_of_the_same_network_as_submit_expects_them(
    tmp_path: Path, study_text: str, program: Put
) -> None:
    program("squeue", "exit 0")
    program("sacct", OFF)
    text = study_text.replace("[classifiers.resnet50]", "[classifiers.xception]\nsteps = 3\n[classifiers.resnet50]")
    (tmp_path / "study.toml").write_text(text)
    workspace = Workspace(tmp_path)
    for name in (COHORT, FOLDS):
        write_output(workspace, Task("ingest"), name)
    tasks = workspace.tasks("classify")
    for classifier, seconds in (("resnet50", 3600.0), ("xception", 7200.0)):
        task = next(task for task in tasks if task.classifier == classifier)
        write_output(workspace, task, task.output, seconds=seconds)
    row = status(workspace).stages["classify"]
    assert row.total == 20
    assert row.gpu_hours == 9 * 1 + 9 * 2
    profile = parse_profile("")
    assert propose(workspace, profile, ask_queue(workspace), Limits()).expected["classify"].gpu_hours == 27


def test_watch_ends_when_nothing_runs_or_waits_in_the_queue(
    workspace: Workspace, program: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_submission(workspace, SUBMITTED)
    left = tmp_path / "left"
    left.write_text("xxx")
    program("squeue", f"[ -s {left} ] && echo '40_1|RUNNING|None|n1|x|(null)'; sed -i s/.// {left}; exit 0")
    program("sacct", OFF)
    assert watch(str(workspace.root), seconds=0) == 0
    said = capsys.readouterr().out
    assert said.count("running  dae-gan fold 0 repeat 0 class 1 (job 40_1): starting on n1") == 1
    assert "failed   dae-gan fold 0 repeat 0 class 0 and 3 more of synthesize: its job left the queue" in said


@pytest.mark.parametrize(("path", "seconds"), [("", 30.0), ("/nowhere", 5.0)])
def test_watch_asks_slurm_twice_a_minute_at_most(
    workspace: Workspace, program: Put, monkeypatch: pytest.MonkeyPatch, path: str, seconds: float
) -> None:
    program("squeue", "exit 0")
    program("sacct", OFF)
    if path:
        monkeypatch.setenv("PATH", path)
    slept: list[float] = []
    monkeypatch.setattr(show, "time", SimpleNamespace(sleep=slept.append))
    assert watch(str(workspace.root)) == 0
    assert slept == [seconds]


def test_what_has_not_begun_has_a_line_too(workspace: Workspace) -> None:
    assert "waiting  ingest: not started" in as_text(status(workspace)).splitlines()


def test_watch_ends_where_there_is_no_slurm_to_ask(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was submitted from elsewhere may wait or run there; no later look here would tell."""
    write_submission(workspace, SUBMITTED)
    monkeypatch.setenv("PATH", "/nowhere")
    assert watch(str(workspace.root), seconds=0) == 0
    said = capsys.readouterr().out
    assert "submitted as job 40" in said
    assert "Slurm is not installed here" in said


def test_watch_is_left_with_ctrl_c(workspace: Workspace) -> None:
    note(workspace, HERE)
    command = [sys.executable, "-m", "cmrhpc.cli", "status", str(workspace.root), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("stage")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        said = process.stderr.read()
        assert said.startswith("interrupted")
        assert len(said.splitlines()) == 1


def test_watch_on_a_terminal_draws_over_what_it_drew(workspace: Workspace) -> None:
    """Within the screen and without clearing it first, so that nothing scrolls or flickers."""
    note(workspace, HERE)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 6, 50, 0, 0))
    command = [sys.executable, "-m", "cmrhpc.cli", "status", str(workspace.root), "--watch"]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = ""
        while "\033[J" not in said:
            said += os.read(ours, 10000).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(ours)
    frame = said.partition("\033[J")[0].removeprefix("\033[H").split("\033[K\r\n")[:-1]
    assert [line.split(" ")[0] for line in frame[:4]] == ["stage", "ingest", "synthesize", "refine"]
    assert len(frame) == 5
    assert re.fullmatch(r"\d\d:\d\d:\d\d", frame[4])
    assert all(len(line) < 50 for line in frame)


def test_watch_and_json_do_not_go_together(workspace: Workspace) -> None:
    from cmrhpc.cli import main, parser

    assert main(["status", str(workspace.root), "--watch", "--json"]) == UsageError.exit_code
    assert parser().parse_args(["status", "x", "--watch"]).watch


def test_a_reason_gives_the_terminal_no_commands(workspace: Workspace) -> None:
    reason = "\x1b]0;pwned\x07 out\r of \x9b2J\u202e memory é"
    note(workspace, Record(records.FAILED, reason.partition("\r")[0], files.host_name(), 17, "1", time.time()))
    note(workspace, Record(records.RUNNING, "", f"{reason}\ndone", 17, "1", time.time()), 2)
    text = as_text(status(workspace))
    assert r"\x1b]0;pwned\x07 out" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text.splitlines()) == len(text.split("\n"))
    assert "é" in text


def test_a_record_of_another_host_is_believed_for_a_day_whatever_its_clock_says(workspace: Workspace) -> None:
    for hours, alive in ((-25, False), (-1, True), (1, True), (25, False)):
        assert replace(FAR, job="", element="", time=time.time() + hours * 3600).alive() is alive
