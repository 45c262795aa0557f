"""Which tasks of a workspace are done, and why the others are not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmrhpc import external, files, planning, seal, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.hashing import canonical, differences, sha256_file, sha256_of
from cmrhpc.planning import COHORT, FOLDS, REPORT, STAGES, WEIGHTS, Task
from cmrhpc.workspace import Entry, Workspace, damaged


@dataclass(frozen=True)
class State:
    """One task of a stage: its fixed index, and either done or the reason why not."""

    index: int
    task: Task
    done: bool
    reason: str = ""
    waits_for: tuple[str, ...] = ()  # inputs that are not there yet


def states(
    workspace: Workspace, stages: tuple[str, ...] = STAGES, check: bool = False, freeze: bool = True
) -> dict[str, list[State]]:
    """Every wanted task of the given stages with its index, and whether it is done or why not.

    check: hash every file as well, also raw ones, so that a damaged one counts as missing, and correct the index.
    freeze: as for `Workspace.tasks`.
    """
    judge = Judge(workspace, check, raw=check)
    found = {stage: judge.stage(stage, freeze) for stage in stages}
    if check:
        judge.correct_index(judge.verdicts)
    return found


def plan(workspace: str | Path | Workspace) -> dict[str, list[State]]:
    """All tasks of a workspace by stage, done or with the reason why not."""
    return states(workspace if isinstance(workspace, Workspace) else Workspace(workspace))


class Judge:
    """Judges outputs against the study, each once: valid while settings, seed and input contents are as asked.

    check: hash every requested file and read its header from the file: a copy over a shard keeps its inode, so the
    index would not notice. Otherwise the index tells, also what an earlier check found wrong.
    read: entries of shards that the caller has just read; neither they nor the index are read again.
    raw: hash every raw image and mask too, where their folder can be reached.
    """

    def __init__(
        self, workspace: Workspace, check: bool = False, read: Mapping[str, Entry] | None = None, raw: bool = False
    ):
        self.workspace, self.study, self.check, self.read, self.raw = workspace, workspace.study, check, read or {}, raw
        if read is not None:
            self.index = dict(read)
        elif check:  # every entry is read from its file: nothing that was not hashed is opened
            self.index = {}
        else:
            self.index = workspace.index()
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
        wrong, entry = self.verdict(output), self.index.get(output)
        if entry and entry.content_sha256 and self.check:
            path = self.workspace.path(output)
            with contextlib.suppress(CmrhpcError, OSError):  # it is being replaced
                found = shards.check_companions(shards.read_header(path), path.parent)
                entry = dataclasses.replace(entry, companions="; ".join(f"{name}: {what}" for name, what in found))
                self.index[output] = entry
        return wrong or (entry.companions if entry else "")

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
            self.hashes[key] = sha256_of(planning.settings(self.study, task, output))
        if entry.settings_sha256 != self.hashes[key]:
            return self._settings_reason(output, planning.settings(self.study, task, output))
        if entry.seed != planning.seed(self.study, task, output):
            return "the study's seed changed"
        if entry.task_sha256 != sha256_of(task.to_json()):
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
        changes = differences(told, json.loads(canonical(asked)))
        return f"settings changed: {'; '.join(changes[:5])}" if changes else "its settings changed"

    def _table_reason(self, entry: Entry) -> str:
        """The raw table is compared where it can be read; on a laptop without raw data it is not."""
        table = self.workspace.raw / self.study.data.table
        told = entry.inputs.get(self.study.data.table)
        try:
            now = sha256_file(table)
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
            whole = shards.read_header(path).files.get(report.name) == sha256_of(text)
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
                self.weights[classifier] = sha256_file(self.workspace.weights(classifier))
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
    return valid | {"study": sha256_of(judge.study.to_json())}
