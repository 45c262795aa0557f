"""A local run: what its children tell of their faults, which GPU each gets, and where its fork server lives."""

from __future__ import annotations

import multiprocessing

import pytest

from cmrhpc.launch import local
from cmrhpc.stages import task
from cmrhpc.workspace import Workspace


def test_a_child_tells_what_a_task_raised_and_leaves_its_traceback_in_the_log(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    raised: list[tuple[Exception, str, str]] = [
        (RuntimeError("CUDA out of memory. Tried"), "out of memory", "lower --jobs, tasks_per_gpu"),
        (ValueError("a slip"), "ValueError: a slip", "the log holds the traceback"),
    ]
    for error, what, mend in raised:

        def fails(*_: object, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(task, "run_task", fails)
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=local._child, args=(str(workspace.root), "refine", 0, send))
        with capfd.disabled():  # the child sends its own streams to the log, not those of pytest
            process.start()
            told = receive.recv()
            process.join()
        assert told[:2] == ("failed", what)
        assert told[3].startswith(mend)
        assert "Traceback" in (workspace.root / "logs/refine_0.log").read_text()
