"""What is done, running, waiting and failed: in words, with the log to read, and the GPU-hours that are left.

Shards say what is done. Of the rest Slurm is asked first, within a time limit, then the tasks' own records; so it holds
when accounting is off, when Slurm has forgotten a job, and when whoever submitted is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cmrhpc import validity
from cmrhpc.launch import reasons, records, slurm
from cmrhpc.launch.estimate import kind, mean_seconds
from cmrhpc.launch.records import Record
from cmrhpc.launch.slurm import Element
from cmrhpc.launch.submissions import Submission, read_submissions
from cmrhpc.validity import State
from cmrhpc.workspace import Entry, Workspace

RUNNING, WAITING, FAILED = "running", "waiting", "failed"
KEPT = "; its checkpoint is kept"
NOT_STARTED = "not started"


@dataclass(frozen=True)
class TaskStatus:
    """One task that is not done. word: running, waiting or failed. queued: whether Slurm has it, waiting."""

    state: State
    word: str
    reason: str
    log: str = ""  # empty where there is none yet
    job: str = ""  # as squeue calls it, empty where unknown
    queued: bool = False


@dataclass
class StageStatus:
    """Counts of one stage and its unfinished tasks. gpu_hours: left, None where nothing is known to estimate it from.

    source: what it is from, in words.
    """

    total: int = 0
    done: int = 0
    tasks: list[TaskStatus] = field(default_factory=list)
    gpu_hours: float | None = None
    source: str = ""

    @property
    def missing(self) -> int:
        return self.total - self.done

    def count(self, word: str) -> int:
        return sum(task.word == word for task in self.tasks)


@dataclass
class Status:
    """All stages. slurm: empty, or what could not be learnt from Slurm and why. accounting: None where not asked."""

    stages: dict[str, StageStatus]
    slurm: str = ""
    accounting: bool | None = None

    @property
    def active(self) -> bool:
        """Whether anything runs or waits in a queue, so that looking again makes sense."""
        return any(task.word == RUNNING or task.queued for row in self.stages.values() for task in row.tasks)


def status(workspace: Workspace) -> Status:
    """State of every stage. Asks Slurm at most twice and accounting once."""
    own = slurm.queue()  # before the shards: what ends meanwhile is then seen as done
    states = validity.states(workspace, freeze=False)
    index = workspace.index()
    jobs = _Jobs(workspace, own)
    jobs.look(states, index)
    if jobs.just_ended(states):
        states, index = validity.states(workspace, freeze=False), workspace.index()
    found = {}
    for stage, some in states.items():
        row = StageStatus(len(some), sum(state.done for state in some))
        row.tasks = [jobs.judge(state) for state in some if not state.done]
        jobs.estimate(stage, row, mean_seconds(some, index))
        found[stage] = row
    return Status(found, jobs.trouble, jobs.accounting)


class _Jobs:
    """What Slurm and the records say of the tasks that are not done."""

    def __init__(self, workspace: Workspace, own: dict[str, Element] | None):
        self.workspace = workspace
        self.own = own
        self.elements: dict[str, Element] = {}
        self.submissions = read_submissions(workspace)
        self.records: dict[tuple[str, int], Record] = {}
        self.logs: set[str] = set()
        self.by_task: dict[tuple[str, int], list[tuple[Submission, int]]] = {}
        # stage -> arrays submitted by plain sbatch -> what is to be added to an element for the index of its task
        self.arrays: dict[str, dict[str, int]] = {}
        self.trouble = ""
        self.accounting: bool | None = None
        # Of plain sbatch arrays that have written nothing yet the queue shows the name (the stage) and the element.
        self.named = {
            (element.name, key.partition("_")[2]): (key, element)
            for key, element in sorted((own or {}).items(), key=lambda item: _job_number(item[0]))
            if element.state != "COMPLETED"
        }
        for submission in self.submissions:
            for element, indices in enumerate(submission.elements):
                for index in indices:
                    self.by_task.setdefault((submission.stage, index), []).append((submission, element))

    def look(self, states: dict[str, list[State]], index: dict[str, Entry]) -> None:
        """Read the records of unfinished tasks, and ask Slurm about every job that may be theirs."""
        with contextlib.suppress(OSError):
            self.logs = set(os.listdir(self.workspace.root / "logs"))
        known = {submission.job for submission in self.submissions}
        jobs: set[str] = set()
        for stage, some in states.items():
            here = self.arrays.setdefault(stage, {})
            for state in some:
                if state.done:
                    key = index[state.task.output].job if state.task.output in index else ""
                    _add_array(here, key, state.index)
                    continue
                path = records.record_path(self.workspace, stage, state.index)
                record = records.read_record(path) if path.name in self.logs else None
                if record:
                    self.records[stage, state.index] = record
                    jobs.add(record.job)
                    _add_array(here, record.key, state.index)
                jobs.update(submission.job for submission, _ in self.by_task.get((stage, state.index), ()))
            self.arrays[stage] = {job: offset for job, offset in here.items() if job not in known}
            if not all(state.done for state in some):
                jobs |= self.arrays[stage].keys()
        self._ask(jobs - {""})

    def _ask(self, jobs: set[str]) -> None:
        if self.own is None:
            if jobs:
                why = "does not answer" if slurm.installed() else "is not installed here"
                self.trouble = f"Slurm {why}: of its jobs the tasks' own records tell, which may be out of date"
            if jobs and slurm.installed() and (told := slurm.accounting(jobs)) is not None:
                self.accounting = True  # it knows what has ended without the controller
                self.elements = {key: element for key, element in told.items() if element.ended}
            return
        self.elements = dict(self.own)
        answered = {key.partition("_")[0] for key in self.own}
        if rest := jobs - answered:
            self.elements.update(slurm.queue(rest) or {})
        told = slurm.accounting(jobs)
        self.accounting = told is not None if jobs else None
        for key, element in (told or {}).items():
            now = self.elements.get(key)
            self.elements[key] = element if now is None else _merged(now, element)

    @cached_property
    def live_jobs(self) -> set[str]:
        """Jobs of which something has not ended."""
        return {key.partition("_")[0] for key, element in self.elements.items() if not element.ended}

    def just_ended(self, states: dict[str, list[State]]) -> bool:
        """Whether a job of an unfinished task has ended well, so that its shard came while we asked."""
        unfinished = [state for some in states.values() for state in some if not state.done]
        return any(e.state == "COMPLETED" for state in unfinished for _, e, _ in self.candidates(state))

    def candidates(self, state: State) -> list[tuple[str, Element, Submission | None]]:
        """Elements that may run a task, the newest last."""
        stage, index = state.task.stage, state.index
        arrays = self.arrays.get(stage, {})
        found: dict[str, Submission | None] = {f"{job}_{index - offset}": None for job, offset in arrays.items()}
        record = self.records.get((stage, index))
        if record and record.key:
            found[record.key] = None
        for submission, element in self.by_task.get((stage, index), ()):
            key = submission.key(element)
            if key not in self.elements or submission.find(element, self.elements):
                found[key] = submission
        listed = sorted((key for key in found if key in self.elements), key=_job_number)
        return [(key, self.elements[key], found[key]) for key in listed]

    def judge(self, state: State) -> TaskStatus:
        """One unfinished task, from the newest that is known of it."""
        stage, index = state.task.stage, state.index
        record = self.records.get((stage, index))
        path = self.workspace.log_path(stage, index)
        log = str(path) if path.name in self.logs else ""
        if record and not record.key and record.state == records.RUNNING and record.alive():
            return TaskStatus(state, RUNNING, f"on {record.host}", log)
        candidates = self.candidates(state)
        alive = [item for item in candidates if not item[1].ended]
        if alive:
            key, element, submission = alive[-1]
            return self._alive(state, record, log, key, element, submission)
        if candidates and not (record and _newer(record, candidates[-1][0], candidates[-1][2])):
            key, element, submission = candidates[-1]
            log = log or self._slurms_log(submission, key)
            return self._ended(state, record if record and record.key == key else None, log, key, element)
        submitted = self.by_task.get((stage, index))
        last = submitted[-1][0] if submitted and not candidates else None
        if last and not (record and record.time > last.time):
            if self.own is None:
                # Where there is no Slurm to ask, no later look will tell more.
                queued = slurm.installed()
                return TaskStatus(state, WAITING, f"submitted as job {last.job}", log, last.job, queued)
            reason = "its job left the queue and the task left no record: cancelled, failed, or its node was lost"
            return TaskStatus(state, FAILED, reason, log, last.job)
        return self._recorded(state, record, log) if record else self._unknown(state, log)

    def _alive(
        self, state: State, record: Record | None, log: str, key: str, element: Element, submission: Submission | None
    ) -> TaskStatus:
        """Its element runs or waits in the queue."""
        mine = record if record and record.key == key else None
        if reasons.never_starts(element):
            return TaskStatus(state, FAILED, reasons.why_waiting(element), log, key)
        if not element.waits:
            if mine and mine.state == records.FAILED:
                return TaskStatus(state, FAILED, _first_line(mine.reason), log, key)
            where = f"on {element.node}" if element.node else ""
            if mine is None or mine.state != records.RUNNING:
                where = f"starting {where}"
            word = "" if element.state == "RUNNING" else f" ({element.state.lower()})"
            return TaskStatus(state, RUNNING, f"{where.strip()}{word}", log, key)
        after = tuple(job for job in submission.depends_on if job in self.live_jobs) if submission else ()
        reason = reasons.why_waiting(element, after)
        back = reasons.how_requeued(element.before)
        if mine and mine.state == records.STOPPED:
            back = f"checkpointed, {back}" if back else "checkpointed and requeued"
        elif mine and mine.state == records.RUNNING and not back:
            back = "requeued by Slurm (preempted, or its node failed)"
        return TaskStatus(state, WAITING, f"{back}; {reason}" if back else reason, log, key, queued=True)

    def _slurms_log(self, submission: Submission | None, key: str) -> str:
        """What a job said that ended before its task began: its environment, its image, its node."""
        if submission is None:
            return ""
        path = self.workspace.root / "submissions" / "submitit" / submission.name / f"{key}_0_log.out"
        return str(path) if path.is_file() else ""

    def _ended(self, state: State, record: Record | None, log: str, key: str, element: Element) -> TaskStatus:
        """Its newest element has ended, and the shard is not there."""
        if element.state == "COMPLETED" or (record and record.state == records.DONE):
            return TaskStatus(state, WAITING, _not_started(state), log)
        # Beside it in the same job another may have run out of time. What ran out of memory often cannot say so.
        if record and record.state == records.FAILED and element.state != "OUT_OF_MEMORY":
            return TaskStatus(state, FAILED, _first_line(record.reason), log, key)
        stopped = record and record.state == records.STOPPED
        if stopped and element.state == "FAILED":  # by its own exit code 75
            return TaskStatus(state, WAITING, "checkpointed, not requeued: submit again", log, key)
        return TaskStatus(state, FAILED, f"{reasons.how_ended(element)}{KEPT if stopped else ''}", log, key)

    def _recorded(self, state: State, record: Record, log: str) -> TaskStatus:
        """Only its record is known: run without Slurm, or Slurm has forgotten its job or does not answer."""
        if record.state == records.FAILED:
            return TaskStatus(state, FAILED, _first_line(record.reason), log, record.key)
        if record.state == records.STOPPED:
            return TaskStatus(state, WAITING, "checkpointed: run or submit it again", log)
        if record.state == records.DONE:
            return TaskStatus(state, WAITING, _not_started(state), log)
        if record.key and self.own is not None:
            reason = "its job has left the queue: killed, cancelled, out of time, or its node was lost"
            return TaskStatus(state, FAILED, reason, log, record.key)
        if record.alive():
            return TaskStatus(state, RUNNING, f"on {record.host}", log, record.key)
        return TaskStatus(state, FAILED, "its process ended without a word (killed?)", log, record.key)

    def _unknown(self, state: State, log: str) -> TaskStatus:
        """Nothing is known of it; a job of this user that is named after the stage may be its own."""
        if maybe := self.named.get((state.task.stage, str(state.index))):
            job, element = maybe
            if element.ended:
                reason = f"{NOT_STARTED}; job {job} of this name may have been its own: {reasons.how_ended(element)}"
            else:
                reason = f"perhaps in job {job}: {reasons.why_waiting(element) if element.waits else 'it starts'}"
            return TaskStatus(state, WAITING, reason, log, job, queued=not element.ended)
        return TaskStatus(state, WAITING, "waits for its inputs" if state.waits_for else _not_started(state), log)

    def estimate(self, stage: str, row: StageStatus, took: Mapping[str, float]) -> None:
        """GPU-hours of what is missing: as done tasks of its kind, else of its stage, took, else from time limits."""
        if stage in ("ingest", "aggregate") or not row.missing:
            row.gpu_hours = 0.0
            return
        last = next((s for s in reversed(self.submissions) if s.stage == stage), None)
        share = last.gpus / max(map(len, last.elements)) if last and any(last.elements) else 1.0
        if took:
            mean = sum(took.values()) / len(took)
            each = (took.get(kind(task.state.task), mean) - self._spent(task) for task in row.tasks)
            row.gpu_hours = share * sum(max(0.0, seconds) for seconds in each) / 3600
            row.source = f"as {row.done} done tasks took"
        elif last and last.time_limit_s:
            row.gpu_hours = share * row.missing * last.time_limit_s / 3600
            row.source = "at most, from the time limit"

    def _spent(self, task: TaskStatus) -> float:
        """Seconds that a running task has run."""
        record = self.records.get((task.state.task.stage, task.state.index))
        return max(0.0, time.time() - record.time) if record and task.word == RUNNING else 0.0


def _merged(queued: Element, accounted: Element) -> Element:
    """The queue knows the present, accounting the past: who cancelled, how it ended, earlier runs.

    Of another name, it is a job of the same number before that.
    """
    if accounted.name != queued.name:
        return queued
    if queued.ended:
        same = accounted.state in (queued.state, "OUT_OF_MEMORY")  # of a step, which the queue does not show
        return replace(accounted, reason=queued.reason) if same else queued
    late = (accounted.state,) if accounted.ended else ()
    return replace(queued, before=accounted.before + late)


def _newer(record: Record, key: str, submission: Submission | None) -> bool:
    """Whether a record is of a later try than an element."""
    if record.job:
        return record.key != key and _job_number(record.job) > _job_number(key)
    return record.time > (submission.time if submission else 0.0)


def _job_number(key: str) -> int:
    number = key.partition("_")[0]
    return int(number) if number.isdigit() else 0


def _add_array(arrays: dict[str, int], key: str, index: int) -> None:
    """Note the array of a task that is known to be its element."""
    job, sign, element = key.partition("_")
    if sign and element.isdigit():
        arrays[job] = index - int(element)


def _not_started(state: State) -> str:
    return NOT_STARTED if state.reason == "missing" else f"{NOT_STARTED}: {state.reason}"


def _first_line(text: str) -> str:
    return (text.splitlines() or ["it failed without a word"])[0]
