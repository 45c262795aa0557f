"""What the launch tests share: workspaces, and stand-ins where a real Slurm cannot be made to say something."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cmrhpc.planning import COHORT, Task
from cmrhpc.workspace import Workspace
from tests.outputs import write_output

Put = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts a bash script under some name in front of the path."""

    def put(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return put


@pytest.fixture
def workspace(tmp_path: Path, study_text: str) -> Workspace:
    """A workspace in which nothing is done."""
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "study.toml").write_text(study_text)
    return Workspace(tmp_path / "ws")


@pytest.fixture
def ready(workspace: Workspace) -> Workspace:
    """A workspace of which only the cohort is there."""
    write_output(workspace, Task("ingest"), COHORT)
    write_output(workspace, Task("ingest"), Task("ingest").output)
    return workspace
