"""`cmrhpc.submit` with executors that know no Slurm: the study is done when it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import submitit

import cmrhpc
from cmrhpc.errors import Incomplete
from cmrhpc.launch import claim
from cmrhpc.workspace import Workspace
from tests.conftest import ROOT
from tests.whole.conftest import make_workspace

# Real images alone: five tasks and the report.
CLASSIFIERS = """
name = "real"
classes = ["0", "1"]
[data]
raw = "raw"
image_size = 16
spacing_mm = 5.0
[folds]
k = 2
repeats = 1
[affine]
factor = 2
[classifiers.resnet50]
steps = 3
batch = 4
validate_every = 1
[compute]
threads = 1
[[arms]]
name = "none"
[[arms]]
name = "affine"
[primary]
classifier = "resnet50"
arm = "affine"
"""


def test_executors_that_know_no_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    root = make_workspace(tmp_path / "ws", CLASSIFIERS)
    # A folder where a shard should go: that task fails, and what does not need it is done all the same.
    bad = root / "predictions/none/ratio0/resnet50/fold0_repeat0.h5"
    bad.mkdir(parents=True)
    executor = submitit.LocalExecutor(tmp_path / "logs")
    before = dict(executor.parameters)
    jobs = cmrhpc.submit(root, executor)
    assert executor.parameters == before
    failed = [error for job in jobs if (error := job.exception())]
    assert (len(jobs), len(failed)) == (6, 1)
    assert "classify_0.log" in str(failed[0])
    table = (root / "report/table.csv").read_text().splitlines()
    missing = table[0].split(",").index("n_missing")
    assert sorted(line.split(",")[missing] for line in table[1:]) == ["0", "1"]

    # Mended, only what is missing runs again; here in this very process.
    bad.rmdir()
    jobs = cmrhpc.submit(root, submitit.DebugExecutor(tmp_path / "logs"))
    assert [job.result() for job in jobs] == ["classify 0: exit code 0", "aggregate 0: exit code 0"]
    assert all(s.done for found in Workspace(root).states().values() for s in found)
    assert {json.loads(p.read_text())["state"] for p in (root / "logs").glob("*.json")} == {"done"}
    assert cmrhpc.submit(root, executor) == []


def test_it_waits_for_no_other_submission(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    with claim.hold(tmp_path / "submissions" / "claim"), pytest.raises(Incomplete):
        cmrhpc.submit(tmp_path, submitit.LocalExecutor(tmp_path / "logs"))
