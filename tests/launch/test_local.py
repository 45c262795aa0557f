"""A local run: what its children tell of their faults, which GPU each gets, and where its fork server lives."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from cmrhpc import gpus
from cmrhpc.errors import BadInput
from cmrhpc.launch import local
from cmrhpc.stages import task
from cmrhpc.study import Compute
from cmrhpc.workspace import Workspace
from tests.whole.conftest import cmrhpc, make_workspace


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


@pytest.mark.parametrize(
    ("visible", "devices", "found"),
    [
        (None, ["null", "nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm"], ["0", "1"]),
        (None, ["null"], []),
        ("2,0", ["nvidia0"], ["2", "0"]),
        ("GPU-8a5e, MIG-1c2d", [], ["GPU-8a5e", "MIG-1c2d"]),
        ("0,-1,1", [], ["0"]),
        ("NoDevFiles", ["nvidia0"], []),
        ("", ["nvidia0"], []),
    ],
)
def test_visible_gpus_are_those_that_cuda_sees(visible: str | None, devices: list[str], found: list[str]) -> None:
    assert gpus.listed(visible, devices) == found


def test_tasks_share_gpus_evenly() -> None:
    taken: list[str] = []
    for _ in range(5):
        taken.append(gpus.least_used(["a", "b"], taken))
    assert taken == ["a", "b", "a", "b", "a"]
    taken.remove("b")
    assert gpus.least_used(["a", "b"], taken) == "b"


def test_every_child_sees_its_gpu_and_computes_on_nothing_else(tmp_path: Path, study_text: str) -> None:
    """Two made-up GPUs are two tasks at once; none of them falls back to the CPU unasked."""
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch has no code for GPUs")
    root = make_workspace(tmp_path, study_text)
    environment = {name: value for name, value in os.environ.items() if name != "CMRHPC_DEVICE"}
    done = cmrhpc("run", root, check=False, env=environment | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})
    assert done.returncode == 4
    assert "cannot use the GPU of this task" in done.stderr
    logs = "".join(path.read_text() for path in (root / "logs").glob("synthesize_*.log"))
    for gpu in ("GPU-a", "GPU-b"):
        assert f"on GPU {gpu}\n" in logs
        assert f"where: GPU {gpu}\n" in logs
    cpu = environment | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "CMRHPC_DEVICE": "cpu"}
    assert "done" in cmrhpc("task", root, "--stage", "synthesize", "--index", "0", env=cpu).stdout


def test_a_device_is_believed_when_it_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmrhpc.stages.device import choose_device

    monkeypatch.setenv("CMRHPC_DEVICE", "meta")  # it has memory for a tensor and computes nothing
    with pytest.raises(BadInput, match='no device "meta"'):
        choose_device(Compute())
    monkeypatch.delenv("CMRHPC_DEVICE")
    for name, value, refused in (("CUDA_VISIBLE_DEVICES", "-1", False), ("SLURM_JOB_GPUS", "0", True)):
        with monkeypatch.context() as here:
            here.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            here.setattr("torch.cuda.is_available", lambda: False)
            here.setenv(name, value)
            if refused:
                with pytest.raises(BadInput, match="cannot use the GPU of this task"):
                    choose_device(Compute())
            else:
                assert choose_device(Compute()).type == "cpu"


def test_a_long_path_for_temporary_files_stops_no_run(tmp_path: Path, study_text: str) -> None:
    """The kernel takes no longer names for sockets. Without a device to compute on, ingest alone is done."""
    root = make_workspace(tmp_path / "ws", study_text)
    long = tmp_path / ("x" * 90)
    long.mkdir()
    done = cmrhpc("run", root, check=False, env=os.environ | {"TMPDIR": str(long), "CMRHPC_DEVICE": "meta"})
    assert (root / "folds.h5").exists(), done.stderr
