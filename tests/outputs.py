"""Outputs of tasks that no stage has computed, and what a killed process leaves of one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from cmrhpc import files, planning, shards
from cmrhpc.planning import COHORT, FOLDS, STAGES, Task
from cmrhpc.workspace import Workspace


def write_output(workspace: Workspace, task: Task, output: str, value: float = 0.0, seconds: float = 1.0) -> None:
    """An empty but valid shard for one output, as its stage would write it."""
    reads = [COHORT] if output == FOLDS else planning.inputs(workspace.study, task)
    inputs = {path: shards.read_header(workspace.path(path)).content_sha256 for path in reads}
    shards.write_shard(
        workspace.path(output),
        {"image": np.full((1, 1, 2, 2), value, "f4")},
        schema="images-1",
        task=task.to_json(),
        settings=planning.settings(workspace.study, task, output),
        inputs=inputs,
        seed=planning.seed(workspace.study, task, output),
        info={"seconds": seconds},
    )


def write_all(workspace: Workspace) -> None:
    write_output(workspace, Task("ingest"), COHORT)
    for stage in STAGES[:-1]:
        for task in planning.tasks(workspace.study, stage):
            write_output(workspace, task, task.output)


def name_of_ended_process(path: Path) -> Path:
    """Where a process that has ended would have written a file before its final name."""
    with subprocess.Popen(["true"]) as ended:
        start = files.process_start(ended.pid)
    return path.with_name(f".{path.name}.tmp.{files.host_name()}.{ended.pid}.{start}-1")
