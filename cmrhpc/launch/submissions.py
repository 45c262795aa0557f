"""The record of what was submitted to Slurm: `submissions/JOB.json` in the workspace, one file per job array.

It tells which task runs as which element, so that status can ask Slurm about it. It costs no
result when one is missing or damaged; while its job is queued `submit` stops, for its tasks could run twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cmrhpc import files
from cmrhpc.hashing import sha256_of
from cmrhpc.launch.slurm import Element
from cmrhpc.planning import STAGES
from cmrhpc.workspace import Workspace

_NAME = re.compile(r"(\d+)\.json")


@dataclass(frozen=True)
class Submission:
    """One job array.

    job: Slurm's number. cluster: its name, empty where unknown. elements: element k runs the task indices elements[k]
    of `stage`, several where tasks share a GPU. time: seconds since 1970. time_limit_s: what one element may take, 0
    where unknown. memory: as sbatch takes it. gpus: per element. depends_on: jobs that it waits for.
    name: of the job; no other has it.
    """

    job: str
    stage: str
    elements: tuple[tuple[int, ...], ...]
    time: float
    cluster: str = ""
    profile: str = ""
    time_limit_s: int = 0
    memory: str = ""
    gpus: int = 0
    depends_on: tuple[str, ...] = ()
    name: str = ""

    def key(self, element: int) -> str:
        """How squeue and sacct call an element, as `slurm.queue` keys it. An array of one element is a plain job."""
        return f"{self.job}_{element}" if len(self.elements) > 1 else self.job

    def find(self, element: int, told: Mapping[str, Element]) -> Element | None:
        """One of its elements among those that Slurm tells of; None where it does not.

        A number comes back when a cluster starts counting anew: then the name is another.
        """
        found = told.get(self.key(element))
        return found if found and (found.name == self.name or not (found.name and self.name)) else None


def folder(workspace: Workspace) -> Path:
    return workspace.root / "submissions"


def write_submission(workspace: Workspace, submission: Submission) -> None:
    """Note a submitted array. Raises BadInput when the file system refuses."""
    files.atomic_write(path_of(workspace, submission), as_text(submission))


def owner(path: Path) -> int:
    """Number of the user who wrote a record; our own where that cannot be told."""
    try:
        return os.stat(path).st_uid
    except OSError:
        return os.getuid()


def path_of(workspace: Workspace, submission: Submission) -> Path:
    return folder(workspace) / f"{submission.job}.json"


def read_submissions(workspace: Workspace) -> list[Submission]:
    """All that can be read, oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder(workspace)):
            if _NAME.fullmatch(name) and (submission := _read(folder(workspace) / name)):
                found.append(submission)
    return sorted(found, key=lambda submission: (submission.time, int(submission.job)))


def _read(path: Path) -> Submission | None:
    found = read_one(path)
    return found if found and found.job == path.stem else None


def as_text(submission: Submission) -> str:
    """JSON, with its own sha256."""
    told = asdict(submission)
    return json.dumps(told | {"sha256": sha256_of(told)})


def read_one(path: Path) -> Submission | None:
    """The submission that a file tells of; None where it cannot be read. What a newer version adds is left out."""
    try:
        told = json.loads(files.read_plain(path))
        if told.pop("sha256", None) not in (None, sha256_of(told)):
            return None
        told = {field.name: told[field.name] for field in fields(Submission) if field.name in told}
        told["elements"] = tuple(tuple(int(index) for index in element) for element in told["elements"])
        told["depends_on"] = tuple(str(job) for job in told["depends_on"])
        made = Submission(**told)
        texts = (made.job, made.cluster, made.profile, made.memory, made.name)
        right = all(isinstance(text, str) for text in texts) and made.stage in STAGES
        right = right and all(isinstance(number, int | float) for number in (made.time, made.time_limit_s, made.gpus))
        return made if right else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
