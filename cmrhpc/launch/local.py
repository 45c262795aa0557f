"""Everything missing, on this machine: each task in a process of its own, as many at once as asked for.

Tasks start from a fork server that has torch loaded, so that a task costs no import, leaves no memory behind, and may
crash without taking the run with it. A task starts when the shards it reads are there; stages are no barrier.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from cmrhpc import gpus, planning, validity
from cmrhpc.errors import BadInput, Checkpointed, CmrhpcError, Damage, Incomplete, explained
from cmrhpc.launch import records
from cmrhpc.launch.display import Display
from cmrhpc.launch.failures import Failure
from cmrhpc.launch.logs import all_to_log
from cmrhpc.planning import COHORT, FOLDS, STAGES
from cmrhpc.signals import STOP_SIGNALS, held, let_through
from cmrhpc.validity import State
from cmrhpc.workspace import Workspace


@dataclass
class Summary:
    """What a run did. missing: titles of tasks that did not start; stopped: of those that a signal ended."""

    done: int = 0
    already: int = 0
    failed: list[Failure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    damage: bool = False  # whether a task found damage or a leak
    stopped_by: int = 0  # the signal that asked the run to stop


class Outcome(NamedTuple):
    """How a task ended; it comes through a pipe as a plain tuple."""

    state: str  # done, stopped or failed, as in its record
    what: str
    where: str = ""
    mend: str = ""
    exit_code: int = 0
    kept: bool = False  # whether its output was written all the same


KILLED = Outcome(
    records.FAILED,
    "the process ended without a word (killed, or out of memory)",
    mend="see the end of its log, and the system's log for a lack of memory",
    exit_code=Incomplete.exit_code,
)


@dataclass
class _Running:
    state: State
    process: BaseProcess
    messages: Connection
    gpu: str = ""  # where there is more than one
    outcome: Outcome = KILLED
    begun: float = field(default_factory=time.monotonic)


def run(workspace: Workspace, jobs: int, plain: bool = False) -> Summary:
    """Run every missing task of a workspace, `jobs` at a time; a failed task stops only what needs it."""
    torch_there = importlib.util.find_spec("torch") is not None
    states = validity.states(workspace, check=True)
    if any(not s.done for stage in STAGES for s in states[stage] if stage != "aggregate"):
        # Even a report that agrees with the predictions that are there: they are about to change.
        states["aggregate"] = [replace(s, done=False) for s in states["aggregate"]]
    summary = Summary(already=sum(s.done for stage in STAGES for s in states[stage]))
    todo = [s for stage in STAGES for s in states[stage] if not s.done]
    if any(s.task.stage in ("synthesize", "refine", "classify") for s in todo) and not torch_there:
        raise BadInput(
            "torch is not installed", "", "pip install '.[train]' in the clone, or run where it is installed"
        )
    for finished in (s.task for stage in STAGES for s in states[stage] if s.done):
        workspace.clear_checkpoints(finished)
    workspace.remove_stale(workspace.root)
    if not todo:
        return summary
    context = multiprocessing.get_context("forkserver")
    # Elsewhere system libraries do not outlive a fork.
    context.set_forkserver_preload(["cmrhpc.launch.preload"] if torch_there and sys.platform == "linux" else [])
    display = Display(states, plain, jobs)
    made = {s.task.output for stage in STAGES for s in states[stage] if s.done} | _made_by_ingest(states)
    reads = {s.task.output: planning.inputs(workspace.study, s.task) for s in todo}
    running: dict[Connection, _Running] = {}
    visible = gpus.usable()
    stop = _StopFlag()
    with stop.listening(), _none_left(running), display:
        _start_server(context, stop)
        while todo or running:
            while todo and len(running) < jobs and not stop.number:
                state = _next_ready(todo, reads, made, bool(running))
                if state is None:
                    break
                todo.remove(state)
                running_task = _start(context, workspace, state, _gpu(visible, running))
                running[running_task.messages] = running_task
                display.started(state)
            if not running:
                break
            if stop.number:
                display.stopping()
                for task in running.values():
                    with contextlib.suppress(OSError):
                        task.process.kill() if stop.at_once else task.process.terminate()
            for ready in wait(list(running), timeout=0.5):
                task = running[ready]  # type: ignore[index]
                if not _listen(task, display):
                    del running[task.messages]
                    _finish(workspace, task, made, summary, display, bool(stop.number))
            display.tick()
    summary.stopped_by = stop.number
    summary.missing = [s.task.title for s in todo]
    return summary


@contextlib.contextmanager
def _none_left(running: dict[Connection, _Running]) -> Iterator[None]:
    """On leaving by an error (a closed output pipe), ask running tasks to checkpoint.

    Otherwise this process would wait hours for them.
    """
    try:
        yield
    finally:
        for task in running.values():
            with contextlib.suppress(OSError):
                task.process.terminate()


def _made_by_ingest(states: dict[str, list[State]]) -> set[str]:
    return {COHORT, FOLDS} if states["ingest"][0].done else set()


def _next_ready(todo: list[State], reads: dict[str, list[str]], made: set[str], busy: bool) -> State | None:
    """The first task whose inputs are all there; the report comes last, with whatever predictions there are.

    reads: a task's output -> its inputs.
    """
    for state in todo:
        if state.task.stage != "aggregate" and all(path in made for path in reads[state.task.output]):
            return state
    only_report = [s for s in todo if s.task.stage == "aggregate"]
    some = any(path.startswith("predictions/") for path in made)
    return only_report[0] if only_report and not busy and some else None


def _start_server(context: Any, stop: _StopFlag) -> None:
    """Start the fork server and wait until it has loaded torch, or until a stop is asked for.

    A signal to the process group stays blocked in the server, and in each task until that task unblocks it.
    """
    with held():
        resource_tracker.ensure_running()  # lets two of the signals through again
    with held(), _short_temporary_folder():
        forkserver.ensure_running()
    failed: list[Exception] = []

    def begin() -> None:
        try:
            context.Process(target=_nothing, daemon=True).start()
        except (OSError, EOFError) as error:
            failed.append(error)

    waiting = threading.Thread(target=begin, daemon=True)
    waiting.start()
    while waiting.is_alive() and not stop.number:
        waiting.join(0.2)
    if waiting.is_alive():  # it would load torch to the end, with our output held open, and only then see that we left
        with contextlib.suppress(OSError, TypeError):
            os.kill(getattr(forkserver._forkserver, "_forkserver_pid", None), signal.SIGKILL)  # type: ignore[arg-type]
        waiting.join(10)
    if failed and not stop.number:
        mend = "is there memory for torch? then run the same command again"
        raise Incomplete(f"the process that starts the tasks ended ({type(failed[0]).__name__})", "", mend)


@contextlib.contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """The path of the fork server's socket has 107 characters at most, of which its own names take 32."""
    before = tempfile.gettempdir()
    places = [before, "/tmp", "/var/tmp", "/dev/shm"]
    short = [place for place in places if len(os.fsencode(place)) <= 70 and os.access(place, os.W_OK | os.X_OK)]
    if not short:
        what = "the path of the folder for temporary files is too long for a socket"
        raise BadInput(what, before, "set TMPDIR to a folder with a path of at most 70 characters")
    tempfile.tempdir = short[0]
    try:
        yield
    finally:
        tempfile.tempdir = before


def _nothing() -> None:
    """Runs as soon as the fork server is ready."""


def _gpu(visible: list[str], running: dict[Connection, _Running]) -> str:
    """The GPU of the next task; empty where there is no choice."""
    taken = [task.gpu for task in running.values()]
    return gpus.least_used(visible, taken) if len(visible) > 1 else ""


def _start(context: Any, workspace: Workspace, state: State, gpu: str) -> _Running:
    receive, send = context.Pipe(duplex=False)
    arguments = (str(workspace.root), state.task.stage, state.index, send, gpu)
    process = context.Process(target=_child, args=arguments, name=state.task.title)
    try:
        with held():  # should the fork server have died, a new one starts here
            process.start()
    except (OSError, EOFError) as error:
        what = f"{state.task.title}: its process could not be started ({type(error).__name__})"
        raise Incomplete(what, "", "is there memory left? then run the same command again") from None
    finally:
        send.close()
    return _Running(state, process, receive, gpu)


def _listen(task: _Running, display: Display) -> bool:
    """Take one message; False when the child has closed its end."""
    try:
        kind, *values = task.messages.recv()
    except (EOFError, OSError):
        return False
    if kind == "progress":
        display.progress(task.state, *values)
    else:
        task.outcome = Outcome(kind, *values)
    return True


def _finish(
    workspace: Workspace, task: _Running, made: set[str], summary: Summary, display: Display, stopping: bool
) -> None:
    task.process.join()
    state, outcome = task.state, task.outcome
    if outcome == KILLED and stopping:
        outcome = Outcome(records.STOPPED, "ended before it could save a checkpoint")
        records.write_record(workspace, state.task.stage, state.index, outcome.state, outcome.what)
    if outcome.state == records.DONE:
        made.update({COHORT, FOLDS} if state.task.stage == "ingest" else {state.task.output})
        summary.done += 1
    elif outcome.state == records.FAILED:
        what, where, mend, code = outcome.what, outcome.where, outcome.mend, outcome.exit_code
        log = workspace.log_path(state.task.stage, state.index)
        summary.damage = summary.damage or code == Damage.exit_code
        outcome = outcome._replace(state=records.DONE if outcome.kept else records.FAILED)
        told = str(CmrhpcError(what, where, mend))
        records.write_record(workspace, state.task.stage, state.index, outcome.state, told)
        # What the report lacks is told already.
        if not (outcome.kept and code == Incomplete.exit_code and (summary.failed or summary.stopped)):
            summary.failed.append(Failure(state.task.title, what, where, mend, str(log)))
    else:
        summary.stopped.append(state.task.title)
    display.finished(state, outcome.state, outcome.what, time.monotonic() - task.begun)


class _StopFlag:
    """Notes the first stop signal: the tasks are asked to checkpoint. After a second SIGINT they are killed."""

    number = 0
    at_once = False

    @contextlib.contextmanager
    def listening(self) -> Any:
        def handle(number: int, frame: Any) -> None:
            self.at_once = self.at_once or (self.number == signal.SIGINT == number)
            self.number = self.number or number

        try:
            before = {n: signal.signal(n, handle) for n in STOP_SIGNALS}
        except ValueError:  # not the main thread: the caller handles signals
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _child(root: str, stage: str, index: int, messages: Connection, gpu: str = "") -> None:
    """One task in its own process: everything it prints goes to its log. gpu: the one that it sees, empty for all."""
    if gpu:  # CUDA, which nothing has started yet, reads this
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from cmrhpc.stages.task import StopRequest, run_task, stop_on_signals

    request = StopRequest()
    last, parent = 0.0, os.getppid()

    def tell(*message: Any) -> None:
        with contextlib.suppress(OSError):
            messages.send(message)

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.3 or done == total:
            last = now
            tell("progress", done, total)
            if os.getppid() != parent:  # the run that started this task is gone
                request.number = request.number or signal.SIGTERM

    with stop_on_signals(request), contextlib.ExitStack() as log:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the run passes it on
        let_through()
        try:
            workspace = Workspace(root)
            log.enter_context(all_to_log(workspace, stage, index))
            if gpu:
                print(f"on GPU {gpu}")
            records.write_record(workspace, stage, index, records.RUNNING)
            message = run_task(workspace, stage, index, progress, request)
            print(message)
            records.write_record(workspace, stage, index, records.DONE, message)
            tell(*Outcome(records.DONE, message))
        except Checkpointed as error:
            print(error)
            records.write_record(workspace, stage, index, records.STOPPED, error.what)
            tell(*Outcome(records.STOPPED, error.what))
        except BaseException as error:
            told = explained(error, see="the log holds the traceback")
            if isinstance(error, OSError):  # its file may bear a patient's name, so it is not told
                traceback.print_tb(error.__traceback__)
            elif told is not error:
                traceback.print_exc()
            print(told)
            tell(*Outcome(records.FAILED, told.what, told.where, told.mend, told.exit_code, told.kept))
    messages.close()
