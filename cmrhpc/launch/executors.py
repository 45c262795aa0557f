"""`submit` from Python, with any executor of submitit that the user already has."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrhpc import gpus, validity
from cmrhpc.errors import BadInput, Incomplete, UsageError
from cmrhpc.launch import claim, slurm
from cmrhpc.launch.arrays import Array, plan_arrays
from cmrhpc.launch.element import run_element
from cmrhpc.launch.queued import ask_queue, claim_folder
from cmrhpc.launch.send import dependency, own_parameters, parameters, send_with, settings, submission_of
from cmrhpc.launch.submit import limits_for, submit_all
from cmrhpc.paths import check_for_slurm
from cmrhpc.planning import STAGES
from cmrhpc.profile import Profile, gpu_count, load_profile, parse_profile
from cmrhpc.workspace import Workspace

if TYPE_CHECKING:
    from submitit import Executor, Job

# What asks for GPUs, or for memory and cores by the GPU or core. A profile says all of that itself.
_BY_GPU = {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "num-gpus", "gres"}
_OF_A_PROFILE = _BY_GPU | {"cpus-per-gpu", "mem-per-cpu", "mem-per-gpu"}


def submit(
    workspace: str | Path | Workspace, executor: Executor, profile: str | Path | Profile | None = None
) -> list[Job[str]]:
    """Everything missing in a workspace, through an executor of submitit; returns its jobs, one per array element.

    With Slurm (SlurmExecutor, AutoExecutor) the jobs are arrays with dependencies, as `cmrhpc submit` sends them, and
    this returns when they are sent. Every other executor (LocalExecutor, DebugExecutor) knows no dependencies: the
    arrays run one after the other, as many tasks at once as there are cores for, and this returns at their end.

    profile: a name, path or Profile, whose resources (GPUs too), container and tasks_per_gpu are used instead of the
    executor's. Without one the executor's own parameters serve for every stage, so that ingest and the report hold a
    GPU too where they ask for one, and tasks run in the current environment.
    Raises UsageError when `executor` is none of submitit's, Incomplete when Slurm does not answer, another submission
    is at work, or the cluster takes no more jobs, and BadInput for a path, a profile or a job that cannot be sent.
    """
    from submitit import Executor, SlurmExecutor

    if not isinstance(executor, Executor):
        mend = 'give one of submitit\'s, for example submitit.AutoExecutor("slurm_logs", cluster="slurm")'
        raise UsageError(f"{executor!r} is not an executor", "cmrhpc.submit", mend)
    place = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    known = load_profile(profile) if isinstance(profile, str | Path) else profile
    inner: Any = getattr(executor, "_executor", executor)  # AutoExecutor holds the one that it chose
    if isinstance(inner, SlurmExecutor):
        return _with_slurm(place, inner, known)
    return _one_after_the_other(place, inner, known or parse_profile(""))


def _with_slurm(workspace: Workspace, executor: Any, profile: Profile | None) -> list[Job[str]]:
    check_for_slurm(workspace.root)
    token = secrets.token_hex(4)
    used = profile or parse_profile("")
    limits = limits_for(used) if profile else slurm.limits()

    def send(array: Array, jobs: Mapping[str, str]) -> list[Job[str]]:
        depends_on = dependency(array, jobs)
        asked = own_parameters(workspace, array, token, depends_on)
        if profile:
            asked = parameters(workspace, array, profile, token, depends_on)
        with _changed(executor, merged_parameters(executor.parameters, asked)):
            minutes = executor.parameters.get("time", 5)
            note = submission_of(
                array,
                token,
                jobs,
                limits.cluster,
                profile=used.name,
                time_limit_s=60 * minutes if isinstance(minutes, int) else 0,
                memory=str(executor.parameters.get("mem") or ""),
                gpus=profile.gpus(array.stage) if profile else asked_gpus(executor.parameters),
            )
            variables = settings(workspace, profile, array.stage) if profile else {}
            return send_with(workspace, note, executor, variables)

    sent = submit_all(workspace, used, limits, send)
    return [job for _, jobs in sent for job in jobs]


def _one_after_the_other(workspace: Workspace, executor: Any, profile: Profile) -> list[Job[str]]:
    at_once = gpus.tasks_on_cores(workspace.study.compute.threads)
    found: list[Job[str]] = []
    with claim.hold(claim_folder(workspace)) as ours, _kept(ours):
        queue = ask_queue(workspace, claimed=True).tasks if slurm.installed() else {}
        if queued := sorted(set(queue.values())):
            mend = "wait until they have ended, or cancel them"
            raise Incomplete("jobs of Slurm hold tasks of this workspace", f"job {', '.join(queued[:3])}", mend)
        states = validity.states(workspace)
        missing = {stage: [s for s in states[stage] if not s.done] for stage in STAGES}
        if any(missing[stage] for stage in STAGES if stage != "aggregate"):
            missing["aggregate"] = list(states["aggregate"])
        for array in plan_arrays(missing, profile):
            variables = settings(workspace, profile, array.stage)
            limit = {"timeout_min": array.request.seconds / 60}  # LocalExecutor's own is two minutes
            with _changed(executor, limit | executor.parameters):
                for i in range(0, len(array.elements), at_once):
                    ours.renew()
                    part = [list(element) for element in array.elements[i : i + at_once]]
                    n = len(part)
                    jobs = executor.map_array(
                        run_element, [str(workspace.root)] * n, [array.stage] * n, part, [variables] * n
                    )
                    for job in jobs:
                        job.exception()  # waits; what failed is told by its job, and by what depends on it
                    found += jobs
    return found


@contextmanager
def _kept(ours: claim.Claim) -> Iterator[None]:
    """Renew the claim every minute: a batch of tasks may take hours. Who lost it is told before the next batch."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(60):
            with suppress(Incomplete, BadInput):
                ours.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _changed(executor: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """The user's executor with other parameters for a while."""
    before, asked = dict(executor.parameters), dict(parameters)
    try:
        executor.parameters.clear()
        executor.parameters.update(asked)
        yield
    finally:
        executor.parameters.clear()
        executor.parameters.update(before)


def merged_parameters(before: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for, over what the user's executor says.

    Parameters not asked for stay, except GPUs: a profile alone decides how many.
    """
    more = before.get("additional_parameters") or {}
    if "gres" in asked:
        before = {name: value for name, value in before.items() if name.replace("_", "-") not in _OF_A_PROFILE}
        more = {name: value for name, value in more.items() if name.replace("_", "-") not in _OF_A_PROFILE}
    made = dict(before) | {name: value for name, value in asked.items() if value is not None or name not in before}
    for name in ("setup", "srun_args"):
        if name in asked:
            made[name] = [*(before.get(name) or ()), *asked[name]]
    made["additional_parameters"] = {**more, **asked["additional_parameters"]}
    return made | {"dependency": asked["dependency"]}


def asked_gpus(parameters: Mapping[str, Any]) -> int:
    """How many GPUs a job of an executor with these parameters holds."""
    named = {**parameters, **(parameters.get("additional_parameters") or {})}
    told = {name.replace("_", "-"): str(value) for name, value in named.items() if value is not None}
    return gpu_count(told.get("gres", ""), [told[name] for name in sorted(_BY_GPU - {"gres"}) if name in told])
