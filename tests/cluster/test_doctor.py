"""What doctor and status say on a login node of a real cluster, also of one whose controller hangs."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.cluster import image, login
from tests.cluster.node import Node
from tests.cluster.study import TEXT, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
PROFILE = f'[slurm]\npartition = "gpu"\n[container]\nimage = "{image.SIF}"\n'


def doctor(node: Node, *arguments: str, code: int = 0, **more: Any) -> dict[str, dict[str, Any]]:
    """What was found -> the finding; the command must end with this exit code."""
    done = node.run(["cmrhpc", "doctor", *arguments, "--json"], env=login.HERE, check=False, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_everything_that_a_cluster_has(login_node: Node) -> None:
    node = login_node
    node.run("mkdir ws && tee profile.toml", input=PROFILE)
    found = doctor(node, "ws", "--profile", "profile.toml", timeout=600)
    well = {what for what, finding in found.items() if finding["ok"]}
    assert {
        "Slurm 24.11.5",
        "accounting is on",
        "the controller's clock agrees with this machine's",
        "limits: arrays of 1001 tasks at most, 10000 jobs in all, no submit limit found",
        "partition gpu (default): 2 nodes, gpu:tesla:2, at most 1-00:00:00",
        "partition urgent: 2 nodes, gpu:tesla:2, at most 1-00:00:00",
        "user namespaces work: images can be run and built here",
        f"image {image.SIF}: its checksum holds",
        "ws is writable and renames in one step",
        "exclusive file creation works",
        "a shard can be written and read here",
        "the file system's clock agrees with this machine's",
    } <= well
    assert any(what.startswith("apptainer version 1.") for what in well)
    assert found["torch is not installed"]["mend"].startswith("only where tasks compute")
    assert node.run("ls -A ws").stdout == ""


def test_what_is_wrong_has_its_mend(login_node: Node) -> None:
    node = login_node
    node.run(["tee", "wrong.toml"], input=PROFILE.replace('"gpu"', '"cpu"').replace("cmrhpc.sif", "other.sif"))
    node.run(["install", "-d", "-m", "755", "/srv/readonly"], user="root")
    found = doctor(node, "/srv/readonly", "--profile", "wrong.toml", code=3)
    assert found["profile wrong: there is no partition cpu"]["mend"] == "name one of gpu, urgent in the profile"
    assert not found["no image /images/other.sif"]["ok"]
    assert not found["/srv/readonly: Permission denied"]["ok"]
    node.run("sacctmgr --immediate add account heart; sacctmgr --immediate add user hpc account=heart", user="root")
    node.run(["sacctmgr", "--immediate", "modify", "user", "hpc", "set", "maxsubmitjobs=7"], user="root")
    assert any("you may have 7 queued" in what for what in doctor(node))


def test_no_user_namespaces(login_node: Node) -> None:
    """A process whose root is not the machine's may make none."""
    node = login_node
    node.run("mkdir -p /jail && mount --rbind / /jail", user="root")
    inside = ["chroot", "--userspec=hpc:hpc", "/jail", "env", f"PATH={login.HERE['PATH']}", "HOME=/tmp"]
    said = node.run([*inside, "cmrhpc", "doctor", "--json"], user="root").stdout
    findings = {finding["what"]: finding for finding in json.loads(said)["findings"]}
    assert not findings["no user namespaces, and Apptainer is not setuid: no image runs here"]["ok"]


def test_controller_that_hangs_holds_nobody(login_node: Node) -> None:
    node = login_node
    node.run("mkdir -p hangs && tee hangs/study.toml", input=TEXT)
    job = node.submit("true", "--job-name=ingest", "--array=0", "--hold")
    waits = ["cmrhpc", "status", "hangs", "--json"]
    told = json.loads(node.run(waits, env=login.HERE).stdout)
    assert told["tasks"][0]["reason"].startswith(f"perhaps in job {job}_0: is held by its user")
    node.run("pkill -STOP --exact slurmctld", user="root")
    try:
        assert not doctor(node, timeout=120)["Slurm's controller does not answer within 10 s"]["ok"]
        record = {"state": "running", "host": "n7", "pid": 1, "start": "1", "job": job, "element": "0"}
        record |= {"time": time.time()}
        node.run("mkdir hangs/logs && tee hangs/logs/ingest_0.json", input=json.dumps(record))
        told = json.loads(node.run(waits, env=login.HERE, timeout=120).stdout)
        assert told["slurm"].startswith("Slurm does not answer")
        assert (told["tasks"][0]["state"], told["tasks"][0]["reason"]) == ("running", "on n7")
    finally:
        node.run("pkill -CONT --exact slurmctld", user="root")
    eventually(lambda: json.loads(node.run(waits, env=login.HERE).stdout)["slurm"] == "")
    node.run(["scancel", job])
