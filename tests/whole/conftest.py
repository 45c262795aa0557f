"""One small study, run whole through the real commands, shared by the tests that look at its results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cmrhpc.planning import inputs
from cmrhpc.shards import read_shard
from cmrhpc.stages.context import Context
from cmrhpc.workspace import Workspace
from tests.conftest import STUDY

Command = Callable[..., subprocess.CompletedProcess[str]]


def cmrhpc(*arguments: str | Path, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "cmrhpc.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **({"timeout": 500} | more))  # type: ignore[call-overload]
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {done.stdout}\n{done.stderr}")
    return done


def make_workspace(root: Path, text: str = STUDY, patients: int = 12) -> Path:
    """A phantom and a study file, nothing run yet."""
    cmrhpc("phantom", root / "raw", "--patients", patients, "--seed", 3)
    (root / "study.toml").write_text(text)
    return root


def context_of(workspace: Workspace, arm: str, fold: int = 0, ratio: float | None = None) -> Context:
    """What the classify stage gets for an arm, at its first ratio where none is told."""
    tasks = workspace.tasks("classify")
    task = next(t for t in tasks if t.arm == arm and t.fold == fold and ratio in (None, t.ratio))
    shards = {path: read_shard(workspace.path(path)) for path in inputs(workspace.study, task)}
    return Context(workspace, task, shards, lambda: False, lambda *_: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose study is done. Tests read it; those that change it take `copied`."""
    root = make_workspace(tmp_path_factory.mktemp("whole"))
    cmrhpc("run", root)
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished workspace that a test may damage."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))
