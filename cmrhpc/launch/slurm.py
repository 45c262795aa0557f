"""Asks Slurm. Each question is one command with a time limit; None if Slurm is missing, broken or too slow.

Nothing here changes anything. What squeue and sacct say informs; only its shard says that a task is done.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO

from cmrhpc.errors import BadInput
from cmrhpc.profile import time_seconds

PATIENCE_S = 10.0  # a controller that has not answered by then is overloaded or gone
# States in which an element has ended, and comes back only if somebody asks for it.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"TIMEOUT"}  # REVOKED is not among them: another cluster of a federation runs it
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_ARRAY = re.compile(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]")  # 7_[0-9,12%2]: elements that accounting has in one line
# Settings of the user that would change what the commands print.
_PERSONAL = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SLURM_CONF_SERVER_FORMAT")


@dataclass(frozen=True)
class Element:
    """One element of a job array, or a job that is none.

    state: Slurm's word, e.g. PENDING. reason: Slurm's word why it waits, empty where it says none. node: where it runs
    or ran. by: user number of who cancelled it. exit_code, signal: of the batch script. before: states in which earlier
    runs of this element ended, oldest first (accounting only). name, comment: as submitted (the comment: queue only).
    """

    state: str
    reason: str = ""
    node: str = ""
    by: str = ""
    exit_code: int = 0
    signal: int = 0
    before: tuple[str, ...] = ()
    name: str = ""
    comment: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def waits(self) -> bool:
        return self.state in WAITING


@dataclass(frozen=True)
class Limits:
    """What the cluster allows. None: not known, or not limited.

    max_array_size: one more than the highest index of an array. max_jobs: jobs that the controller keeps at all.
    max_submit: jobs that this user may have queued and running; each element of an array counts.
    cluster: its name, empty where unknown. private: it shows jobs to their owners alone.
    """

    max_array_size: int | None = None
    max_jobs: int | None = None
    max_submit: int | None = None
    cluster: str = ""
    private: bool = False


@dataclass(frozen=True)
class Partition:
    """One partition. time_limit: Slurm's text, e.g. 1-00:00:00 or infinite. gres: e.g. gpu:tesla:2, empty for none."""

    name: str
    default: bool
    up: bool
    time_limit: str
    nodes: int
    gres: tuple[str, ...]

    @property
    def most_seconds(self) -> float:
        """The longest that a job may run there."""
        with contextlib.suppress(BadInput):  # "infinite"
            return time_seconds(self.time_limit)
        return math.inf


@dataclass(frozen=True)
class Answer:
    """What a command said. code is None when it is not installed, could not start, or did not end in time."""

    code: int | None
    out: str = ""
    err: str = ""


def patience() -> float:
    """Seconds that each question may take: CMRHPC_SLURM_SECONDS where that is a number above 0."""
    with contextlib.suppress(ValueError):
        told = float(os.environ.get("CMRHPC_SLURM_SECONDS", ""))
        return told if 0 < told < 86400 else PATIENCE_S
    return PATIENCE_S


def ask(command: list[str], seconds: float | None = None, environment: dict[str, str] | None = None) -> Answer:
    """Run a program that only asks. Never raises and never outlasts its time limit by more than a second.

    seconds: instead of `patience()`. Its output goes to files: a pipe held open by a stuck child would hold us too.
    In memory where that can be: on a full disk an answer would be cut short.
    """
    if shutil.which(command[0]) is None:
        return Answer(None, err=f"{command[0]} is not installed here")
    seconds = patience() if seconds is None else seconds
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PERSONAL)}
    settings = kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"} | (environment or {})
    with contextlib.ExitStack() as stack:
        try:
            out, err = (stack.enter_context(_file()) for _ in range(2))
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=settings, start_new_session=True
            )
        except OSError as error:
            return Answer(None, err=f"{command[0]}: {error.strerror}")
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when a person interrupts
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if code is None:
        complaint = f"{command[0]} did not answer within {seconds:.0f} s"
    return Answer(code, said, complaint.strip())


def _file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # Linux before 3.17 has none
            return os.fdopen(os.memfd_create("answer"), "w+b")
    return tempfile.TemporaryFile()


def queue(jobs: Iterable[str] | None = None) -> dict[str, Element] | None:
    """Elements of the given jobs (None: of all jobs of this user) as slurmctld knows them.

    Those that have ended stay for a while; a job that slurmctld has forgotten is not in it. Keys are `123_4`, or `123`
    for a job that is no array. None: Slurm did not answer.
    """
    wanted = None if jobs is None else sorted(set(jobs))
    if wanted is not None and not wanted:
        return {}
    whose = [f"--user={os.getuid()}"] if wanted is None else [f"--jobs={','.join(wanted)}"]
    # --all: hidden partitions too.
    answer = ask(["squeue", "--all", "--noheader", "--array", "--states=all", *whose, "--format=%i|%T|%r|%N|%j|%k"])
    if answer.code is None or answer.code != 0:
        # A single number that it has forgotten is an error to squeue; several are not.
        return {} if answer.code == 1 and "Invalid job id" in answer.err else None
    return parse_queue(answer.out)


def parse_queue(text: str) -> dict[str, Element]:
    """What `squeue --format=%i|%T|%r|%N|%j|%k` printed. Only the comment, last, may hold the separator.

    A federation may have a line for each cluster: the one that has not ended holds.
    """
    found: dict[str, Element] = {}
    for line in text.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6 and fields[0][:1].isdigit():
            key, state, reason, node, name, comment = (
                "" if field in ("(null)", "None", "n/a") else field.strip() for field in fields
            )
            element = Element(state, reason, node, name=name, comment=comment)
            if key not in found or found[key].ended or not element.ended:
                found[key] = element
    return found


def accounting(jobs: Iterable[str]) -> dict[str, Element] | None:
    """What accounting remembers of the given jobs. None: it is off here, or did not answer."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--duplicates"]
    command += [f"--jobs={','.join(wanted)}", "--format=jobid,state,exitcode,nodelist,jobname"]
    if cluster := os.environ.get("SLURM_CLUSTERS"):  # which squeue reads, and sacct does not
        command.append(f"--clusters={cluster}")
    whole = {"SLURM_BITSTR_LEN": "0"}  # of 7_[0-9,12], which is cut short otherwise
    each = ["--array"]
    answer = ask(command + each, environment=whole)
    if answer.code is not None and "unrecognized option" in answer.err:  # Slurm before 23.02
        each = []
        answer = ask(command, environment=whole)
    if answer.code != 0:  # steps are several lines for each element: too many for a slow database
        answer = ask([*command, *each, "--allocations"], environment=whole)
    return parse_accounting(answer.out) if answer.code == 0 else None


def parse_accounting(text: str) -> dict[str, Element]:
    """What `sacct --duplicates --format=jobid,state,exitcode,nodelist,jobname` printed: each run, its steps after it.

    A step that ran out of memory says so, where its job only FAILED: srun's exit code is all that its script saw.
    Runs of another name are of another job, whose number came back: the last one holds.
    """
    found: dict[str, Element] = {}
    waiting: dict[str, Element] = {}  # elements that have no line of their own
    for line in text.splitlines():
        fields = line.split("|", 4)
        if len(fields) != 5:
            continue
        job_id, words, exit_code, node, name = fields
        if array := _ARRAY.fullmatch(job_id):
            state, by = _state(words)
            waiting |= {f"{array[1]}_{k}": Element(state, by=by, name=name) for k in _elements(array[2])}
            continue
        if not re.fullmatch(r"\d+(_\d+)?(\.\w+)?", job_id):
            continue
        key, step, _ = job_id.partition(".")
        if step:
            job = found.get(key)
            if job and words == "OUT_OF_MEMORY" and job.state == "FAILED":
                found[key] = replace(job, state=words)
            continue
        state, by = _state(words)
        code, _, number = exit_code.partition(":")
        earlier = found.get(key)
        before = (*earlier.before, earlier.state) if earlier and earlier.name == name else ()
        found[key] = Element(
            state,
            node="" if node == "None assigned" else node,
            by=by,
            exit_code=int(code) if code.isdigit() else 0,
            signal=int(number) if number.isdigit() else 0,
            before=before,
            name=name,
        )
    return waiting | found


def _state(words: str) -> tuple[str, str]:
    """`CANCELLED by 1000` -> its state and the number of the user."""
    state, _, by = words.partition(" by ")
    return state.split(" ")[0].rstrip("+"), by


def _elements(ranges: str) -> Iterator[int]:
    """`0-9,12` or `0-8:4` -> each number."""
    for part in ranges.split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = found.groups()
            yield from range(int(first), int(last or first) + 1, int(step or 1) or 1)


def limits(account: str = "", qos: str = "") -> Limits:
    """What this user may submit, as far as the cluster tells; narrowed to an account and a quality of service.

    Without an account that of SBATCH_ACCOUNT counts, else the user's own default.
    """
    settings = config() or {}
    cluster = settings.get("ClusterName", "")
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    here = [f"cluster={cluster}"] if cluster else []  # a database may serve several
    rows = _rows([*show, "assoc", f"user={_user()}", *here, "format=account,maxsubmitjobs,grpsubmitjobs,defaultqos"])
    if len(rows) > 1 and not (account := account or os.environ.get("SBATCH_ACCOUNT", "")):
        defaults = _rows([*show, "user", f"name={_user()}", "format=user,defaultaccount"])
        account = defaults[0][1] if defaults else ""
    rows = [row for row in rows if row[0] == account] or rows
    numbers = [value for row in rows for value in row[1:3]]
    names = {qos} if qos else {row[3] for row in rows if row[3]}
    if names:
        classes = _rows([*show, "qos", "format=name,maxsubmitjobsperuser,grpsubmitjobs"])
        numbers += [value for row in classes if row[0] in names for value in row[1:]]
    known = [int(value) for value in numbers if value.isdigit()]
    size, jobs = (settings.get(name, "") for name in ("MaxArraySize", "MaxJobCount"))
    return Limits(
        int(size) if size.isdigit() else None,
        int(jobs) if jobs.isdigit() else None,
        min(known, default=None),
        cluster,
        hides_jobs(settings),
    )


def _rows(command: list[str]) -> list[list[str]]:
    """What sacctmgr prints: as many fields as its `format=` names, which is the last word."""
    columns = command[-1].count(",")
    return [line.split("|") for line in ask(command).out.splitlines() if line.count("|") == columns]


def hides_jobs(settings: dict[str, str]) -> bool:
    """Whether a cluster of this configuration shows jobs to their owners alone."""
    return "jobs" in settings.get("PrivateData", "").split(",")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number that has no name here
        return str(os.getuid())


def config() -> dict[str, str] | None:
    """The cluster's configuration, e.g. AccountingStorageType, and its time as "as of"; None: Slurm does not answer."""
    answer = ask(["scontrol", "show", "config"])
    return parse_config(answer.out) if answer.code == 0 else None


def parse_config(text: str) -> dict[str, str]:
    """What `scontrol show config` printed."""
    found = dict(re.findall(r"^([A-Za-z_]+)\s*=[ \t]*(\S.*?)[ \t]*$", text, flags=re.MULTILINE))
    if now := re.match(r"Configuration data as of (\S+)$", text, flags=re.MULTILINE):
        found["as of"] = now[1]
    return found


def controller_time(settings: dict[str, str]) -> float | None:
    """The controller's clock when it gave these settings, in whole seconds since 1970; None where it does not say."""
    told = settings.get("as of", "")
    return float(told) if told.isdigit() else None


def installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def version() -> str | None:
    """Slurm's version, e.g. 24.11.5; None where it is not installed."""
    answer = ask(["sinfo", "--version"])
    return answer.out.split()[-1] if answer.code == 0 and answer.out.strip() else None


def partitions() -> list[Partition] | None:
    """All partitions, hidden ones too; None where Slurm does not answer."""
    answer = ask(["sinfo", "--all", "--noheader", "--format=%P|%a|%l|%D|%G"])
    return parse_partitions(answer.out) if answer.code == 0 else None


def parse_partitions(text: str) -> list[Partition]:
    """What `sinfo --format=%P|%a|%l|%D|%G` printed: a line for each kind of node in a partition."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 5:
            continue
        name, up, limit, nodes, gres = fields
        here = () if gres == "(null)" else (gres.split("(")[0],)
        known = found.get(name)
        counted = (known.nodes if known else 0) + (int(nodes) if nodes.isdigit() else 0)
        kinds = tuple(dict.fromkeys((known.gres if known else ()) + here))
        found[name] = Partition(name.rstrip("*"), name.endswith("*"), up == "up", limit, counted, kinds)
    return list(found.values())
