"""Outcome of the latest attempt at each task: one small JSON file beside its log.

For people; truth lives in the shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cmrhpc import files
from cmrhpc.errors import BadInput
from cmrhpc.workspace import Workspace

RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"


@dataclass(frozen=True)
class Record:
    """state: running, done, failed or stopped (checkpointed). start: kernel start tick of the process.

    job, element: Slurm's numbers of the array (or of the job that is none) and of its element; empty outside Slurm.
    """

    state: str
    reason: str = ""
    host: str = ""
    pid: int = 0
    start: str = ""
    time: float = 0.0
    job: str = ""
    element: str = ""

    @property
    def key(self) -> str:
        """How squeue and sacct call it, as `slurm.queue` keys it; empty outside Slurm."""
        return f"{self.job}_{self.element}" if self.job and self.element else self.job

    def alive(self) -> bool:
        """Whether the process still runs; of another host, which only Slurm could ask, it is believed for a day."""
        ended = files.has_ended(self.pid, self.start) if self.host == files.host_name() else None
        return abs(time.time() - self.time) < files.DAY if ended is None else not ended


def record_path(workspace: Workspace, stage: str, index: int) -> Path:
    return workspace.log_path(stage, index).with_suffix(".json")


def write_record(workspace: Workspace, stage: str, index: int, state: str, reason: str = "") -> None:
    """Note the state; a file system that refuses fails no task by that."""
    told = os.environ.get
    job = told("SLURM_ARRAY_JOB_ID") or told("SLURM_JOB_ID") or ""
    element = told("SLURM_ARRAY_TASK_ID", "") if told("SLURM_ARRAY_JOB_ID") else ""
    process = files.host_name(), os.getpid(), files.process_start()
    record = Record(state, reason, *process, time.time(), job, element)
    with contextlib.suppress(BadInput):
        files.atomic_write(record_path(workspace, stage, index), json.dumps(asdict(record)))


def read_records(workspace: Workspace) -> list[tuple[str, int, Record]]:
    """Stage, index and record of every task of which one can be read."""
    found = []
    for path in sorted((workspace.root / "logs").glob("*_*.json")):
        stage, _, index = path.stem.rpartition("_")
        if index.isdigit() and (record := read_record(path)):
            found.append((stage, int(index), record))
    return found


def read_record(path: Path) -> Record | None:
    """The record, or None where there is none that can be read."""
    try:
        record = Record(**json.loads(files.read_plain(path)))
        right = isinstance(record.pid, int) and isinstance(record.time, int | float)
        right = right and all(
            isinstance(text, str) for text in (record.reason, record.host, record.start, record.job, record.element)
        )
        return record if right else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
