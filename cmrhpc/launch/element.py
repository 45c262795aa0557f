"""What a job of submitit does on the compute node: it runs `task.sh`, passes signals on, and ends with its exit code.

This side of the job stays outside the container, where Slurm's commands are. submitit's own way of putting a job back
into the queue is not used: its handlers are replaced, and task.sh decides.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from cmrhpc.errors import Checkpointed, Incomplete

TASK_SH = Path(__file__).with_name("task.sh")
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


def run_element(workspace: str, stage: str, tasks: Sequence[int], settings: dict[str, str]) -> str:
    """Run the tasks of one array element side by side; `settings` are variables for task.sh. Returns what happened.

    Raises Incomplete when a task fails. Under Slurm the process then ends with the worst exit code of its tasks, and
    with 75, leaving no result, when the job has gone back into the queue.
    """
    _remove_left_over()
    here = {"CMRHPC_TASKS": " ".join(map(str, tasks))} | settings
    if "CMRHPC_CONTAINER" not in settings:  # this environment's `cmrhpc`, whatever PATH the job has
        here |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "CMRHPC_CONTAINER": "",
        }
    # Of the two Apptainer reads the older one only where the other is not set.
    own = os.environ.get("APPTAINER_BIND") or os.environ.get("SINGULARITY_BIND")
    if "APPTAINER_BIND" in settings and own:
        here["APPTAINER_BIND"] += f",{own}"

    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    with _handling(pass_on):
        child = subprocess.Popen(["bash", str(TASK_SH), stage, workspace], env=os.environ | here)
        for number in early:
            child.send_signal(number)
        code = child.wait()

    said = f"{stage} {here['CMRHPC_TASKS']}: exit code {code}"
    if code and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        if code == Checkpointed.exit_code:
            sys.exit(code)
        # submitit would turn every failure into 1, and Slurm's accounting would not know which.
        atexit.register(_leave, code if code > 0 else 128 - code)
    if code:
        logs = ", ".join(f"{workspace}/logs/{stage}_{index}.log" for index in tasks)
        raise Incomplete(said, logs, "see the log, then submit again")
    return said


@contextlib.contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Replace the handlers of submitit for a while. In a thread (some executors of users) signals are not ours."""
    try:
        before = {number: signal.signal(number, handle) for number in PASSED_ON}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _remove_left_over() -> None:
    """submitit refuses to write a result where an earlier run of this job was killed while it wrote its own."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        from submitit import JobEnvironment

        path = JobEnvironment().paths.result_pickle
        path.with_suffix(f"{path.suffix}.save_tmp").unlink(missing_ok=True)
