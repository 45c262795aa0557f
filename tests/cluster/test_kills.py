"""Random kills on the cluster while a study runs that `cmrhpc submit` sent: the result is the same to the last bit."""

from __future__ import annotations

import os
import time
from collections import Counter
from random import Random

import pytest

from tests.cluster import image, login
from tests.cluster.node import Node
from tests.cluster.study import STAGES, Work, digest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
KILLS = int(os.environ.get("CMRHPC_TEST_CLUSTER_KILLS", "20"))
PROFILE = f"""
[slurm]
signal_seconds = 20
[container]
image = "{image.SIF}"
binds = ["{image.TREE}/cmrhpc:/opt/cmrhpc/cmrhpc"]
""" + "".join(f'[stages.{stage}]\ntime = "00:20:00"\ncpus = 1\nmemory = "2G"\n' for stage in STAGES)


def test_kills_leave_the_same_bits(login_node: Node, undisturbed: str) -> None:
    node, random, kills = login_node, Random(1), Counter[str]()
    node.run("tee profile.toml", input=PROFILE)
    studies = submissions = 0
    while kills.total() < KILLS:
        studies += 1
        work = Work.make(node, f"kills{studies}")
        while any(row["missing"] for row in work.status()["stages"].values()):
            if not node.run(["squeue", "--noheader", "--me"]).stdout.strip():
                node.run(["cmrhpc", "submit", work.name, "--profile", "profile.toml", "--yes"], env=login.HERE)
                submissions += 1
            elif kills.total() < KILLS:
                kind = random.choice(["process"] * 5 + ["job"] * 2 + ["node"] * 2 + ["controller"])
                kills[kind] += one_fault(node, kind, random)
            time.sleep(random.uniform(1, 6))
        assert digest(node, work.name) == undisturbed
    print(f"{kills.total()} kills {dict(kills)} in {studies} studies, {submissions} submissions: the same digest")


def one_fault(node: Node, kind: str, random: Random) -> bool:
    """Do one kind of harm now; whether there was anything to harm."""
    if kind == "process":  # any of a job: bash, srun, submitit, apptainer, the task
        lines = node.run(["ps", "-u", "hpc", "-o", "pid=,comm="]).stdout.splitlines()
        found = [line.split()[0] for line in lines if not line.endswith(" ps")]
        return bool(found) and not node.run(["kill", "-KILL", random.choice(found)], check=False).returncode
    if kind == "job":
        found = node.run(["squeue", "--me", "--array", "--noheader", "--states=R", "--format=%i"]).stdout.split()
        if found:
            node.run(["scancel", random.choice(found)])
        return bool(found)
    if kind == "node":
        name = random.choice(["n1", "n2"])
        node.fail(name)
        node.recover(name)
    else:
        node.restart_controller()
    return True
