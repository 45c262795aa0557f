"""The folder of one study: where each shard lives, the tasks of each stage, and what is remembered of the shards.

Truth lives in the shards. `index.json` only remembers what was read from them: each entry is keyed by path and inode
number, both of which a folder listing gives without touching the file. A shard that is replaced has another number than
the one before it, but a later one may get that number again. So whoever computes or verifies believes the files alone,
and corrects the index where they differ from it. It can be deleted at any time, and damage is then looked for anew by
the next `verify`. The task list of a stage is frozen in `tasks/STAGE/`: segments that are only ever added. These files
carry their own sha256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cmrhpc import files, planning, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.forked import in_order
from cmrhpc.hashing import sha256_file, sha256_of
from cmrhpc.planning import STAGES, Task
from cmrhpc.study import Study, load_study

SHARD_FOLDERS = ("synthetic", "refined", "predictions")
OWN_FOLDERS = {*SHARD_FOLDERS, "report", "logs", "submissions", "tasks", "checkpoints"}
_SEGMENT = re.compile(r"(\d{4})\.json")
_ELEMENT = re.compile(r"\d{1,12}_\d{1,12}")
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)  # as JSON


@dataclass(frozen=True)
class Entry:
    """What the index remembers of one shard."""

    inode: int
    content_sha256: str
    settings_sha256: str
    seed: int
    task_sha256: str
    inputs: dict[str, str]
    seconds: float  # what its task took, of the last try alone; 0 where unknown
    job: str  # the element of a job array that wrote it, as Slurm calls it (12_3); empty otherwise
    wrong: str = ""  # what hashing found: the shard is damaged, or the raw or external images behind it changed
    companions: str = ""  # what hashing found to be wrong with its companion files


def damaged(inode: int, wrong: str) -> Entry:
    """What the index remembers of a shard that must not be opened."""
    return Entry(inode, "", "", 0, "", {}, 0.0, "", f"damaged: {wrong}")


def entry_of(header: shards.Header) -> Entry:
    """What the index remembers of a shard that has been read."""
    task = sha256_of(header.task)
    told = header.info.get("seconds")
    seconds = float(told) if isinstance(told, int | float) and 0 <= told < 1e9 else 0.0
    names = ("slurm_array_job_id", "slurm_array_task_id")
    job = "_".join(str(header.info[name]) for name in names if name in header.info)
    job = job if _ELEMENT.fullmatch(job) else ""
    hashes = header.content_sha256, header.settings_sha256
    return Entry(header.identity[0], *hashes, header.seed, task, header.inputs, seconds, job)


class Workspace:
    """An existing workspace. Raises BadInput when `root` holds no valid study.toml."""

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()
        self.study_path = self.root / "study.toml"
        if not self.study_path.is_file():
            mend = "make a workspace with `cmrhpc init WORKSPACE --study demo --raw RAW`"
            raise BadInput("no study.toml: not a workspace", str(self.root), mend)
        self.study: Study = load_study(self.study_path)
        files.never_create(self.root)

    def path(self, relative: str) -> Path:
        return self.root / relative

    @property
    def raw(self) -> Path:
        """The raw folder; a relative path in the study starts at the workspace."""
        return (self.root / self.study.data.raw).absolute()

    def external(self, generator: str) -> Path:
        """The folder of an external generator's images; a relative path in the study starts at the workspace."""
        return (self.root / self.study.generators[generator].external).absolute()

    def weights(self, classifier: str) -> Path:
        """The file that a classifier starts from; a relative path in the study starts at the workspace."""
        return (self.root / self.study.classifiers[classifier].weights).absolute()

    @cached_property
    def study_sha256(self) -> str:
        return sha256_file(self.study_path)

    def checkpoint_folder(self, task: Task) -> Path:
        return self.root / "checkpoints" / task.output.removesuffix(".h5")

    def clear_checkpoints(self, task: Task) -> None:
        """Remove what a task that is done left behind when it was killed right before its end."""
        folder = self.checkpoint_folder(task)
        if files.is_linked(folder):
            return
        for path in folder.glob("step*.checkpoint"):
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            folder.rmdir()

    def remove_stale(self, folder: Path) -> None:
        """Remove what killed processes left half written below `folder`, where we write: raw images are not ours."""
        theirs = [self.raw, *(self.external(name) for name, g in self.study.generators.items() if g.external)]
        with contextlib.suppress(OSError):
            theirs += [self.root / name for name in os.listdir(self.root) if name not in OWN_FOLDERS]
        files.remove_stale(folder, {Path(os.path.realpath(path)) for path in theirs})

    def log_path(self, stage: str, index: int) -> Path:
        return self.root / "logs" / f"{stage}_{index}.log"

    # ---------------------------------------------------------------- the frozen task lists

    def tasks(self, stage: str, freeze: bool = True) -> list[Task]:
        """The frozen list of a stage: index i means the same task for ever. New tasks of the study are appended.

        Tasks that the study no longer asks for keep their index; `wanted` tells them apart. freeze=False (display
        only): new tasks count even when the list cannot be written; their indices are provisional.
        """
        if stage not in STAGES:
            raise BadInput(f'unknown stage "{stage}"', "", f"stages: {', '.join(STAGES)}")
        asked = planning.tasks(self.study, stage)
        while True:
            frozen, last = self.frozen(stage)
            known = {task.output for task in frozen}
            new = [task for task in asked if task.output not in known]
            if not new:
                return frozen
            values = [task.to_json() for task in new]
            text = json.dumps([*values, {"sha256": sha256_of(values)}], indent=0)
            try:
                if files.create_once(self.root / "tasks" / stage / f"{last + 1:04d}.json", text):
                    return frozen + new
            except BadInput:
                if freeze:
                    raise
                return frozen + new

    def frozen(self, stage: str) -> tuple[list[Task], int]:
        """The tasks in the lists of a stage, and the number of lists. Raises BadInput for one that is not right."""
        folder = self.root / "tasks" / stage
        names = filter(_SEGMENT.fullmatch, os.listdir(folder)) if folder.is_dir() else []
        last = max((int(name[:4]) for name in names), default=0)
        found: list[Task] = []
        for number in range(1, last + 1):
            path = folder / f"{number:04d}.json"
            try:
                tasks = [Task.from_json(values) for values in _read_segment(path)]
                if any(task.stage != stage or not task.output for task in tasks):
                    raise ValueError("it lists tasks of another stage")
                if not set(tasks).isdisjoint(found):
                    raise ValueError("an earlier list holds its tasks")
            except _UNREADABLE as error:
                told = getattr(error, "strerror", None) or error
                told = "it is missing" if isinstance(error, FileNotFoundError) else told
                mend = f"restore it; or, when no job of this study is queued, remove {folder}: it is made again"
                raise BadInput(f"damaged task list: {told}", str(path), mend) from None
            found += tasks
        return found, last

    def wanted(self, stage: str) -> set[str]:
        """Outputs that the study asks for now."""
        return {task.output for task in planning.tasks(self.study, stage)}

    # ---------------------------------------------------------------- the index

    def listing(self) -> dict[str, int]:
        """Path -> inode of every shard in the workspace, by listing folders only."""
        found: dict[str, int] = {}
        pending = [""]
        while pending:
            place = pending.pop()
            try:
                with os.scandir(self.root / place) as entries:
                    for entry in entries:
                        name = f"{place}{entry.name}"
                        if entry.is_symlink() or files.is_temporary(entry.name):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            # Whatever it is called: one made where a shard was deleted may get that shard's inode.
                            if place or entry.name in SHARD_FOLDERS:
                                pending.append(f"{name}/")
                        elif name.endswith(".h5"):
                            found[name] = entry.inode()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise BadInput(f"cannot list: {error.strerror}", str(self.root / place), "mend its access") from None
        return found

    def index(self) -> dict[str, Entry]:
        """What every shard says of itself. Only shards that are new since the last call are opened."""
        old, listed = self._remembered(), self.listing()
        now = {name: old[name] for name, inode in listed.items() if name in old and old[name].inode == inode}
        new = [name for name in listed if name not in now]
        for name, entry in zip(new, in_order(self.read_entry, new), strict=True):
            if entry is not None:
                now[name] = dataclasses.replace(entry, inode=listed[name])
        if now != old:
            self._remember(now)
        return now

    def correct_index(self, found: Mapping[str, Entry | None]) -> None:
        """Make the index agree with what was just read from files, None where there is none.

        Sound shards that it does not know yet are left to the next call of `index`: thousands of tasks end at once.
        """
        new = {name for name, entry in found.items() if entry and (entry.wrong or entry.companions)}
        if not new and not self._mentions(found):
            return
        old = self._remembered()
        told = {name: found[name] for name in found if name in old or name in new}
        for name, entry in told.items():
            # Some file systems list other numbers than they tell of a file: those of the listing are compared.
            if entry and name in old and dataclasses.replace(entry, inode=old[name].inode) == old[name]:
                told[name] = old[name]
        if any(entry != old.get(name) for name, entry in told.items()):
            listed = self.listing()
            changed = {
                name: dataclasses.replace(entry, inode=listed.get(name, entry.inode))
                for name, entry in told.items()
                if entry and entry != old.get(name)
            }
            left = {name: entry for name, entry in old.items() if name not in told or told[name]}
            self._remember(left | changed)

    def _mentions(self, names: Iterable[str]) -> bool:
        """Whether the index may know any of these shards: seen without taking in thousands of others."""
        try:
            text = files.read_plain(self.root / "index.json")
        except OSError:
            return False
        return any(json.dumps(name).encode() in text for name in names)

    def _remembered(self) -> dict[str, Entry]:
        try:
            stored = json.loads(files.read_plain(self.root / "index.json"))
            if stored["sha256"] != sha256_of(stored["shards"]):
                raise ValueError("its checksum does not hold")
            return {name: Entry(*values) for name, values in stored["shards"].items()}
        except _UNREADABLE:
            return {}

    def _remember(self, entries: Mapping[str, Entry]) -> None:
        told = {name: dataclasses.astuple(entry) for name, entry in entries.items()}
        with contextlib.suppress(BadInput):  # a full or read-only disk stops neither `status` nor `verify`
            text = json.dumps({"shards": told, "sha256": sha256_of(told)})
            files.atomic_write(self.root / "index.json", text)

    def read_entry(self, name: str, hashed: bool = False) -> Entry | None:
        """What a shard says of itself, from its file; None when it is damaged or missing.

        hashed: the caller has just seen that its checksum holds. A flipped bit can hang the library that opens it.
        """
        if not hashed and shards.damage_of(self.path(name)):
            return None
        try:
            header = shards.read_header(self.path(name))
        except (CmrhpcError, OSError):
            return None  # damaged or just being replaced: not done
        return entry_of(header)


def _read_segment(path: Path) -> list[dict[str, Any]]:
    """The tasks of one segment. Its last element is the sha256 of the others."""
    *values, told = json.loads(files.read_plain(path))
    if told != {"sha256": sha256_of(values)}:
        raise ValueError("its checksum does not hold")
    return values
