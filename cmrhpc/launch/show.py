"""Shows the status: a table and grouped lines for people, one object for scripts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

from cmrhpc.errors import printable
from cmrhpc.launch import slurm
from cmrhpc.launch.status import FAILED, RUNNING, WAITING, Status, TaskStatus, status
from cmrhpc.workspace import Workspace

LINES = 10  # per stage


def as_json(found: Status) -> dict[str, Any]:
    """What `status --json` prints."""
    stages, tasks = {}, []
    for stage, row in found.stages.items():
        counts = {word: row.count(word) for word in (RUNNING, WAITING, FAILED)}
        hours = {"gpu_hours_left": row.gpu_hours, "gpu_hours_from": row.source}
        stages[stage] = {"total": row.total, "done": row.done, "missing": row.missing} | counts | hours
        for task in row.tasks:
            named = {"stage": stage, "index": task.state.index, "task": task.state.task.title, "state": task.word}
            tasks.append(named | {"reason": task.reason, "log": task.log, "job": task.job})
    return {"stages": stages, "tasks": tasks, "slurm": found.slurm, "accounting": found.accounting}


def as_text(found: Status) -> str:
    """The table, and below it what runs, what waits and why, what failed and where its log is."""
    lines = [f"{'stage':<11}{'total':>7}{'done':>7}{'running':>9}{'waiting':>9}{'failed':>8}{'GPU-hours left':>16}"]
    for stage, row in found.stages.items():
        numbers = "".join(f"{row.count(word):>{width}}" for word, width in ((RUNNING, 9), (WAITING, 9), (FAILED, 8)))
        hours = (
            "?" if row.gpu_hours is None else f"{row.gpu_hours:.1f}" if row.gpu_hours >= 0.1 else _small(row.gpu_hours)
        )
        source = f"  {row.source}" if row.source else ""
        lines.append(f"{stage:<11}{row.total:>7}{row.done:>7}{numbers}{hours:>16}{source}")
    for row in found.stages.values():
        groups = _groups(row.tasks)
        lines += [_line(*group) for group in groups[:LINES]]
        if len(groups) > LINES:
            lines.append(f"... and {sum(len(tasks) for _, _, tasks in groups[LINES:])} more")
    if found.slurm:
        lines.append(found.slurm)
    return printable("\n".join(lines))


def _small(hours: float) -> str:
    return "0" if not hours else "< 0.1"


def _groups(tasks: list[TaskStatus]) -> list[tuple[str, str, list[TaskStatus]]]:
    """Tasks that share state and reason, in order of urgency."""
    found: dict[tuple[str, str], list[TaskStatus]] = {}
    for word in (FAILED, RUNNING, WAITING):
        for task in tasks:
            if task.word == word:
                # Each running task has a line of its own.
                alone = f"{task.reason}\0{task.state.index}" if word == RUNNING else task.reason
                found.setdefault((word, alone), []).append(task)
    return [(word, reason.partition("\0")[0], group) for (word, reason), group in found.items()]


def _line(word: str, reason: str, tasks: list[TaskStatus]) -> str:
    first = tasks[0]
    more = f" and {len(tasks) - 1} more of {first.state.task.stage}" if len(tasks) > 1 else ""
    job = f" (job {first.job})" if first.job and not more else ""
    log = f": {first.log}" if first.log else ""
    return f"{word:<8} {first.state.task.title}{more}{job}: {reason}{log}"


def print_status(root: str, json_wanted: bool) -> int:
    found = status(Workspace(root))
    print(json.dumps(as_json(found)) if json_wanted else as_text(found))
    return 0


def watch(root: str, seconds: float | None = None) -> int:
    """Show the status anew until nothing runs and nothing waits in a queue. Not on a terminal: each change once.

    Every 5 s, or every 30 s where Slurm is queried, to spare the controller.
    """
    seconds = (30.0 if slurm.installed() else 5.0) if seconds is None else seconds
    terminal = sys.stdout.isatty()
    shown, quiet = "", 0
    while True:
        found = status(Workspace(root))
        text = as_text(found)
        if terminal:
            # One write, over the old lines: no flicker, and what is longer than the screen does not scroll.
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in [*text.splitlines()[: height - 2], time.strftime("%H:%M:%S")]]
            sys.stdout.write("\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J")
            sys.stdout.flush()
        elif text != shown:
            print(text, flush=True)
        shown = text
        # Between two tasks of `cmrhpc run` nothing runs for a moment: only twice in a row is the end.
        quiet = 0 if found.active else quiet + 1
        if quiet > 1 or not any(row.missing for row in found.stages.values()):
            if terminal:
                sys.stdout.write(f"\033[H\033[J{text}\n")
            return 0
        time.sleep(seconds)
