"""One study meets every fault that a cluster has: it gives the bits of an undisturbed run, and status tells
the truth meanwhile."""

from __future__ import annotations

import time

import pytest

from tests.cluster.node import Node
from tests.cluster.study import Work, digest, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]


def test_study_survives_every_fault(login_node: Node, request: pytest.FixtureRequest) -> None:
    node = login_node
    work = Work.make(node, "faults")
    assert work.told("ingest", 0) == ("waiting", "not started")
    assert node.wait(work.submit("ingest")) == {"COMPLETED"}

    # Four generators at work, met in the middle.
    job = work.submit("synthesize")
    held = [work.hold("synthesize", index) for index in range(4)]
    told = work.status()
    assert (told["slurm"], told["accounting"]) == ("", True)
    assert told["stages"]["synthesize"]["running"] == 4
    assert [task["job"] for task in told["tasks"] if task["stage"] == "synthesize"] == [f"{job}_{i}" for i in range(4)]
    nodes = [task["reason"].removeprefix("on ") for task in told["tasks"] if task["stage"] == "synthesize"]
    assert set(nodes) <= {"n1", "n2"}

    # One is killed, one is cancelled.
    work.kill(held[0], "KILL")
    work.wait_told("synthesize", 0, "failed", "its process was ended by SIGKILL")
    node.run(["scancel", f"{job}_1"])
    work.wait_told("synthesize", 1, "failed", "cancelled by user hpc")
    text = work.cmrhpc("status")
    log = "/shared/faults/logs/synthesize_1.log"
    assert f"failed   dae-gan fold 0 repeat 0 class 1 (job {job}_1): cancelled by user hpc: {log}" in text
    assert (work.root / "logs/synthesize_1.log").exists()

    # The other two are preempted by an urgent job: asked to stop, they save a checkpoint and wait for its end.
    line = "until [ -e go ]; do sleep 0.2; done"
    urgent = node.submit(line, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    for index in (2, 3):
        work.wait_asked(held[index])
        work.kill(held[index], "CONT")
    for index in (2, 3):
        work.wait_told("synthesize", index, "waiting", "checkpointed, preempted by another job and requeued; waits")
    again = time.time()
    (node.shared / "go").touch()
    node.wait(urgent)
    held[2:] = [work.hold("synthesize", index, after=again) for index in (2, 3)]

    # The controller goes away and comes back; jobs run on.
    node.run(["daemons", "stop_controller"], user="root")
    told = work.status()
    assert told["slurm"].startswith("Slurm does not answer")
    assert [work.told("synthesize", index)[0] for index in (2, 3)] == ["running", "running"]
    node.run(["daemons", "start_controller"], user="root")
    work.wait_told("synthesize", 2, "running", "on n")
    work.wait_told("synthesize", 3, "running", "on n")

    # A node is lost: what ran there is put back, and starts again when the node does.
    lost = work.told("synthesize", 3)[1].removeprefix("on ")
    both = work.told("synthesize", 2)[1] == f"on {lost}"
    node.fail(lost)
    work.wait_told("synthesize", 3, "waiting", "its node failed, requeued; waits")
    node.recover(lost)
    if not both:
        work.kill(held[2], "CONT")
    eventually(lambda: work.status()["stages"]["synthesize"]["done"] == 2)
    assert [work.told("synthesize", index)[0] for index in range(4)] == ["failed", "failed", "done", "done"]

    # One resubmission does what is missing.
    assert work.cmrhpc("plan", "--stage", "synthesize", "--array") == "0-1\n"
    job = work.submit("synthesize")
    assert node.wait(job) == {"COMPLETED"}
    assert work.status()["stages"]["synthesize"]["done"] == 4

    # Accounting is switched off. One task runs into its time limit unasked, one is asked before it.
    node.run(["daemons", "stop_accounting"], user="root")
    limited = work.submit("refine", "--time=2", "--signal=B:USR2@60", array="0-1")
    job = work.submit("refine", array="2-3")
    held = [work.hold("refine", index) for index in range(4)]
    told = work.status()
    assert (told["slurm"], told["accounting"], told["stages"]["refine"]["running"]) == ("", False, 4)
    node.run(["scancel", f"{job}_2"])
    work.wait_told("refine", 2, "failed", "cancelled")
    work.kill(held[3], "KILL")
    work.wait_told("refine", 3, "failed", "its job failed")
    work.wait_asked(held[1])
    work.kill(held[1], "CONT")
    work.wait_told("refine", 1, "waiting", "checkpointed and requeued; waits")
    work.wait_told("refine", 0, "failed", "out of time: its job reached its time limit")
    eventually(lambda: work.told("refine", 1)[0] == "done")
    assert node.states(limited) == {f"{limited}_0": "TIMEOUT", f"{limited}_1": "COMPLETED"}

    # Slurm forgets; what the records say then has to do.
    node.run(["daemons", "forget_jobs"], user="root")
    eventually(lambda: node.run("squeue --noheader --states=all").stdout == "")
    gone = "its job has left the queue: killed, cancelled, out of time, or its node was lost"
    assert [work.told("refine", index) for index in (0, 2, 3)] == [("failed", gone)] * 3

    # And again one resubmission.
    for stage, missing in (("refine", "0,2-3\n"), ("classify", "0-5\n"), ("aggregate", "0\n")):
        assert work.cmrhpc("plan", "--stage", stage, "--array") == missing
        work.submit(stage)
        eventually(lambda stage=stage: not work.status()["stages"][stage]["missing"])
    assert digest(node, "faults") == request.getfixturevalue("undisturbed")
    assert work.cmrhpc("status", "--watch").count("\n") == 6  # it ends, for all is done
