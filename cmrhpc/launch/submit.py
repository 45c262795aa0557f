"""Everything missing, on Slurm: what is queued already is left out, the rest goes out as job arrays.

On the login node: read the queue and the shards, plan the arrays, ask, and send one after the other (`send.py`). Truth
is what the shards and the queue say; the records of `submissions/` only tell which job holds which task. On the compute
node: bash, submitit, `element.py`, `task.sh` and the task, in that order (see docs/submit.md for each kill).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrhpc import files, validity
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.launch import claim, slurm
from cmrhpc.launch.arrays import Array, Ask, More, plan_arrays
from cmrhpc.launch.estimate import Expected, expected
from cmrhpc.launch.reasons import user_name
from cmrhpc.launch.records import DONE, FAILED, RUNNING, STOPPED, Record, read_record, read_records, record_path
from cmrhpc.launch.send import asked_path, comment, dependency, script, settings, undisturbed
from cmrhpc.launch.submissions import Submission, owner, read_one, read_submissions, write_submission
from cmrhpc.planning import STAGES
from cmrhpc.profile import Profile, memory_mb, memory_text, time_seconds, time_text
from cmrhpc.validity import State
from cmrhpc.workspace import Workspace

if TYPE_CHECKING:
    from submitit import Job

MAX_ELEMENTS = 1000  # of one array where the cluster does not say: Slurm's own default


@dataclass(frozen=True)
class Proposal:
    """What a submission would send. queued: tasks that a job holds already. notes: what else is worth knowing."""

    arrays: list[Array]
    expected: dict[str, Expected]
    queued: int
    done: int
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> int:
        return sum(len(array.tasks) for array in self.arrays)


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
    jobs = {s.job for s in submissions} | {r.job for *_, r in records if r.job and r.state in (RUNNING, STOPPED)}
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
    unknown = {key.partition("_")[0]: e for key, e in rest.items() if key in own and key.partition("_")[0] not in told}
    under_way = _left_over(workspace)  # of a submission that is at work now
    lost = [job for job, e in unknown.items() if e.comment == comment(workspace) and e.name not in under_way]
    if lost:
        what = "the queue has jobs of this workspace whose record in submissions/ is gone or damaged"
        mend = "`scancel` them, or wait for their end: their tasks would run twice"
        raise Incomplete(what, f"job {', '.join(lost[:5])}", mend)
    doubtful = tuple(job for job, e in unknown.items() if e.name in STAGES)
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
        elif elsewhere or (slurm.hides_jobs(config) and path.stat().st_uid != os.getuid()):
            continue
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ what to send


def propose(workspace: Workspace, profile: Profile, queue: Queue, limits: slurm.Limits) -> Proposal:
    """The arrays for all that is neither done nor queued."""
    states = validity.states(workspace)
    missing = {
        stage: [s for s in found if not s.done and (stage, s.index) not in queue.tasks]
        for stage, found in states.items()
    }
    held = {
        s.task.output: queue.tasks[stage, s.index]
        for stage in states
        for s in states[stage]
        if (stage, s.index) in queue.tasks and not s.done
    }
    if any(missing[stage] for stage in STAGES if stage != "aggregate"):
        missing["aggregate"] = list(states["aggregate"])  # made anew, after the one that may be queued
    more, notes = more_for_what_lacked_it(workspace, missing, queue, profile)
    notes += [doubt for doubt in [_doubt(queue)] if doubt and any(missing.values())]
    notes += _out_of_sight(workspace, queue, missing, limits)
    arrays = plan_arrays(missing, profile, queued=held, more=more, max_elements=max_elements(limits))
    elements = sum(len(array.elements) for array in arrays)
    if limits.max_submit is not None and elements > limits.max_submit:
        notes.append(
            f"you may have {limits.max_submit} jobs queued at once, and these are {elements}: a part is sent now, "
            "and the same command sends the rest later"
        )
    n_queued = sum(1 for stage in states for s in states[stage] if not s.done and (stage, s.index) in queue.tasks)
    done = sum(s.done for found in states.values() for s in found)
    return Proposal(arrays, expected(workspace, arrays, states, profile), n_queued, done, notes)


def _doubt(queue: Queue) -> str:
    if not queue.doubtful:
        return ""
    jobs = ", ".join(queue.doubtful[:3]) + (" and more" if len(queue.doubtful) > 3 else "")
    return f"in the queue by plain sbatch, perhaps for this workspace: job {jobs}; its tasks would run twice"


def _out_of_sight(
    workspace: Workspace, queue: Queue, missing: Mapping[str, Sequence[State]], limits: slurm.Limits
) -> list[str]:
    """In words, jobs that may hold missing tasks still and that this queue does not show."""
    newest = {(s.stage, index): s for s in queue.submissions for element in s.elements for index in element}
    seen = _jobs(queue.elements)
    found: dict[str, set[str]] = {}
    for task in ((stage, s.index) for stage, states in missing.items() for s in states):
        last = newest.get(task)
        if last is None or last.job in seen:
            continue
        if last.cluster and limits.cluster and last.cluster != limits.cluster:
            why = f"on the cluster {last.cluster}, whose queue {limits.cluster} does not show"
        elif limits.private and (user := owner(workspace, last)) != os.getuid():
            why = f"by {user_name(user)}, and this cluster shows jobs to their owners alone"
        else:
            continue
        record = read_record(record_path(workspace, *task))
        ended = record and (record.state in (DONE, FAILED) if record.job == last.job else record.time > last.time)
        if not ended:
            found.setdefault(why, set()).add(last.job)
    return [
        f"sent before {why}: job {', '.join(sorted(jobs)[:3])}{' and more' if len(jobs) > 3 else ''}; "
        "what is queued there still would run twice"
        for why, jobs in found.items()
    ]


def limits_for(profile: Profile) -> slurm.Limits:
    """What the cluster allows, for the narrowest of the accounts and qualities of service that the profile names."""
    named = dict.fromkeys((common.account, common.qos) for common in map(profile.slurm_of, STAGES))
    found = [slurm.limits(*pair) for pair in named]
    most = min((limits.max_submit for limits in found if limits.max_submit is not None), default=None)
    return dataclasses.replace(found[0], max_submit=most)


def max_elements(limits: slurm.Limits) -> int:
    """Of one array: what the highest index allows, and half of what may be queued at all, so that a part can follow."""
    # MaxArraySize 0: no arrays at all, and an array of one is sent as a plain job.
    known = [MAX_ELEMENTS if limits.max_array_size is None else limits.max_array_size]
    known += [limit // 2 for limit in (limits.max_submit, limits.max_jobs) if limit]
    return max(1, min(known))


def more_for_what_lacked_it(
    workspace: Workspace, missing: Mapping[str, Sequence[State]], queue: Queue, profile: Profile
) -> tuple[More, list[str]]:
    """Twice the time or memory, up to the maximum, for tasks whose job ran out of it, with notes.

    The maximum is the profile's; of time the partition's too. A task that recorded another cause gets no more.
    """
    wanted = {(stage, s.index) for stage, found in missing.items() for s in found}
    tried = [s for s in queue.submissions if any((s.stage, i) in wanted for e in s.elements for i in e)]
    # What slurmctld still remembers serves where accounting is off.
    told = queue.elements | (slurm.accounting({s.job for s in tried}) or {})
    # Accounting may lag behind, but it alone knows of steps that ran out of memory.
    lacking = {key for key, element in told.items() if element.state == "OUT_OF_MEMORY"}
    told |= {key: element for key, element in queue.elements.items() if element.ended and key not in lacking}
    most_of_stage = functools.cache(lambda stage: _most_seconds(profile, stage))
    most_memory = memory_mb(profile.slurm.max_memory) if profile.slurm.max_memory else math.inf
    more: dict[tuple[str, int], tuple[int, int]] = {}
    lacked: dict[tuple[str, str, str], int] = {}
    for submission in tried:
        together = max(len(element) for element in submission.elements)
        for k, indices in enumerate(submission.elements):
            state = element.state if (element := submission.find(k, told)) else ""
            for task in ((submission.stage, index) for index in indices):
                if task not in wanted or state not in ("TIMEOUT", "OUT_OF_MEMORY"):
                    continue
                record = read_record(record_path(workspace, *task))
                own = record and record.state == FAILED and record.key == submission.key(k)
                if own and "out of memory" not in record.reason:  # type: ignore[union-attr]
                    continue
                asked = profile.resources(submission.stage)
                seconds, memory = more.get(task, (asked.seconds, memory_mb(asked.memory)))
                if state == "TIMEOUT":
                    most_time = most_of_stage(submission.stage)
                    seconds = max(seconds, int(min(2 * submission.time_limit_s, most_time)) // 60 * 60)
                elif submission.memory:
                    memory = max(memory, int(min(2 * (memory_mb(submission.memory) // together), most_memory)))
                more[task] = (seconds, memory)
    for (stage, _), (seconds, memory) in more.items():
        asked = profile.resources(stage)
        for what, now, usual, most in (
            ("time", time_text(seconds), time_text(asked.seconds), seconds >= most_of_stage(stage)),
            ("memory", memory_text(memory), memory_text(memory_mb(asked.memory)), memory >= most_memory),
        ):
            if now != usual:
                limit = profile.slurm.max_time
                ours = what == "memory" or (limit and seconds >= time_seconds(limit))
                whose = "of the profile" if ours else "of the partition"
                end = f"{now} instead of {usual}" + (f" (max_{what} {whose})" if most else "")
                key = (stage, what, end)
                lacked[key] = lacked.get(key, 0) + 1
        if (seconds, memory) == (asked.seconds, memory_mb(asked.memory)):
            key = (stage, "time or memory", "what the profile says, and max_time and max_memory allow no more")
            lacked[key] = lacked.get(key, 0) + 1
    notes = [
        f"{stage}: {n} task{'s' * (n > 1)} ran out of {what}; asking for {end}"
        for (stage, what, end), n in sorted(lacked.items())
    ]
    return more, notes


def _most_seconds(profile: Profile, stage: str) -> float:
    """The longest time that a task of a stage may be given, as far as it is known."""
    told = time_seconds(profile.slurm.max_time) if profile.slurm.max_time else math.inf
    names = [name for name in profile.slurm_of(stage).partition.split(",") if name]
    here = [p.most_seconds for p in slurm.partitions() or [] if (p.name in names if names else p.default)]
    return min(told, max(here, default=math.inf))


# ------------------------------------------------------------------------------------------------ sending it


Send = Callable[[Array, Mapping[str, str]], "list[Job[str]]"]


def submit_all(
    workspace: Workspace,
    profile: Profile,
    limits: slurm.Limits,
    send: Send,
    shown: Proposal | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[Array, list[Job[str]]]]:
    """Send all that is missing; returns each array with the jobs of its elements.

    One process at a time; the queue is read again first. `send` submits one array, given the jobs of those before it.
    Raises Incomplete when another submission is at work, when the queue is no longer as `shown`, or when the cluster
    takes no more; what was sent by then stays sent.
    """
    with claim.hold(claim_folder(workspace)) as ours:
        now = propose(workspace, profile, ask_queue(workspace, claimed=True), limits)
        if shown and now.arrays != shown.arrays:
            raise Incomplete("the queue or the results changed meanwhile", str(workspace.root), "run the command again")
        workspace.remove_stale(workspace.root)
        files.make_folder(workspace.root / "logs")  # with the group of the workspace, before the first job makes it
        sent: list[tuple[Array, list[Job[str]]]] = []
        jobs: dict[str, str] = {}
        lost: set[str] = set()  # arrays that Slurm refuses, and what cannot do without them
        refusals: dict[tuple[str, Ask], BadInput] = {}
        try:
            for planned in now.arrays:
                ours.renew()
                same, report = (planned.stage, planned.ask), planned.stage == "aggregate"
                needed = planned.needs if report else (*planned.needs, *planned.after)
                if lost.intersection(needed) or same in refusals or (report and refusals and not sent):
                    lost.add(planned.name)
                    continue
                array = dataclasses.replace(planned, after=tuple(n for n in planned.after if n not in lost))
                try:
                    found = send(array, jobs)
                except BadInput as error:  # of this array: the others can still go
                    refusals[same] = error
                    lost.add(planned.name)
                    continue
                jobs[array.name] = found[0].job_id.split("_")[0]
                sent.append((array, found))
                say(f"job {jobs[array.name]}: {array.name}, {describe(array, jobs)}")
            if refusals:
                raise next(iter(refusals.values()))
        except (Incomplete, BadInput) as error:
            n = sum(len(a.tasks) for a, _ in sent)
            error.what += f"\n  sent:  {n} of {now.tasks} tasks, in {len(sent)} arrays"
            raise
    return sent


def describe(array: Array, jobs: Mapping[str, str] | None = None) -> str:
    """For people: how many tasks, what each element asks for, what it waits for."""
    n, elements = len(array.tasks), len(array.elements)
    tasks = f"{n} task{'s' * (n > 1)}" + (f" in {elements} elements" if elements < n else "")
    ask = array.ask
    parts = [tasks, time_text(ask.seconds), memory_text(ask.memory), f"{ask.cpus} cpus", ask.gres]
    parts += [f"gpus {ask.gpus}"] if ask.gpus else []
    waits = dependency(array, jobs or {})
    return ", ".join(filter(None, parts)) + (f", {waits}" if waits else "")


def dry_run(workspace: Workspace, profile: Profile, proposal: Proposal) -> tuple[list[dict[str, Any]], bool]:
    """The sbatch file of each array, its variables, and what `sbatch --test-only` says of it; whether all were taken.

    Numbers of jobs that are not there yet stand as names, and are left out of what Slurm is asked about.
    """
    found, right = [], True
    for array in proposal.arrays:
        variables = settings(workspace, profile, array.stage)
        text = script(workspace, array, profile, "TOKEN", dependency(array, {}))
        tested = script(workspace, array, profile, "TOKEN", None)
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(tested)
            file.flush()
            with undisturbed(re.findall(r"(?m)^#SBATCH --([a-z-]+)", tested)):
                answer = slurm.ask(["sbatch", "--test-only", file.name], environment={"SLURM_TIME_FORMAT": "standard"})
        taken = None if answer.code is None else answer.code == 0
        right = right and taken is not False
        told = {"accepted": taken, "answer": answer.err}
        found.append({"name": array.name, "script": text, "variables": variables} | told)
    return found, right


def as_json(proposal: Proposal, sent: Iterable[tuple[Array, list[Job[str]]]]) -> dict[str, Any]:
    """What was proposed, and the jobs of the arrays that were sent."""
    jobs = {array.name: found[0].job_id.split("_")[0] for array, found in sent}
    arrays = [
        {
            "name": a.name,
            "stage": a.stage,
            "job": jobs.get(a.name),
            "elements": a.elements,
            "after": [*a.needs, *a.after],
            "time": time_text(a.ask.seconds),
            "memory": memory_text(a.ask.memory),
        }
        for a in proposal.arrays
    ]
    stages = {stage: dataclasses.asdict(row) for stage, row in proposal.expected.items()}
    return {"stages": stages, "arrays": arrays, "queued": proposal.queued, "notes": proposal.notes}
