"""Plain `sbatch --array` with the scripts of slurm/, inside the container: the same study, the same bits."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import pytest

from tests.cluster import image
from tests.cluster.conftest import make_study
from tests.cluster.node import Node

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
STAGES = ("ingest", "synthesize", "refine", "classify", "aggregate")
INSIDE = {"CMRHPC_SLURM": "/tree/slurm", "CMRHPC_CONTAINER": image.SIF, "CMRHPC_CONTAINER_OPTIONS": image.OVER}
SMALL = ["--parsable", "--time=10", "--mem=2G", "--cpus-per-task=1"]


def test_arrays_give_the_digest_of_a_local_run(container_node: Node, sif: Path, local_digest: str) -> None:
    node = container_node
    make_study(node, "arrays")

    for stage in STAGES:
        ranges = node.run(f"{image.CMRHPC} plan arrays --stage {stage} --array").stdout.split()
        jobs = [
            node.run(["sbatch", *SMALL, f"--array={some}", f"/tree/slurm/{stage}.sbatch", "arrays"], env=INSIDE).stdout
            for some in ranges
        ]
        assert jobs, stage
        assert [node.wait(job.strip(), timeout=1500) for job in jobs] == [{"COMPLETED"}] * len(jobs), stage
        assert node.run(f"{image.CMRHPC} plan arrays --stage {stage} --array").stdout == ""

    digest = node.run(f"{image.CMRHPC} verify arrays").stdout.splitlines()[-1]
    assert re.fullmatch(r"digest [0-9a-f]{64}", digest)
    assert digest == local_digest

    # Every shard says which image it was made in; the log of each task lies in the workspace, and nothing elsewhere.
    ours = sif.with_name("cmrhpc.sif.sha256").read_text()[:64]
    shards = [*(node.shared / "arrays").rglob("*.h5")]
    assert len(shards) > 10
    assert {h5py.File(path).attrs["container_sha256"] for path in shards} == {ours.encode()}
    assert (node.shared / "arrays/logs/synthesize_0.log").stat().st_size > 0
    assert not list(node.shared.glob("slurm-*"))


def test_exit_code_of_a_task_is_the_exit_code_of_its_job(container_node: Node) -> None:
    node = container_node
    node.run("mkdir -p empty")
    job = node.run(["sbatch", *SMALL, "/tree/slurm/ingest.sbatch", "empty"], env=INSIDE).stdout.strip()
    assert node.wait(job) == {"FAILED"}
    assert node.run(["sacct", "-n", "-X", "-P", "-j", job, "-o", "exitcode"]).stdout.strip() == "3:0"
    assert "study.toml" in (node.shared / "empty/logs/ingest_0.log").read_text()


def test_wrong_call_says_so(container_node: Node) -> None:
    node = container_node
    job = node.run(["sbatch", *SMALL, "/tree/slurm/ingest.sbatch", "nowhere"], env=INSIDE).stdout.strip()
    assert node.wait(job) == {"FAILED"}
    assert "usage: sbatch" in (node.shared / f"slurm-ingest-{job}.out").read_text()
    (node.shared / f"slurm-ingest-{job}.out").unlink()
