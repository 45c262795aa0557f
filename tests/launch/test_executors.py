"""`cmrhpc.submit` with the executor of README on Slurm: what sbatch is given, and what is noted. Programs stand in for
Slurm's; see tests/cluster for the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import submitit

import cmrhpc
from cmrhpc.errors import BadInput, UsageError
from cmrhpc.workspace import Workspace
from tests.launch.conftest import Put

PROFILE = '[environment]\nlines = ["true"]\n[stages.refine]\ngpus = "2"\n'
STAGES = ("ingest", "synthesize", "refine", "classify", "aggregate")


@pytest.fixture
def sent(program: Put, tmp_path: Path) -> Path:
    """Where sbatch leaves the files that it is given, as NUMBER.sh."""
    place = tmp_path / "sent"
    place.mkdir()
    for name in ("squeue", "srun"):
        program(name, "exit 0")
    program("sbatch", f"cd {place}; n=$((100 + $(ls | wc -l))); cp $1 $n.sh; echo Submitted batch job $n")
    return place


def executor(tmp_path: Path) -> submitit.AutoExecutor:
    made = submitit.AutoExecutor(tmp_path / "logs", cluster="slurm")
    made.update_parameters(timeout_min=720, mem_gb=16, gpus_per_node=1, slurm_mem_per_gpu="9G", slurm_exclude="n7")
    return made


def records(workspace: Workspace) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (workspace.root / "submissions").glob("*.json")]


def asked(place: Path, record: dict[str, Any]) -> list[str]:
    """The lines of a job's file that ask for GPUs."""
    lines = (place / f"{record['job']}.sh").read_text().splitlines()
    words = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return sorted(word for word in words if word.startswith("gres") or "gpu" in word.partition("=")[0])


def test_without_a_profile_every_job_holds_the_executors_gpu(workspace: Workspace, sent: Path, tmp_path: Path) -> None:
    mine = executor(tmp_path)
    before = dict(mine._executor.parameters)
    cmrhpc.submit(workspace, mine)
    assert mine._executor.parameters == before
    found = records(workspace)
    assert {(told["stage"], told["gpus"]) for told in found} == {(stage, 1) for stage in STAGES}
    assert all(asked(sent, told) == ["gpus-per-node=1", "mem-per-gpu=9G"] for told in found)


def test_with_a_profile_its_gpus_are_asked_for_once(workspace: Workspace, sent: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PROFILE)
    cmrhpc.submit(workspace, executor(tmp_path), tmp_path / "mine.toml")
    found = records(workspace)
    lines = {"ingest": [], "aggregate": [], "refine": ["gpus-per-node=2"]}
    assert {told["stage"] for told in found} == set(STAGES)
    for told in found:
        assert asked(sent, told) == lines.get(told["stage"], ["gres=gpu:1"])
        assert told["gpus"] == {"ingest": 0, "aggregate": 0, "refine": 2}.get(told["stage"], 1)
        assert "--exclude=n7" in (sent / f"{told['job']}.sh").read_text()


def test_what_is_no_executor_is_told(workspace: Workspace) -> None:
    for wrong in (None, "slurm"):
        with pytest.raises(UsageError, match="AutoExecutor"):
            cmrhpc.submit(workspace, wrong)  # type: ignore[arg-type]


def test_a_path_that_slurm_would_misread_is_refused(tmp_path: Path, study_text: str, sent: Path) -> None:
    place = tmp_path / "p%j"
    place.mkdir()
    (place / "study.toml").write_text(study_text)
    with pytest.raises(BadInput, match="gives % in a path"):
        cmrhpc.submit(place, executor(tmp_path))
    assert not list(sent.iterdir())
