"""A study of all stages for the cluster tests, what an undisturbed run of it gives, and a hand on its running tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrhpc.workspace import Workspace
from tests.cluster import image, login
from tests.cluster.node import Node
from tests.conftest import STUDY

STAGES = ("ingest", "synthesize", "refine", "classify", "aggregate")
# One GPU task lasts some seconds on an idle machine, so that it can be met at work, and saves checkpoints all the time.
TEXT = (
    STUDY.replace('raw = "raw"', 'raw = "../raw"')
    .replace("generations = 4", "generations = 80")
    .replace("steps = 4", "steps = 100")
    .replace("checkpoint_seconds = 600", "checkpoint_seconds = 0.2")
    .replace('[[arms]]\nname = "affine"\n', "")
    .replace("ratios = [1, 2]", "ratios = [2]")
)
INSIDE = {"CMRHPC_SLURM": "/tree/slurm", "CMRHPC_CONTAINER": image.SIF, "CMRHPC_CONTAINER_OPTIONS": image.OVER}
SMALL = ("--parsable", "--time=10", "--mem=2G", "--cpus-per-task=1")
LONG_S = 900.0  # for waits: the machine may be busy with other things


def undisturbed(shared: Path, sif: Path) -> str:
    """The digest that `cmrhpc run` gives inside the container."""
    with Node(shared=shared, binds=image.binds(sif), slurm=False) as node:
        node.run(f"{image.CMRHPC} phantom raw --patients 12 --seed 3; mkdir local")
        node.run("tee local/study.toml", input=TEXT)
        node.run(f"{image.CMRHPC} run local", timeout=1500)
        return digest(node, "local")


def digest(node: Node, name: str) -> str:
    """What `cmrhpc verify` says of a workspace below /shared; it must find nothing wrong."""
    told = json.loads(node.run(f"{image.CMRHPC} verify {name} --json", timeout=600).stdout)
    assert told["damaged"] == told["leaks"] == []
    return str(told["digest"])


@dataclass
class Work:
    """A workspace of a cluster's user: `/shared/NAME` in the node."""

    node: Node
    name: str

    @staticmethod
    def make(node: Node, name: str) -> Work:
        """A new workspace, with the raw folder that all share."""
        assert node.shared
        if not (node.shared / "raw").exists():
            node.run(f"{image.CMRHPC} phantom raw --patients 12 --seed 3")
        node.run(["mkdir", name])
        node.run(["tee", f"{name}/study.toml"], input=TEXT)
        return Work(node, name)

    @property
    def root(self) -> Path:
        """The workspace as the host sees it."""
        assert self.node.shared
        return self.node.shared / self.name

    def cmrhpc(self, verb: str, *arguments: str, **more: Any) -> str:
        """What a verb prints on the login node, outside any container."""
        return self.node.run(["cmrhpc", verb, self.name, *arguments], env=login.HERE, **more).stdout

    def submit(self, stage: str, *options: str, array: str = "") -> str:
        """Plain sbatch for what is missing of a stage, or for some elements; the job's number."""
        array = array or self.cmrhpc("plan", "--stage", stage, "--array").strip()
        command = ["sbatch", *SMALL, *options, f"--array={array}", f"/tree/slurm/{stage}.sbatch", self.name]
        return self.node.run(command, env=INSIDE).stdout.strip()

    # What status tells.

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.cmrhpc("status", "--json")))

    def told(self, stage: str, index: int) -> tuple[str, str]:
        """State and reason of a task, as status tells them; done tasks have no reason."""
        for task in self.status()["tasks"]:
            if (task["stage"], task["index"]) == (stage, index):
                return task["state"], task["reason"]
        return "done", ""

    def wait_told(self, stage: str, index: int, state: str, words: str = "", timeout: float = 400.0) -> None:
        """Wait until status tells a state, with these words in its reason."""
        told = ("", "")

        def right() -> bool:
            nonlocal told
            told = self.told(stage, index)
            return told[0] == state and words in told[1]

        try:
            eventually(right, timeout)
        except TimeoutError:
            raise AssertionError(f"{stage} {index}: wanted {state}, {words!r}; status told {told}") from None

    # A hand on a running task.

    def record(self, stage: str, index: int) -> dict[str, Any]:
        """The newest record of a task; empty where there is none."""
        try:
            return dict(json.loads((self.root / "logs" / f"{stage}_{index}.json").read_text()))
        except FileNotFoundError:
            return {}

    def hold(self, stage: str, index: int, after: float = 0.0) -> int:
        """Stop the process of a task (begun after some time) once it has saved a checkpoint; its number in the node."""
        workspace = Workspace(self.root)
        task = workspace.tasks(stage)[index]
        folder = workspace.checkpoint_folder(task)

        def at_work() -> bool:
            record = self.record(stage, index)
            return bool(record) and record["state"] == "running" and record["time"] > after and any(folder.glob("*"))

        eventually(at_work)
        number = int(self.record(stage, index)["pid"])
        self.kill(number, "STOP")
        assert not workspace.path(task.output).exists(), f"{stage} {index} was too fast to be met at work"
        return number

    def kill(self, number: int, name: str) -> None:
        self.node.run(["kill", f"-{name}", str(number)])

    def wait_asked(self, number: int) -> None:
        """Wait until a stopped process has a signal in store for when it goes on."""
        line = (
            f"grep -q '^ShdPnd:.*[1-9a-f]' /proc/{number}/status || grep -q '^SigPnd:.*[1-9a-f]' /proc/{number}/status"
        )
        eventually(lambda: self.node.run(line, check=False).returncode == 0)


def eventually(condition: Callable[[], bool], timeout: float = LONG_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)
