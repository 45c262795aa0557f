"""What Slurm has of a workspace: which tasks wait or run, and what cannot be told.

Truth is what the queue says; the records of `submissions/` and of tasks only tell which job holds which task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmrhpc import files
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.launch import claim, slurm
from cmrhpc.launch.reasons import user_name
from cmrhpc.launch.records import DONE, FAILED, RUNNING, STOPPED, Record, read_record, read_records, record_path
from cmrhpc.launch.send import asked_path, comment
from cmrhpc.launch.submissions import Submission, owner, path_of, read_one, read_submissions, write_submission
from cmrhpc.planning import STAGES
from cmrhpc.validity import State
from cmrhpc.workspace import Workspace


@dataclass
class Queue:
    """What Slurm says of this workspace.

    elements: those that have a record in `submissions`. tasks: (stage, index) -> job that holds it, waiting or running.
    doubtful: jobs that have a stage's name, as those of plain sbatch have, and of which nothing tells for which
    workspace they are.
    """

    submissions: list[Submission]
    elements: dict[str, slurm.Element]
    tasks: dict[tuple[str, int], str]
    doubtful: tuple[str, ...] = ()


def ask_queue(workspace: Workspace, claimed: bool = False) -> Queue:
    """Which tasks are waiting or running.

    Raises Incomplete when Slurm does not answer, for then nothing is known, and for a job of this workspace of which
    nothing tells what it runs; BadInput where sbatch would send jobs to a cluster whose queue is not asked for. Where
    Slurm is not installed and nothing was sent there is nothing to know.
    claimed: this process holds the claim and is about to send; otherwise what a killed submission left is noted if
    nobody holds it.
    """
    elsewhere = os.environ.get("SBATCH_CLUSTERS", "")
    if elsewhere not in ("", os.environ.get("SLURM_CLUSTERS", "")):
        mend = "export SLURM_CLUSTERS of the same value, which squeue and sacct read too, or unset SBATCH_CLUSTERS"
        raise BadInput("SBATCH_CLUSTERS sends jobs where nobody looks for them", f"SBATCH_CLUSTERS={elsewhere}", mend)
    if claimed:
        _adopt(workspace)
    elif _left_over(workspace):
        with contextlib.suppress(Incomplete), claim.hold(claim_folder(workspace)):
            _adopt(workspace)
    submissions = read_submissions(workspace)
    if not slurm.installed() and not submissions and not claimed:
        return Queue([], {}, {})
    records = read_records(workspace)
    told_by_tasks = {r.job for *_, r in records if r.state in (RUNNING, STOPPED) and re.fullmatch("[0-9]+", r.job)}
    jobs = {s.job for s in submissions} | told_by_tasks
    own = slurm.queue()
    others = slurm.queue(jobs - _jobs(own or {}))  # of who shares the workspace, or long ended
    if own is None or others is None:
        raise _silent()
    elements = own | others
    found, tasks = {}, {}
    for submission in submissions:
        for k, indices in enumerate(submission.elements):
            if not (element := submission.find(k, elements)):
                continue
            found[submission.key(k)] = element
            if not element.ended:
                tasks.update({(submission.stage, index): submission.job for index in indices})
    rest = {key: e for key, e in elements.items() if key not in found and not e.ended}
    # Of strangers' jobs a number that came back may be among them: theirs must have the stage's name too.
    plain = _by_plain_sbatch(records, rest, trusted=own.keys())
    told = set(plain.values())
    unknown = {key.partition("_")[0]: e for key, e in rest.items() if key in own}
    under_way = _left_over(workspace)
    lost = {job for job, e in unknown.items() if e.comment == comment(workspace) and e.name not in under_way}
    if lost and (lost := lost - {s.job for s in read_submissions(workspace)}):  # not sent by another one just now
        what = "the queue has jobs of this workspace whose record in submissions/ is gone or damaged"
        mend = "`scancel` them, or wait for their end: their tasks would run twice"
        raise Incomplete(what, f"job {_some(sorted(lost))}", mend)
    doubtful = tuple(job for job, e in unknown.items() if e.name in STAGES and job not in told)
    return Queue(submissions, found, plain | tasks, doubtful)


def _jobs(elements: Mapping[str, slurm.Element]) -> set[str]:
    return {key.partition("_")[0] for key in elements}


def _by_plain_sbatch(
    records: Iterable[tuple[str, int, Record]], elements: Mapping[str, slurm.Element], trusted: Collection[str]
) -> dict[tuple[str, int], str]:
    """Tasks of jobs that were not sent by `cmrhpc submit`, as far as the tasks' own records tell.

    One record tells of a whole array of plain sbatch: the distance from element to task is the same for all.
    trusted: elements that need not have the stage's name.
    """
    found: dict[tuple[str, int], str] = {}
    for stage, index, record in records if elements else ():
        element = elements.get(record.key)
        known = element and (record.key in trusted or element.name == stage)
        if element and known and (record.state == RUNNING or (record.state == STOPPED and element.waits)):
            found[stage, index] = record.job
        if not record.element.isdigit():
            continue
        for key, other in elements.items():
            job, _, number = key.partition("_")
            if job == record.job and number.isdigit() and other.name == stage:
                found.setdefault((stage, index + int(number) - int(record.element)), job)
    return found


def _silent() -> Incomplete:
    mend = "try again when squeue answers; without it tasks could be submitted twice"
    return Incomplete("Slurm does not answer", "squeue", mend)


def claim_folder(workspace: Workspace) -> Path:
    return workspace.root / "submissions" / "claim"


def _left_over(workspace: Workspace) -> dict[str, Path]:
    """Name of a job -> what was asked for, where nothing says that Slurm has answered."""
    folder = asked_path(workspace, "x").parent
    return {path.stem: path for path in folder.glob("*.json")} if not files.is_linked(folder) else {}


def _adopt(workspace: Workspace) -> None:
    """Record the jobs of a submission that was killed after sbatch took them and before that was noted.

    The note of another user stays where the cluster shows that user's jobs to nobody else, and that of another cluster:
    whoever may see the job finds it there.
    """
    if not (notes := _left_over(workspace)):
        return
    shape = ["squeue", "--all", "--noheader", "--states=all", f"--name={','.join(notes)}", "--format=%F|%j"]
    answer = slurm.ask(shape)
    if answer.code != 0:
        raise _silent()
    jobs = {name: job for job, _, name in (line.partition("|") for line in answer.out.split())}
    config = slurm.config() or {}
    for name, path in notes.items():
        told = read_one(path)
        elsewhere = told is not None and told.cluster not in ("", config.get("ClusterName", ""))
        if told and name in jobs:
            write_submission(workspace, dataclasses.replace(told, job=jobs[name]))
        elif elsewhere or (slurm.hides_jobs(config) and owner(path) != os.getuid()):
            continue
        path.unlink(missing_ok=True)


def doubts(
    workspace: Workspace, queue: Queue, missing: Mapping[str, Sequence[State]], limits: slurm.Limits
) -> list[str]:
    """In words, jobs that may hold missing tasks: of plain sbatch, and those that this queue does not show."""
    found = []
    if queue.doubtful and any(missing.values()):
        jobs = _some(queue.doubtful)
        found.append(f"in the queue by plain sbatch, perhaps for this workspace: job {jobs}; its tasks would run twice")
    for why, unseen in _out_of_sight(workspace, queue, missing, limits).items():
        found.append(f"sent before {why}: job {_some(unseen)}; what is queued there still would run twice")
    return found


def _some(jobs: Sequence[str]) -> str:
    return ", ".join(jobs[:3]) + (" and more" if len(jobs) > 3 else "")


def _out_of_sight(
    workspace: Workspace, queue: Queue, missing: Mapping[str, Sequence[State]], limits: slurm.Limits
) -> dict[str, list[str]]:
    """Where a job is that this queue does not show, in words -> such jobs that may hold missing tasks still."""
    newest = {(s.stage, index): s for s in queue.submissions for element in s.elements for index in element}
    seen = _jobs(queue.elements)
    found: dict[str, list[str]] = {}
    for task in ((stage, s.index) for stage, states in missing.items() for s in states):
        last = newest.get(task)
        if last is None or last.job in seen:
            continue
        if last.cluster and limits.cluster and last.cluster != limits.cluster:
            why = f"on the cluster {last.cluster}, whose queue {limits.cluster} does not show"
        elif limits.private and (user := owner(path_of(workspace, last))) != os.getuid():
            why = f"by {user_name(user)}, and this cluster shows jobs to their owners alone"
        else:
            continue
        record = read_record(record_path(workspace, *task))
        ended = record and (record.state in (DONE, FAILED) if record.job == last.job else record.time > last.time)
        if not ended and last.job not in found.setdefault(why, []):
            found[why].append(last.job)
    return found
