"""`cmrhpc.submit` with executors that know no Slurm: what is missing is done when it returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import submitit

import cmrhpc
from cmrhpc import validity
from cmrhpc.errors import Incomplete
from cmrhpc.launch import claim
from cmrhpc.workspace import Workspace
from tests.conftest import ROOT
from tests.whole.conftest import cmrhpc as command


def test_executors_that_know_no_dependencies(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    digest = command("verify", copied).stdout.splitlines()[-1]
    # A folder where a shard should go: that task fails, and what does not need it is done all the same.
    bad, good = (copied / f"predictions/none/ratio0/resnet50/fold{fold}_repeat0.h5" for fold in (0, 1))
    bad.unlink()
    bad.mkdir()
    good.unlink()
    executor = submitit.LocalExecutor(tmp_path / "logs")
    before = dict(executor.parameters)
    jobs = cmrhpc.submit(copied, executor)
    assert executor.parameters == before
    errors = [job.exception() for job in jobs]
    assert [error is None for error in errors] == [False, True, False]
    assert "classify_0.log" in str(errors[0])
    assert "aggregate 0: exit code 4" in str(errors[2])  # the report is made all the same
    table = (copied / "report/table.csv").read_text().splitlines()
    missing = table[0].split(",").index("n_missing")
    assert sum(int(line.split(",")[missing]) for line in table[1:]) == 1

    # Mended, only what is missing runs again; here in this very process.
    bad.rmdir()
    jobs = cmrhpc.submit(copied, submitit.DebugExecutor(tmp_path / "logs"))
    assert [job.result() for job in jobs] == ["classify 0: exit code 0", "aggregate 0: exit code 0"]
    assert all(s.done for found in validity.states(Workspace(copied)).values() for s in found)
    assert command("verify", copied).stdout.splitlines()[-1] == digest
    assert cmrhpc.submit(copied, executor) == []


def test_it_waits_for_no_other_submission(tmp_path: Path, study_text: str) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    with claim.hold(tmp_path / "submissions" / "claim"), pytest.raises(Incomplete):
        cmrhpc.submit(tmp_path, submitit.LocalExecutor(tmp_path / "logs"))
