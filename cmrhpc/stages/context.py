"""What a stage gets to do its task."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cmrhpc import planning, shards
from cmrhpc.errors import CmrhpcError, Incomplete
from cmrhpc.planning import Task
from cmrhpc.validity import Judge
from cmrhpc.workspace import Workspace

Progress = Callable[[int, int], None]


@dataclass
class Context:
    """What a stage gets: the workspace, its task, the checked inputs, and how to report and stop."""

    workspace: Workspace
    task: Task
    inputs: dict[str, shards.Shard]
    should_stop: Callable[[], bool]
    progress: Progress
    begun: float = field(default_factory=time.time)
    beside: dict[str, str] = field(default_factory=dict)  # name -> sha256 of what is read beside the shards

    @property
    def seed(self) -> int:
        return planning.seed(self.workspace.study, self.task)

    @property
    def hashes(self) -> dict[str, str]:
        """Content of everything that the task reads."""
        return {path: shard.content_sha256 for path, shard in self.inputs.items()} | self.beside

    def write(self, datasets: Any, *, schema: str, **more: Any) -> None:
        """Write the task's shard with its provenance; keywords as for `shards.write_shard`."""
        self._refuse_older()
        info = {"seconds": round(time.time() - self.begun, 3), "study_sha256": self.workspace.study_sha256}
        shards.write_shard(
            self.workspace.path(self.task.output),
            datasets,
            schema=schema,
            task=self.task.to_json(),
            settings=planning.settings(self.workspace.study, self.task),
            inputs=self.hashes,
            seed=self.seed,
            info=info | more.pop("info", {}),
            **more,
        )

    def _refuse_older(self) -> None:
        """Raises Incomplete where the study was edited since the task began and its shard was made anew meanwhile."""
        before, task = self.workspace.study, self.task
        try:
            now = Workspace(self.workspace.root)
        except CmrhpcError:  # somebody is in the middle of an edit: no reason to lose hours of training
            return
        if task.output not in now.wanted(task.stage):
            return
        same = planning.settings(now.study, task) == planning.settings(before, task)
        if same and planning.seed(now.study, task) == planning.seed(before, task):
            return
        if not Judge(now, check=True).verdict(task.output):
            what = f"{task.title}: study.toml changed meanwhile, and the task was done anew: this result is dropped"
            raise Incomplete(what, str(self.workspace.path(task.output)), "nothing is to be done")
