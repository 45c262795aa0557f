"""The throwaway node itself: does it behave as a cluster does, and does it leave the host as it was?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import cache
from tests.cluster.node import Node, slurm_conf

pytestmark = pytest.mark.cluster
FREEZER = Path("/sys/fs/cgroup/freezer")


def host() -> dict[str, set[str]]:
    """What a node could change on the host: mounts, devices, addresses, and control groups that are no node's own."""
    devices = {f"{p} {p.lstat().st_mode:o} {p.lstat().st_uid} {p.lstat().st_rdev}" for p in Path("/dev").glob("*")}
    addresses = subprocess.run(["ip", "-oneline", "address"], capture_output=True, text=True).stdout
    return {
        "mounts": set(Path("/proc/mounts").read_text().splitlines()),
        "devices": devices,
        "groups": {str(p) for p in FREEZER.rglob("*") if p.is_dir() and "cmrhpc-node-" not in str(p)},
        "addresses": set(re.findall(r"inet6? \S+", addresses)),
    }


def traces(node_id: str) -> list[str]:
    """Processes of the host in a node's control group or with its name among their words, and the group itself."""
    found = [str(path) for path in FREEZER.glob(f"*{node_id}")]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cgroup").read_text() + (folder / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if node_id in text:
            found.append(f"process {folder.name} {text}")
    return found


def eventually(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.smoke
def test_array_runs_on_both_nodes_with_their_gpus(node: Node) -> None:
    words = "$SLURM_ARRAY_TASK_ID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    line = f"echo {words}; sleep 1; [ $SLURM_ARRAY_TASK_ID != 3 ] || exit 7"
    job = node.submit(line, "--array=0-3", "--gres=gpu:1", "--output=array_%a.out")
    assert node.wait(job) == {"COMPLETED", "FAILED"}
    assert node.states(job)[f"{job}_3"] == "FAILED"
    said = [tuple((node.shared / f"array_{i}.out").read_text().split()) for i in range(4)]
    assert [words[0] for words in said] == ["0", "1", "2", "3"]
    assert {words[1:] for words in said} == {("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")}
    accounts = node.run(["sacct", "-n", "-X", "-P", "-j", job, "-o", "jobid,state,exitcode"]).stdout.split()
    assert accounts == [f"{job}_{i}|COMPLETED|0:0" for i in range(3)] + [f"{job}_3|FAILED|7:0"]


@pytest.mark.smoke
def test_host_is_as_it_was(tmp_path: Path) -> None:
    before = host()
    with Node(shared=tmp_path) as node:
        job = node.submit("sleep 600")
        node.wait(job, until={"RUNNING"})
        node.popen("sleep 601")
        assert len(traces(node.id)) > 10
        assert host() == before
    assert not traces(node.id)
    assert host() == before


@pytest.mark.smoke
def test_host_is_as_it_was_after_the_tests_are_killed(tmp_path: Path) -> None:
    before = host()
    script = "from tests.cluster.node import Node; import sys, pathlib\n"
    script += "node = Node(shared=pathlib.Path(sys.argv[1])).__enter__()\n"
    script += "node.wait(node.submit('sleep 600'), until={'RUNNING'})\n"
    script += "print(node.id, flush=True); node.run('sleep 602')"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=cache.HERE.parents[1]
    ) as owner:
        assert owner.stdout
        node_id = owner.stdout.readline().strip()
        assert len(traces(node_id)) > 10
        os.kill(owner.pid, signal.SIGKILL)
    assert eventually(lambda: not traces(node_id))
    assert host() == before


def test_host_is_as_it_was_after_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Then nobody is left to take the control groups away: the next node does."""
    before = host()
    with Node(shared=tmp_path, accounting=False) as node:
        node.wait(node.submit("sleep 600"), until={"RUNNING"})
        supervisor = next(line.split()[1] for line in traces(node.id) if "supervise.sh" in line)
        os.kill(int(supervisor), signal.SIGKILL)
        assert eventually(lambda: not any(line.startswith("process") for line in traces(node.id)))
    with Node(slurm=False):
        pass
    assert not traces(node.id)
    assert host() == before


def test_cached_root_is_never_written(tmp_path: Path) -> None:
    with Node(slurm=False) as node:
        node.run("touch /etc/changed /home/hpc/changed; rm /etc/debian_version", user="root")
    with Node(slurm=False) as node:
        said = node.run("ls /etc/changed /home/hpc/changed; cat /etc/debian_version", check=False).stdout
        assert said.startswith("13")


def test_ordinary_user(node: Node) -> None:
    said = node.run("id -un; pwd; echo > /dev/null && echo written; touch /etc/x", check=False)
    assert said.stdout.split() == ["hpc", "/shared", "written"]
    assert "Permission denied" in said.stderr


def test_command_fails_with_its_words_and_in_time(node: Node) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*said out.*said err"):
        node.run("echo said out; echo said err >&2; exit 3")
    with pytest.raises(RuntimeError, match="ended with 124"):
        node.run("sleep 603", timeout=1)
    assert node.run(["pgrep", "--full", "^sleep 603"], check=False).stdout == ""


def test_no_network(node: Node) -> None:
    assert node.run("ip -oneline link | wc -l").stdout.strip() == "1"


def test_signal_reaches_the_step_and_not_what_is_below_it(node: Node) -> None:
    """proctrack/cgroup: so a process in a container hears of a signal once, from the container's own forwarding."""
    (node.shared / "below.sh").write_text("trap 'echo below' USR2; echo ready; while sleep 0.1; do :; done")
    (node.shared / "step.sh").write_text("trap 'echo step' USR2; bash below.sh & while kill -0 $!; do wait; done")
    job = node.submit("srun bash step.sh", "--output=step.out")
    said = node.shared / "step.out"
    assert eventually(lambda: said.exists() and "ready" in said.read_text())
    node.run(["scancel", "--signal=USR2", job])
    assert eventually(lambda: "step" in said.read_text())
    time.sleep(0.5)
    node.run(["scancel", job])
    assert node.wait(job) == {"CANCELLED"}
    assert said.read_text().splitlines()[:2] == ["ready", "step"]
    assert "below" not in said.read_text()


PATIENT = """
trap 'echo asked; exit 75' USR2
echo begun ${SLURM_RESTART_COUNT:-0}
sleep 300 & wait
"""


def test_urgent_job_preempts_and_the_other_comes_back(node: Node) -> None:
    options = ["--array=0-1", "--exclusive", "--signal=B:USR2@10", "--open-mode=append", "--output=preempted_%a.out"]
    low = node.submit(PATIENT, *options)
    node.wait(low, until={"RUNNING"})
    urgent = node.submit("true", "--partition=urgent", "--nodes=2", "--exclusive")
    assert node.wait(urgent) == {"COMPLETED"}
    node.wait(low, until={"RUNNING"})
    assert eventually(lambda: "begun 1" in (node.shared / "preempted_0.out").read_text())
    said = (node.shared / "preempted_0.out").read_text().splitlines()
    # slurmstepd may complain that a process has ended before its signal came.
    assert [line for line in said if not line.startswith("slurmstepd-")] == ["begun 0", "asked", "begun 1"]
    node.run(["scancel", low])
    node.wait(low)


def test_lost_node_puts_its_job_back(node: Node) -> None:
    job = node.submit("echo begun; sleep 300", "--nodelist=n2", "--open-mode=append", "--output=lost.out")
    node.wait(job, until={"RUNNING"})
    node.fail("n2")
    assert node.wait(job, until={"PENDING"}) == {"PENDING"}
    assert "n2 down" in node.run(["sinfo", "--Node", "--noheader", "--format=%N %T"]).stdout
    node.recover("n2")
    assert node.wait(job, until={"RUNNING"}) == {"RUNNING"}
    node.run(["scancel", job])
    node.wait(job)


def test_jobs_outlive_the_controller(node: Node) -> None:
    job = node.submit("sleep 3; echo through > restart.out")
    node.wait(job, until={"RUNNING"})
    node.restart_controller()
    assert node.wait(job) == {"COMPLETED"}
    assert (node.shared / "restart.out").read_text() == "through\n"


def test_without_accounting_and_with_other_settings(tmp_path: Path) -> None:
    with Node(shared=tmp_path, accounting=False, conf={"MaxArraySize": 4}) as node:
        assert "accounting storage is disabled" in node.run("sacct", check=False).stderr
        assert "Invalid job array" in node.run(["sbatch", "--array=4", "--wrap=true"], check=False).stderr
        assert node.wait(node.submit("true", "--array=0-3")) == {"COMPLETED"}


def test_cluster_that_does_not_start_says_why(tmp_path: Path) -> None:
    before = host()
    broken = Node(shared=tmp_path, conf={"SelectType": "select/nonsense"})
    with pytest.raises(RuntimeError, match="select/nonsense"), broken:
        pass
    assert host() == before


def test_slurm_on_the_network_of_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match="private"):
        Node(network="host")


def test_settings_are_replaced_and_taken_away() -> None:
    text = slurm_conf({"MaxArraySize": 7, "KillWait": None})
    assert re.findall(r"MaxArraySize.*", text) == ["MaxArraySize=7"]
    assert "KillWait" not in text
    assert "ClusterName=cmrtest" in text
