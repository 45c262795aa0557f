"""Everything missing, on Slurm: what is queued already is left out, the rest goes out as job arrays.

On the login node: read the queue and the shards, plan the arrays, ask, and send one after the other (`send.py`). Truth
is what the shards and the queue say; the records of `submissions/` only tell which job holds which task. On the compute
node: bash, submitit, `element.py`, `task.sh` and the task, in that order (see docs/submit.md for each kill).
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cmrhpc import files, validity
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.launch import claim, slurm
from cmrhpc.launch.arrays import Array, Request, plan_arrays
from cmrhpc.launch.estimate import Expected, expected
from cmrhpc.launch.queued import Queue, ask_queue, claim_folder, doubts
from cmrhpc.launch.retry import more_for_what_lacked_it
from cmrhpc.launch.send import dependency, script, settings, undisturbed
from cmrhpc.planning import STAGES
from cmrhpc.profile import Profile, memory_text, time_text
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
    notes += doubts(workspace, queue, missing, limits)
    arrays = plan_arrays(missing, profile, queued=held, more=more, max_elements=max_elements(limits))
    elements = sum(len(array.elements) for array in arrays)
    if limits.max_submit is not None and elements > limits.max_submit:
        notes.append(
            f"you may have {limits.max_submit} jobs queued at once, and these are {elements}: a part is sent now, "
            "and the same command sends the rest later"
        )
    n_queued = sum(1 for stage in states for s in states[stage] if not s.done and (stage, s.index) in queue.tasks)
    done = sum(s.done for found in states.values() for s in found)
    return Proposal(arrays, expected(workspace.index(), arrays, states, profile), n_queued, done, notes)


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
        refusals: dict[tuple[str, Request], BadInput] = {}
        try:
            for planned in now.arrays:
                ours.renew()
                same, report = (planned.stage, planned.request), planned.stage == "aggregate"
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
    request = array.request
    parts = [tasks, time_text(request.seconds), memory_text(request.memory), f"{request.cpus} cpus", request.gres]
    parts += [f"gpus {request.gpus}"] if request.gpus else []
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
            "time": time_text(a.request.seconds),
            "memory": memory_text(a.request.memory),
        }
        for a in proposal.arrays
    ]
    stages = {stage: dataclasses.asdict(row) for stage, row in proposal.expected.items()}
    return {"stages": stages, "arrays": arrays, "queued": proposal.queued, "notes": proposal.notes}
