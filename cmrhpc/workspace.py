"""The folder of one study: where each shard lives, which tasks are done, and why the others are not.

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

from cmrhpc import external, files, planning, seal, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.forked import in_order
from cmrhpc.planning import COHORT, FOLDS, REPORT, STAGES, WEIGHTS, Task
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
    task = shards.sha256_of(header.task)
    told = header.info.get("seconds")
    seconds = float(told) if isinstance(told, int | float) and 0 <= told < 1e9 else 0.0
    names = ("slurm_array_job_id", "slurm_array_task_id")
    job = "_".join(str(header.info[name]) for name in names if name in header.info)
    job = job if _ELEMENT.fullmatch(job) else ""
    hashes = header.content_sha256, header.settings_sha256
    return Entry(header.identity[0], *hashes, header.seed, task, header.inputs, seconds, job)


@dataclass(frozen=True)
class State:
    """One task of a stage: its fixed index, and either done or the reason why not."""

    index: int
    task: Task
    done: bool
    reason: str = ""
    waits_for: tuple[str, ...] = ()  # inputs that are not there yet


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
        return shards.sha256_file(self.study_path)

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

        Tasks that the study no longer asks for keep their index; `wanted` tells them apart. freeze: False where tasks
        are only shown: new ones then count also when the list cannot be written, under indices that are not fixed yet.
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
            text = json.dumps([*values, {"sha256": shards.sha256_of(values)}], indent=0)
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
        old = self._remembered()
        told = {name for name, entry in found.items() if name in old or (entry and (entry.wrong or entry.companions))}
        if any(found[name] != old.get(name) for name in told):
            self._remember({name: entry for name, entry in {**old, **found}.items() if entry})

    def _remembered(self) -> dict[str, Entry]:
        try:
            stored = json.loads(files.read_plain(self.root / "index.json"))
            if stored["sha256"] != shards.sha256_of(stored["shards"]):
                raise ValueError("its checksum does not hold")
            return {name: Entry(*values) for name, values in stored["shards"].items()}
        except _UNREADABLE:
            return {}

    def _remember(self, entries: Mapping[str, Entry]) -> None:
        told = {name: dataclasses.astuple(entry) for name, entry in entries.items()}
        with contextlib.suppress(BadInput):  # a full or read-only disk stops neither `status` nor `verify`
            text = json.dumps({"shards": told, "sha256": shards.sha256_of(told)})
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

    # ---------------------------------------------------------------- what is done

    def states(
        self, stages: tuple[str, ...] = STAGES, check: bool = False, freeze: bool = True
    ) -> dict[str, list[State]]:
        """Every wanted task of the given stages with its index, and whether it is done or why not.

        check: hash every file as well, also raw ones, so that a damaged one counts as missing, and correct the index.
        freeze: as for `tasks`.
        """
        judge = Judge(self, check, raw=check)
        found = {stage: judge.stage(stage, freeze) for stage in stages}
        if check:
            judge.correct_index(judge.verdicts)
        return found


class Judge:
    """Judges outputs against the study, each once: valid while settings, seed and input contents are as asked.

    check: hash every file that is asked for, and take what it says from the file and not from the index, which a copy
    onto a shard (same inode) would not change. Otherwise what an earlier check found wrong counts, of the same inode.
    read: what shards said that the caller has just read whole, so that they are not read again, nor the index.
    raw: hash every raw image and mask too, where their folder can be reached.
    """

    def __init__(
        self, workspace: Workspace, check: bool = False, read: Mapping[str, Entry] | None = None, raw: bool = False
    ):
        self.workspace, self.study, self.check, self.read, self.raw = workspace, workspace.study, check, read or {}, raw
        # With `check` every entry is read from its file: nothing that was not hashed is opened.
        self.index = {} if check and read is None else dict(read) if read is not None else workspace.index()
        self.verdicts: dict[str, str] = {}  # output -> "" when valid, else the reason
        self.blocked: set[str] = set()  # outputs with no fault of their own but an input that is to be made first
        self.hashes: dict[tuple[str, ...], str] = {}  # of settings, by what they depend on
        self.sums: dict[str, dict[str, dict[str, str]]] = {}  # of the external generators, each read once
        self.weights: dict[str, str] = {}
        self.opened: set[Path] = set()  # folders, once a file was missing there
        self.makers = {task.output: task for stage in STAGES for task in planning.tasks(self.study, stage)}

    def stage(self, stage: str, freeze: bool = True) -> list[State]:
        wanted = self.workspace.wanted(stage)
        states = []
        for index, task in enumerate(self.workspace.tasks(stage, freeze)):
            if task.output in wanted:
                reason = self.reason(task)
                waits = () if not reason else tuple(p for p in planning.inputs(self.study, task) if self.verdict(p))
                states.append(State(index, task, not reason, reason, waits))
        return states

    def reason(self, task: Task) -> str:
        if task.stage == "ingest":
            cohort, folds = self.whole(COHORT), self.whole(FOLDS)
            return cohort or folds
        if task.stage == "aggregate":
            return self._report_reason()
        return self.whole(task.output)

    def whole(self, output: str) -> str:
        """As `verdict`, and for its companions too, which nobody who reads the shard needs."""
        if wrong := self.verdict(output):
            return wrong
        if self.check:
            path = self.workspace.path(output)
            found = shards.check_companions(shards.read_header(path), path.parent)
            told = "; ".join(f"{name}: {what}" for name, what in found)
            self.index[output] = dataclasses.replace(self.index[output], companions=told)
        return self.index[output].companions

    def verdict(self, output: str) -> str:
        if output not in self.verdicts:
            self.verdicts[output] = self._judge(output)
        return self.verdicts[output]

    def correct_index(self, outputs: Iterable[str]) -> None:
        """Tell the index of the workspace what these outputs were found to be; for a judge that checks."""
        self.workspace.correct_index({out: self.index.get(out) for out in outputs})

    def _judge(self, output: str) -> str:
        task = Task("ingest") if output == COHORT else self.makers[output]
        if self.check:
            if files.is_linked(self.workspace.path(output)):
                return "it is reached through a link, which is not followed"
            if entry := self.read.get(output) or self._read(output):
                self.index[output] = entry
        entry = self.index.get(output)
        if entry is None:
            return "missing"
        if not entry.content_sha256:
            return entry.wrong
        key = planning.settings_key(task, output)
        if key not in self.hashes:
            self.hashes[key] = shards.sha256_of(planning.settings(self.study, task, output))
        if entry.settings_sha256 != self.hashes[key]:
            return self._settings_reason(output, planning.settings(self.study, task, output))
        if entry.seed != planning.seed(self.study, task, output):
            return "the study's seed changed"
        if entry.task_sha256 != shards.sha256_of(task.to_json()):
            return "it is the shard of another task"
        asked = [COHORT] if output == FOLDS else planning.inputs(self.study, task)
        if output == COHORT:
            return self._table_reason(entry)
        told = dict(entry.inputs)
        images = told.pop(external.input_name(task), "") if task.stage == "synthesize" else ""
        if images and (wrong := self._external_reason(task, images)):
            return wrong
        weights = told.pop(WEIGHTS, "") if task.stage == "classify" else ""
        if weights and self._weights_sha256(task.classifier) not in ("", weights):
            return f"the weights that {task.classifier} starts from changed"
        if sorted(told) != sorted(asked):
            return "it reads other shards now"
        for path in asked:
            if self.verdict(path):
                self.blocked.add(output)
                return f"input {path} is to be made first ({self.verdict(path)})"
            if self.index[path].content_sha256 != entry.inputs[path]:
                return f"input {path} changed"
        return ""

    def _read(self, output: str) -> Entry | None:
        """What the file says of itself once its checksum was seen to hold; None where there is none."""
        file, inode = self.workspace.path(output), 0
        with contextlib.suppress(OSError):
            inode = os.stat(file).st_ino
        wrong = shards.damage_of(file)
        if wrong == "missing" and self._looked_anew(file.parent):
            wrong = shards.damage_of(file)
        if wrong and wrong != "missing":
            return damaged(inode, wrong)
        return None if wrong else self.workspace.read_entry(output, hashed=True)

    def _looked_anew(self, folder: Path) -> bool:
        """Whether a file that was missing may be there now, once for each folder.

        NFS remembers for a while that a name was not there, and asks its server anew when the folder is opened.
        """
        if folder in self.opened:
            return False
        root = self.workspace.root
        way = [path for path in (folder, *folder.parents) if path.is_relative_to(root) and path not in self.opened]
        for path in reversed(way):
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        self.opened.update(way)
        return bool(way)

    def _settings_reason(self, output: str, asked: dict[str, Any]) -> str:
        """Which settings differ, old and new."""
        try:
            told = shards.read_shard(self.workspace.path(output)).settings
        except (CmrhpcError, OSError):
            return "its settings changed"
        changes = settings_changes(told, json.loads(shards.canonical(asked)))
        return f"settings changed: {'; '.join(changes[:5])}" if changes else "its settings changed"

    def _table_reason(self, entry: Entry) -> str:
        """The raw table is compared where it can be read; on a laptop without raw data it is not."""
        table = self.workspace.raw / self.study.data.table
        told = entry.inputs.get(self.study.data.table)
        try:
            now = shards.sha256_file(table)
        except OSError:
            return ""
        if told and now != told:
            return f"the table {self.study.data.table} changed"
        if not self.raw:
            return entry.wrong
        wrong = self._raw_reason()
        if wrong:  # in words that name no file
            self.index[COHORT] = dataclasses.replace(entry, wrong="the raw images or masks changed")
        return wrong

    def _raw_reason(self) -> str:
        """Whether the raw images and masks are those that the cohort's report names."""
        from cmrhpc.data import sources
        from cmrhpc.data.table import read_table

        data = self.study.data
        try:
            rows = read_table(self.workspace.raw, data.table, data.columns)  # no link that leads out is followed
        except BadInput as error:
            return f"{error.where}: {error.what}"
        path = self.workspace.path(COHORT)
        report = path.with_suffix(".csv")
        try:
            text = files.read_plain(report)
            whole = shards.read_header(path).files.get(report.name) == shards.sha256_of(text)
        except (CmrhpcError, OSError):
            whole = False
        # A damaged report is a companion of the cohort and told as such.
        return sources.changed(rows, self.workspace.raw, text.decode()) if whole else ""

    def _external_reason(self, task: Task, content: str) -> str:
        """External images are compared where their folder can be reached: by their list, with `check` each file."""
        root = self.workspace.external(task.generator)
        if not os.access(root / external.SUMS, os.R_OK):
            return ""
        try:
            if task.generator not in self.sums:
                self.sums[task.generator] = external.read_sums(root)
            place = external.place_of(root, self.sums[task.generator], task)
        except BadInput as error:
            return f"external images: {error.what}"
        if place.content_sha256 != content:
            return f"the external images of {place.name} changed"
        if not self.check:
            return self.index[task.output].wrong
        wrong = place.damage()
        if wrong:
            told = f"the external images of {place.name} are damaged"
            self.index[task.output] = dataclasses.replace(self.index[task.output], wrong=told)
        return wrong

    def _weights_sha256(self, classifier: str) -> str:
        """Of the file that a classifier starts from; empty where it cannot be read."""
        if classifier not in self.weights:
            try:
                self.weights[classifier] = shards.sha256_file(self.workspace.weights(classifier))
            except OSError:
                self.weights[classifier] = ""
        return self.weights[classifier]

    def _report_reason(self) -> str:
        report = self.workspace.path(REPORT)
        if (told := seal.read(report)) is None:
            return "missing"
        if wrong := seal.damage(report):
            return f"damaged: {wrong[0]}"
        if not told.sources:
            return "its making was not finished"
        if told.sources != report_sources(self):
            return "predictions, images or the study changed since the report"
        return ""


def report_sources(judge: Judge) -> dict[str, str]:
    """What a report was made from: content hashes of all valid shards, and the study."""
    valid = {out: judge.index[out].content_sha256 for out in judge.makers if out != REPORT and not judge.verdict(out)}
    return valid | {"study": shards.sha256_of(judge.study.to_json())}


def _read_segment(path: Path) -> list[dict[str, Any]]:
    """The tasks of one segment. Its last element is the sha256 of the others."""
    *values, told = json.loads(files.read_plain(path))
    if told != {"sha256": shards.sha256_of(values)}:
        raise ValueError("its checksum does not hold")
    return values


def settings_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """Differences between two JSON values as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += settings_changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {old} -> {new}"]


def plan(workspace: str | Path | Workspace) -> dict[str, list[State]]:
    """All tasks of a workspace by stage, done or with the reason why not."""
    return (workspace if isinstance(workspace, Workspace) else Workspace(workspace)).states()
