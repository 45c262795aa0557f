"""A throwaway machine with a real Slurm cluster, for tests.

    with Node(shared=tmp_path) as node:
        job = node.submit("srun hostname", "--array=0-3")
        assert node.wait(job) == {"COMPLETED"}

Two compute nodes ``n1`` and ``n2`` (4 CPUs, 2 pretended GPUs each), partitions ``gpu`` and ``urgent`` (which preempts
it), accounting, Apptainer, and the ordinary user ``hpc``, whose folder ``/shared`` is a folder of the host. All of it
lives in namespaces of its own over a cached root that stays untouched, and ends with the test process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import cache

SCRIPTS = cache.HERE / "node"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HPC = 1000
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def why_not() -> str:
    """Why no node can be started here, in words; empty where one can."""
    if os.geteuid() != 0:
        return "the cluster tests need root, to make namespaces and devices"
    if not shutil.which("apt-get"):
        return "the cluster tests need a Debian host, to build the node from its archive"
    if platform.machine() != "x86_64":
        return "the cluster tests were made for x86-64"
    known = Path("/proc/filesystems").read_text().split()
    missing = [name for name in ("overlay", "fuse", "cgroup") if name not in known]
    return f"the kernel knows no {', '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class Bind:
    """A file or folder of the host seen inside the node."""

    source: Path
    target: str
    writable: bool = False


class Node:
    """One throwaway machine; a context manager. A new one takes seconds and is the way to forget everything.

    shared: folder of the host, given to user ``hpc`` and seen as ``/shared``.
    network: ``private`` (none but its own loopback) or ``host`` (for building images; then without Slurm).
    accounting: start with the database and sacct, or without.
    conf: settings of slurm.conf that replace those of node/slurm.conf; None takes one away.
    """

    def __init__(
        self,
        *,
        shared: Path | None = None,
        binds: Sequence[Bind] = (),
        network: str = "private",
        slurm: bool = True,
        accounting: bool = True,
        conf: Mapping[str, str | int | None] | None = None,
    ) -> None:
        if slurm and network != "private":
            raise ValueError("the cluster would sit on the host's ports: Slurm wants network='private'")
        self.shared = shared
        self.binds = [*binds, Bind(shared, "/shared", writable=True)] if shared else list(binds)
        self.network, self.slurm, self.accounting = network, slurm, accounting
        self.conf = slurm_conf({**({} if accounting else WITHOUT_ACCOUNTING), **(conf or {})})
        self.id = uuid.uuid4().hex[:12]
        self.pid = 0
        self._supervisor: subprocess.Popen[str] | None = None

    # Start and stop.

    def __enter__(self) -> Node:
        if self.shared:
            os.chown(self.shared, HPC, HPC)
        root = cache.debian_root("node")
        (cache.folder() / "mnt").mkdir(exist_ok=True)
        command = ["unshare", "--mount", "--propagation", "private", "bash", str(SCRIPTS / "supervise.sh")]
        settings = {
            "PATH": SEARCH_PATH,
            "NODE_NETWORK": self.network,
            "NODE_SLURM": "yes" if self.slurm else "no",
            "NODE_ACCOUNTING": "yes" if self.accounting else "no",
            "NODE_BINDS": "\n".join(f"{b.source}\t{b.target}\t{'rw' if b.writable else 'ro'}" for b in self.binds),
            "NODE_SLURM_CONF": self.conf,
        }
        with tempfile.TemporaryFile("w+") as errors:
            self._supervisor = subprocess.Popen(
                [*command, self.id, str(cache.folder()), str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=settings,
            )
            assert self._supervisor.stdout
            said = [self._supervisor.stdout.readline().strip() for _ in range(2)]
            if said[1] != "ready":
                self.stop()
                errors.seek(0)
                raise RuntimeError(f"the node did not start:\n{errors.read()}")
        self.pid = int(said[0].removeprefix("pid "))
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the node and wait until its last trace is gone."""
        if self._supervisor:
            assert self._supervisor.stdin
            self._supervisor.stdin.close()
            self._supervisor.wait(timeout=60)
            self._supervisor = None
            self.pid = 0

    # Commands.

    def run(
        self,
        command: Sequence[str | Path] | str,
        *,
        user: str = "hpc",
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (a list, or a line for bash) in the node and return its exit code and both outputs as text.

        With `check` a failure raises with what was said; after `timeout` seconds the command is killed inside the node.
        """
        line = self._command(command, user, cwd, env, timeout)
        done = subprocess.run(line, input=input or "", capture_output=True, text=True, env={"PATH": SEARCH_PATH})
        if check and done.returncode:
            said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            raise RuntimeError(f"{command!r} ended with {done.returncode}\n{said}")
        return done

    def popen(
        self,
        command: Sequence[str | Path] | str,
        *,
        user: str = "hpc",
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> subprocess.Popen[str]:
        """The same, started and not waited for."""
        line = self._command(command, user, cwd, env, timeout)
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(line, text=True, env={"PATH": SEARCH_PATH}, stdin=nothing, stdout=pipe, stderr=pipe)

    def _command(
        self, command: Sequence[str | Path] | str, user: str, cwd: str, env: Mapping[str, str] | None, timeout: float
    ) -> list[str]:
        home = "/root" if user == "root" else f"/home/{user}"
        variables = {"PATH": SEARCH_PATH, "HOME": home, "USER": user, "LOGNAME": user, "LANG": "C.UTF-8", **(env or {})}
        variables.setdefault("CMRHPC_DEVICE", "cpu")  # a task would not believe in the pretended GPUs
        words = ["bash", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--root", *(["--net"] if self.network == "private" else [])]
        return [
            *("nsenter", "--target", str(self.pid), *namespaces, "--"),
            *("timeout", "--kill-after=5", str(timeout)),
            *("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"),
            *("env", "--ignore-environment", f"--chdir={cwd or ('/shared' if self.shared else home)}"),
            *(f"{name}={value}" for name, value in variables.items()),
            *words,
        ]

    # The cluster.

    def submit(self, script: str, *options: str) -> str:
        """Submit lines of bash as a batch job with options of sbatch; the job's number."""
        sbatch = ["sbatch", "--parsable", *options]
        return self.run(sbatch, input=f"#!/bin/bash\n{script}\n").stdout.split(";")[0].strip()

    def states(self, job: str) -> dict[str, str]:
        """Each task of a job -> its state, as slurmctld knows it (``7_3`` -> ``RUNNING``)."""
        lines = self.run(["scontrol", "--oneliner", "show", "job", job]).stdout.splitlines()
        states = {}
        for line in lines:
            field = dict(re.findall(r"(JobId|ArrayJobId|ArrayTaskId|JobState)=(\S+)", line))
            name = f"{field['ArrayJobId']}_{field['ArrayTaskId']}" if "ArrayTaskId" in field else field["JobId"]
            states[name] = field["JobState"]
        return states

    def wait(self, job: str, timeout: float = 600, until: set[str] | None = None) -> set[str]:
        """Wait until every task of a job is in a final state (or in one of `until`); the states that they are in."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = set(self.states(job).values())
            if found <= (until or FINAL):
                return found
            time.sleep(0.2)
        raise TimeoutError(f"job {job} after {timeout} s: {self.states(job)}")

    def restart_controller(self) -> None:
        """Stop slurmctld and start it again; jobs run on."""
        self.run(["daemons", "restart_controller"], user="root")

    def fail(self, name: str) -> None:
        """Lose a compute node: its slurmd and all that ran on it are killed, and Slurm is told that it is down."""
        self.run(["daemons", "fail_node", name], user="root")

    def recover(self, name: str) -> None:
        """Start a lost compute node again."""
        self.run(["daemons", "recover_node", name], user="root")


# Without accounting: what a cluster has whose administrators never set it up.
WITHOUT_ACCOUNTING: dict[str, str | int | None] = {
    "AccountingStorageType": None,
    "AccountingStorageHost": None,
    "AccountingStoragePort": None,
    "AccountingStorageTRES": None,
}


def slurm_conf(changes: Mapping[str, str | int | None]) -> str:
    """node/slurm.conf with some settings replaced (a value) or taken away (None)."""
    lines = (SCRIPTS / "slurm.conf").read_text().splitlines()
    kept = [line for line in lines if line.split("=")[0] not in changes]
    return "\n".join([*kept, *(f"{key}={value}" for key, value in changes.items() if value is not None), ""])
