"""Arrays -> Slurm, through submitit.

What is written, in this order: `submissions/asked/NAME.json` before sbatch is asked, then submitit's files in
`submissions/submitit/NAME/`, then `submissions/JOB.json` when sbatch has answered, and the first is removed. A process
killed in between, or an sbatch that does not say what became of the job, leaves the first: the next submission looks in
the queue for a job of that name before anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrhpc import __version__, files
from cmrhpc.errors import BadInput, CmrhpcError, Incomplete
from cmrhpc.launch import slurm
from cmrhpc.launch.arrays import TRAINING, Array
from cmrhpc.launch.element import run_element
from cmrhpc.launch.submissions import Submission, as_text, write_submission
from cmrhpc.paths import check_for_bind
from cmrhpc.profile import Profile, memory_text
from cmrhpc.workspace import Workspace

if TYPE_CHECKING:
    from submitit import Job, SlurmExecutor

# sbatch takes these from its environment before what the file says.
_WIN = ("ARRAY_INX", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE", "SIGNAL", "TIMELIMIT", "WAIT")
# The same for these, but only where the file sets the option; otherwise they are the user's choice.
_WIN_IF_TOLD: dict[str, tuple[str, ...]] = {
    name: (name.upper(),) for name in ("partition", "account", "qos", "constraint", "reservation")
}
_WIN_IF_TOLD["mem"] = ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU")
_WIN_IF_TOLD |= dict.fromkeys(("gres", "gpus", "gpus_per_node"), ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"))
_FULL = ("temporarily unable", "Resource temporarily unavailable", "maximum number of jobs")
# Of too many jobs and of too large ones Slurm says the same sentence; newer versions name the limit before it.
_POLICY = "Job violates accounting/QOS policy"
_LIMIT = re.compile(r"\b(?:Assoc|QOS)\w+")
# No answer, so that the job may be queued all the same.
_SILENT = re.compile(
    r"unable to contact|timed out|communications? \w+ failure|message (?:send|receive) failure|zero bytes|"
    r"connection (?:reset|refused)|not connected|unknown reason",
    re.IGNORECASE,
)


def settings(workspace: Workspace, profile: Profile, stage: str) -> dict[str, str]:
    """The variables that task.sh takes from a profile.

    Raises BadInput for an image, or a torch, that is not there, and for a folder that Apptainer cannot bind.
    """
    if not profile.container.image:
        no_torch = importlib.util.find_spec("torch") is None and not profile.environment.lines
        if stage in TRAINING and no_torch:
            mend = "name the image, or submit from an environment with cmrhpc[train]"
            raise BadInput("torch is not installed here", f"profile {profile.name} container.image", mend)
        return {}
    image = Path(profile.container.image)
    where = f"profile {profile.name} container.image"
    if not image.exists():
        raise BadInput(f"no such image: {image}", where, "build it with containers/build.sh, or name its path")
    if not Path(f"{image}.sha256").is_file():
        mend = f"sha256sum {image} > {image}.sha256"
        raise BadInput(f"no checksum beside the image: {image}.sha256", where, mend)
    check_for_bind(workspace.root.resolve())
    binds = list(profile.container.binds)
    for seen, real in read_elsewhere(workspace, stage).items():
        check_for_bind(seen)
        check_for_bind(real)
        # Where it lies first: of links on the way the container may have some, and lack others.
        binds += [str(real)] if seen == real else [str(real), f"{real}:{seen}"]
    found = {"CMRHPC_CONTAINER": str(image), "CMRHPC_CONTAINER_OPTIONS": " ".join(profile.container.options)}
    return found | ({"APPTAINER_BIND": ",".join(binds)} if binds else {})


def other_version(image: str, options: Iterable[str]) -> str:
    """What to say of an image whose cmrhpc is not ours; empty where it is, or where the image does not start here."""
    answer = slurm.ask(["apptainer", "--quiet", "exec", *options, image, "cmrhpc", "--version"], seconds=60)
    told = " ".join(answer.out.split())
    if answer.code != 0 or told == f"cmrhpc {__version__}":
        return ""
    return f"image {image} holds {told or 'no version'}, and this is cmrhpc {__version__}: tasks run the image's code"


def read_elsewhere(workspace: Workspace, stage: str) -> dict[Path, Path]:
    """What tasks of a stage read outside the workspace: where they look for it -> where it lies, links followed.

    Without weights and external images that are not there: they stop only the task that reads them, and a missing bind
    source stops every container.
    """
    study, root = workspace.study, workspace.root.resolve()
    read = [study.data.raw] if stage == "ingest" else []
    if stage == "synthesize" and (made := [one.external for one in study.generators.values() if one.external]):
        # The table is asked for the images that a generator was trained on, where it declares them by name.
        read += [text for text in made if (root / text).exists()]
        read += [study.data.raw] if workspace.raw.exists() else []
    if stage == "classify":
        read += [
            one.weights for name, one in study.classifiers.items() if one.weights and workspace.weights(name).exists()
        ]
    found = {}
    for text in read:
        seen, real = Path(os.path.normpath(root / text)), Path(os.path.realpath(root / text))
        inside = seen.is_relative_to(root)  # the workspace is bound, and its links lead to where it lies
        if not (inside and real.is_relative_to(root)):
            found[real if inside else seen] = real
    return found


def dependency(array: Array, jobs: Mapping[str, str]) -> str | None:
    """The value of `--dependency`; `jobs` turns names of arrays into numbers of jobs."""
    parts = []
    for word, names in (("afterok", array.needs), ("afterany", array.after)):
        if names:
            parts.append(":".join([word, *(jobs.get(name, name) for name in names)]))
    return ",".join(parts) or None


def job_name(array: Array, token: str) -> str:
    """No other job has it: the token is drawn for each submission."""
    return f"{array.name}-{token}"


def comment(workspace: Workspace) -> str:
    """Tells in the queue for which workspace a job is."""
    return f"cmrhpc {workspace.root}"


def own_parameters(workspace: Workspace, array: Array, token: str, depends_on: str | None) -> dict[str, Any]:
    """What submit decides itself, whoever made the executor."""
    more = {"requeue": True} | ({"kill-on-invalid-dep": "yes"} if array.needs else {})
    return {
        "job_name": job_name(array, token),
        "comment": comment(workspace),
        "dependency": depends_on,
        "additional_parameters": more,
    }


def parameters(
    workspace: Workspace, array: Array, profile: Profile, token: str, depends_on: str | None
) -> dict[str, Any]:
    """Everything that SlurmExecutor is told for one array."""
    common, request = profile.slurm_of(array.stage), array.request
    own = own_parameters(workspace, array, token, depends_on)
    for option in common.options:
        name, sign, value = option.removeprefix("--").partition("=")
        own["additional_parameters"][name] = value if sign else True
    return own | {
        "partition": common.partition or None,
        "account": common.account or None,
        "qos": common.qos or None,
        "constraint": common.constraint or None,
        "time": request.seconds // 60,
        "cpus_per_task": request.cpus,
        "mem": memory_text(request.memory),
        "gres": request.gres or None,
        "gpus_per_node": request.gpus or None,
        "ntasks_per_node": 1,
        "signal_delay_s": common.signal_seconds,
        "array_parallelism": len(array.elements),
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default, which a cluster that checks them refuses
        "setup": ["umask 007", *profile.environment.lines],
        # A step inherits neither the environment under --export=NONE nor, since Slurm 22.05, the cores of its job.
        "srun_args": ["--export=ALL", f"--cpus-per-task={request.cpus}"],
    }


def script(workspace: Workspace, array: Array, profile: Profile, token: str, depends_on: str | None) -> str:
    """The text of the sbatch file of an array, as submitit would write it. Needs no Slurm here."""
    from submitit import SlurmExecutor

    class Writer(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    writer = Writer(submitit_folder(workspace, array, token))
    writer.update_parameters(**parameters(workspace, array, profile, token, depends_on))
    if len(array.elements) > 1:
        writer.parameters["map_count"] = len(array.elements)
    return writer._make_submission_file_text(writer._submitit_command_str, "")


def submitit_folder(workspace: Workspace, array: Array, token: str) -> Path:
    return workspace.root / "submissions" / "submitit" / job_name(array, token)


@contextlib.contextmanager
def owner_writes() -> Iterator[None]:
    """What submitit and Slurm write may be read by the group of the workspace, whose folders decide, and by no others.

    The group does not write it: the job unpickles it as whoever submits.
    """
    before = os.umask(0o027)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def undisturbed(told: Iterable[str]) -> Iterator[None]:
    """Remove environment variables that would override the sbatch file; inside a job also that job's own, except those
    that select the cluster.

    told: options of sbatch in the file, e.g. "gpus-per-node".
    """
    before = dict(os.environ)
    win = {*_WIN, *(name for option in told for name in _WIN_IF_TOLD.get(option.replace("-", "_"), ()))}
    try:
        for name in before:
            if (name.startswith("SBATCH_") and name.removeprefix("SBATCH_") in win) or (
                "SLURM_JOB_ID" in before
                and name.startswith(("SLURM_", "SRUN_", "SUBMITIT_"))
                and name not in ("SLURM_CONF", "SLURM_CLUSTERS")
            ):
                del os.environ[name]
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def submission_of(array: Array, token: str, jobs: Mapping[str, str], cluster: str, **asked: Any) -> Submission:
    """What is noted of an array before it is sent. asked: `profile`, `time_limit_s`, `memory` and `gpus` of it."""
    return Submission(
        job="",
        stage=array.stage,
        elements=array.elements,
        time=time.time(),
        cluster=cluster,
        depends_on=tuple(jobs.get(name, name) for name in (*array.needs, *array.after)),
        name=job_name(array, token),
        **asked,
    )


def send(
    workspace: Workspace, array: Array, profile: Profile, token: str, jobs: Mapping[str, str], cluster: str
) -> list[Job[str]]:
    """Submit one array by a profile. cluster: its name, which is noted. Raises as `send_with`."""
    from submitit import SlurmExecutor

    place = submitit_folder(workspace, array, token)
    files.make_folder(place)
    with contextlib.suppress(OSError):  # a file system without modes
        place.chmod(stat.S_IMODE(place.stat().st_mode) & ~stat.S_IWGRP)
    depends_on = dependency(array, jobs)
    executor = SlurmExecutor(place)
    executor.update_parameters(**parameters(workspace, array, profile, token, depends_on))
    gpus, memory = profile.gpus(array.stage), memory_text(array.request.memory)
    limits = {"time_limit_s": array.request.seconds, "memory": memory, "gpus": gpus}
    asked = submission_of(array, token, jobs, cluster, profile=profile.name, **limits)
    try:
        return send_with(workspace, asked, executor, settings(workspace, profile, array.stage))
    except CmrhpcError:
        if not asked_path(workspace, asked.name).exists():  # else it was sent, or may have been
            shutil.rmtree(place, ignore_errors=True)
        raise


def send_with(
    workspace: Workspace, asked: Submission, executor: SlurmExecutor, variables: dict[str, str]
) -> list[Job[str]]:
    """Submit the elements of `asked` as one job array, and note it.

    Raises Incomplete when the cluster takes no more jobs now, or does not say whether it took this one, and BadInput
    when it refuses this one. Only where it refused is the note removed.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    note = asked_path(workspace, asked.name)
    files.atomic_write(note, as_text(asked))
    n = len(asked.elements)
    tasks = [list(element) for element in asked.elements]
    given = executor.parameters
    told = [*(name for name, value in given.items() if value), *(given.get("additional_parameters") or ())]
    try:
        with owner_writes(), undisturbed(told):
            found = executor.map_array(
                run_element, [str(workspace.root)] * n, [asked.stage] * n, tasks, [variables] * n
            )
    except OSError as error:
        mend = "mend what is named, then run the same command again: it looks for the job in the queue first"
        raise BadInput(f"cannot submit: {error}", asked.name, mend) from None
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        if not said or isinstance(error, FailedSubmissionError) or _SILENT.search(said):
            mend = "run the same command again: it looks for the job in the queue first"
            raise Incomplete(f"Slurm does not say whether it took the job: {said}", asked.name, mend) from None
        note.unlink(missing_ok=True)
        if mend := _when_full(said):
            raise Incomplete(f"the cluster takes no more jobs now: {said}", asked.name, mend) from None
        mend = "mend the profile; `cmrhpc submit --dry-run` shows the file and Slurm's answer"
        raise BadInput(f"Slurm refuses the job: {said}", f"{asked.name}, profile {asked.profile}", mend) from None
    job = found[0].job_id.split("_")[0]
    write_submission(workspace, dataclasses.replace(asked, job=job))
    note.unlink(missing_ok=True)
    return found


def _when_full(said: str) -> str:
    """How to go on where sbatch refuses a job because there are too many; empty where it is the job that is wrong."""
    goes_on = "when some have ended, the same command goes on"
    if any(words in said for words in _FULL):
        return goes_on
    if _POLICY not in said:
        return ""
    if limits := _LIMIT.findall(said):
        return goes_on if any("SubmitJob" in limit for limit in limits) else ""
    own = slurm.queue()
    if own is not None and all(element.ended for element in own.values()):
        return ""  # nothing of this user is queued, so it is hardly their number
    return f"{goes_on}; or the profile asks for more than the account or QOS allows: see --dry-run"


def asked_path(workspace: Workspace, name: str) -> Path:
    return workspace.root / "submissions" / "asked" / f"{name}.json"
