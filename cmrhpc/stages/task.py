"""Runs one task: looks at its inputs, calls its stage, and knows what to do when it is asked to stop."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from cmrhpc import planning, shards
from cmrhpc.errors import BadInput, Incomplete, UsageError
from cmrhpc.planning import COHORT, FOLDS, Task
from cmrhpc.signals import STOP_SIGNALS
from cmrhpc.stages.context import Context, Progress
from cmrhpc.validity import Judge
from cmrhpc.workspace import Workspace


@dataclass
class StopRequest:
    """Set by a signal; trainers look at it between two steps, save a checkpoint and stop."""

    number: int = 0

    def __call__(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Turn the first stop signal into a request; a second SIGINT interrupts at once. The handler is re-entrant."""

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        request.number = request.number or number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_task(workspace: Workspace, stage: str, index: int) -> Task:
    """The task of a number. Raises UsageError when the stage has none of that number."""
    tasks = workspace.tasks(stage)
    if not 0 <= index < len(tasks):
        raise UsageError(f"index {index} is out of range", f"stage {stage} has {len(tasks)} tasks", "see `cmrhpc plan`")
    return tasks[index]


def run_task(
    workspace: Workspace,
    stage: str,
    index: int,
    progress: Progress = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Run one task and return what happened, in words. Done work is not done again.

    Raises Incomplete when an input is not there yet, BadInput when one is damaged, and what the stage raises.
    """
    task = find_task(workspace, stage, index)
    if task.output not in workspace.wanted(stage):
        return f"{task.title}: the study no longer asks for this task; nothing to do"
    for folder in (workspace.path(task.output).parent, workspace.checkpoint_folder(task)):
        workspace.remove_stale(folder)
    judge = Judge(workspace, check=True, raw=stage == "ingest")
    # A report is made again: whether a patient leaks is known to its making alone.
    done = stage != "aggregate" and not judge.reason(task)
    judge.correct_index((COHORT, FOLDS) if stage == "ingest" else (task.output,))
    if done:
        workspace.clear_checkpoints(task)
        return f"{task.title}: already done"
    if workspace.path(task.output).is_dir():  # it would be found at the end of hours of training
        what = "a folder has the name of the file to be written"
        raise BadInput(what, str(workspace.path(task.output)), "remove it, then run the same command again")
    if stage == "ingest":
        from cmrhpc.stages.ingest import run_ingest

        return run_ingest(workspace, judge, progress, should_stop)
    if stage == "aggregate":
        from cmrhpc.stages.aggregate import run_aggregate

        return run_aggregate(workspace)
    inputs = _checked_inputs(workspace, judge, task)
    if importlib.util.find_spec("torch") is None:
        raise BadInput(
            "torch is not installed here", sys.prefix, "pip install '.[train]' in the clone, or use the container"
        )
    context = Context(workspace, task, inputs, should_stop, progress)
    if stage == "synthesize" and workspace.study.generators[task.generator].external:
        from cmrhpc.stages.external import take_in as work
    elif stage == "synthesize":
        from cmrhpc.stages.synthesize import synthesize as work
    elif stage == "refine":
        from cmrhpc.stages.refine import refine as work
    else:
        from cmrhpc.stages.classify import classify as work
    work(context)
    return f"{task.title}: done in {time.time() - context.begun:.0f} s"


def _checked_inputs(workspace: Workspace, judge: Judge, task: Task) -> dict[str, shards.Shard]:
    """The shards a task reads, each with its checksum checked and valid for the study."""
    found = {}
    for path in planning.inputs(workspace.study, task):
        if wrong := judge.verdict(path):
            judge.correct_index(name for name, entry in judge.index.items() if entry.wrong)
            if wrong.startswith("damaged: "):
                mend = "run its stage again, or `cmrhpc run`: what is damaged is made again"
                raise BadInput(f"{task.title}: its input is {wrong}", path, mend)
            mend = "run the earlier stage first: `cmrhpc plan` shows what is missing"
            raise Incomplete(f"{task.title}: its input is not there: {path}", f"{path}: {wrong}", mend)
        found[path] = shards.read_shard(workspace.path(path))
    return found
