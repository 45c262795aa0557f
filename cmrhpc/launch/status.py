"""What is done, running, waiting and failed, in words and with the log to read."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field

from cmrhpc.launch import records
from cmrhpc.workspace import Workspace


@dataclass
class StageStatus:
    """Counts of one stage; lines: what is worth reading of its unfinished tasks."""

    total: int = 0
    done: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return self.total - self.done


def status(workspace: Workspace) -> dict[str, StageStatus]:
    """State of every stage: shards say what is done, records and living processes say the rest."""
    folder = workspace.root / "logs"
    recorded = set(os.listdir(folder)) if folder.is_dir() else set()
    found = {}
    for stage, states in workspace.states().items():
        row = StageStatus(total=len(states))
        for state in states:
            path = records.record_path(workspace, stage, state.index)
            record = None if state.done or path.name not in recorded else records.read_record(path)
            log = workspace.log_path(stage, state.index)
            if state.done:
                row.done += 1
            elif record and record.state == records.RUNNING and record.alive():
                row.running += 1
                row.lines.append(f"running  {state.task.title} on {record.host}: {log}")
            elif record and record.state == records.RUNNING:
                row.failed += 1
                row.lines.append(f"failed   {state.task.title}: its process ended without a word (killed?): {log}")
            elif record and record.state == records.FAILED:
                row.failed += 1
                reason = (record.reason.splitlines() or [""])[0]
                row.lines.append(f"failed   {state.task.title}: {reason}: {log}")
            else:
                row.waiting += 1
        found[stage] = row
    return found


def print_status(root: str, as_json: bool) -> int:
    rows = status(Workspace(root))
    if as_json:
        keys = ("total", "done", "missing", "running", "waiting", "failed")
        print(json.dumps({"stages": {stage: {k: getattr(row, k) for k in keys} for stage, row in rows.items()}}))
        return 0
    print(f"{'stage':<11}{'total':>7}{'done':>7}{'running':>9}{'waiting':>9}{'failed':>8}")
    for stage, row in rows.items():
        print(f"{stage:<11}{row.total:>7}{row.done:>7}{row.running:>9}{row.waiting:>9}{row.failed:>8}")
    for row in rows.values():
        for line in row.lines[:10]:
            print(line)
        if len(row.lines) > 10:
            print(f"... and {len(row.lines) - 10} more")
    return 0


def watch(root: str, seconds: float = 5.0) -> int:
    """Print the status every few seconds until everything is done."""
    while True:
        print("\033[2J\033[H", end="")
        print_status(root, False)
        rows = status(Workspace(root))
        if all(row.done == row.total for row in rows.values()):
            return 0
        time.sleep(seconds)
