"""Re-hashes every file of a workspace, proves that no patient leaks, and gives all results one digest."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, seal, shards
from cmrhpc.data.folds import Split
from cmrhpc.data.selection import checked_split
from cmrhpc.errors import CmrhpcError
from cmrhpc.planning import COHORT, FOLDS, REPORT, STAGES
from cmrhpc.study import Study
from cmrhpc.validity import Judge, report_sources
from cmrhpc.workspace import Entry, Workspace, damaged, entry_of

_MALFORMED = (KeyError, ValueError, TypeError, AttributeError, CmrhpcError)  # of datasets of another kind


@dataclass
class Verdict:
    """digest: sha256 over the content hashes, in path order, of all sound shards that the study asks for.

    damaged, leaks: one line each. out_of_date: what is whole but older than the study or the shards; no damage.
    leaks_unchecked: why leaks could not be looked for; empty where they were. missing: tasks that are not done.
    """

    digest: str = ""
    damaged: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    leaks_unchecked: str = ""
    out_of_date: list[str] = field(default_factory=list)
    files: int = 0
    shards: int = 0
    missing: int = 0


def verify(workspace: Workspace) -> Verdict:
    """Check every shard with its companions, whether it is the one that the study asks for, and every leak.

    Also what is gone although others were made from it, the report against its seal, and the frozen task lists. Logs,
    which only grow, are not checked. Nothing is written but the index, so that `plan` and `submit` know of the damage.
    """
    result = Verdict()
    present = workspace.listing()
    wrong: dict[str, str] = {}
    whole: dict[str, shards.Shard] = {}
    entries: dict[str, Entry] = {}
    for name in sorted(present):
        result.shards += 1
        try:
            shard = shards.read_shard(workspace.path(name))
            result.files += 1 + len(shard.files)
            found = shards.check_companions(shard, workspace.path(name).parent)
            companions = "; ".join(f"{file}: {what}" for file, what in found)
            wrong[name] = companions or shards.check_content(shard)
            whole[name] = shard
            entries[name] = dataclasses.replace(entry_of(shard), companions=companions)
        except CmrhpcError as error:
            wrong[name] = error.what
            entries[name] = damaged(present[name], error.what.removeprefix("shard "))
    judge = Judge(workspace, check=True, read=entries, raw=True)
    expected = [COHORT, *(output for output in judge.makers if output != REPORT)]
    asked = set(expected)
    for name in whole:
        if name in asked and not wrong[name] and judge.verdict(name) and name not in judge.blocked:
            wrong[name] = judge.verdict(name)
    result.damaged = [f"{name}: {what}" for name, what in wrong.items() if what]
    absent = [name for name in expected if name not in present]
    judge.correct_index([*expected, *present])
    tasks = {FOLDS if name == COHORT else name for name in absent}  # ingest makes both
    result.missing = len(tasks) + (not workspace.path(REPORT).is_file())
    result.damaged += _gone(workspace, absent, whole)
    result.damaged += [f"report/{line}" for line in seal.damage(workspace.path(REPORT))]
    result.damaged += _task_lists(workspace, judge, present)
    result.out_of_date = list(_older(workspace, judge))
    sound = {name: shard for name, shard in whole.items() if name in asked and not wrong[name]}
    hashes = "".join(sound[name].content_sha256 for name in sorted(sound))
    result.digest = hashlib.sha256(hashes.encode()).hexdigest()
    lacking = [name for name in (COHORT, FOLDS) if name not in sound]
    if lacking:
        result.leaks_unchecked = f"{' and '.join(lacking)} missing, damaged or not what the study asks for"
    else:
        result.leaks = list(_leaks(workspace.study, sound))
    return result


def _gone(workspace: Workspace, absent: list[str], whole: dict[str, shards.Shard]) -> Iterator[str]:
    """Absent shards that once existed (something was made from them), and whatever occupies a shard's path."""
    made = defaultdict(list)
    for name, shard in whole.items():
        for path in shard.inputs:
            made[path].append(name)
    if report := seal.read(workspace.path(REPORT)):
        for path in report.sources:
            made[path].append("the report")
    for name in absent:
        if there := _in_the_way(workspace, name):
            yield f"{name}: {there}"
        elif made[name]:
            more = f" and {len(made[name]) - 1} more" if len(made[name]) > 1 else ""
            yield f"{name}: missing, although {made[name][0]}{more} came from it"


def _in_the_way(workspace: Workspace, name: str) -> str:
    """What has the name of a shard and is none; empty where there is nothing."""
    path = workspace.path(name)
    if not os.path.lexists(path):
        return ""
    if files.is_linked(path):
        return "it is reached through a link, which is not followed: remove the link"
    return "a folder has its name: remove it" if path.is_dir() else ""


def _task_lists(workspace: Workspace, judge: Judge, present: dict[str, int]) -> Iterator[str]:
    """What is wrong with the frozen lists. One that is gone is told by shards whose tasks no list holds."""
    for stage in STAGES:
        try:
            frozen, last = workspace.frozen(stage)
        except CmrhpcError as error:
            yield f"{Path(error.where).relative_to(workspace.root)}: {error.what}"
            continue
        if stage in ("ingest", "aggregate"):  # one task each: its index is 0 in any case
            continue
        listed = {task.output for task in frozen}
        made = [out for out, task in judge.makers.items() if task.stage == stage and out in present]
        if lost := [out for out in made if out not in listed]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            yield f"tasks/{stage}/{last + 1:04d}.json: missing, no list holds the task of {lost[0]}{more}"


def _older(workspace: Workspace, judge: Judge) -> Iterator[str]:
    """Whether the report was made from the study and the shards as they are now."""
    if (told := seal.read(workspace.path(REPORT))) is None:
        return
    if not told.sources:
        yield "report: its making was not finished"
        return
    now, then = report_sources(judge), dict(told.sources)
    if now.pop("study") != then.pop("study", ""):
        yield "report: out of date, study.toml changed since it was made"
    if now != then:
        yield "report: out of date, shards were added, removed or changed since it was made"


# ------------------------------------------------------------------------------------------------ leaks


@dataclass(frozen=True)
class _Real:
    """The cohort as leaks see it: patient and label of every id; group: what may not be in two parts of a fold."""

    patient: dict[str, str]
    label: dict[str, int]
    group: dict[str, str]
    images: set[bytes]  # hashes, see `_image_hashes`


def _leaks(study: Study, sound: dict[str, shards.Shard]) -> Iterator[str]:
    """Patients (or images) in training and in test, predictions that are not their fold's, copies of real images."""
    cohort, folds = sound[COHORT], sound[FOLDS]
    try:
        ids, patients = cohort.strings("id"), cohort.strings("patient")
        patient = dict(zip(ids, patients, strict=True))
        label = dict(zip(ids, cohort["label"].tolist(), strict=True))
        group = {one: one for one in ids} if study.folds.group_by == "image" else patient
        hashes = _image_hashes(cohort)
        real = _Real(patient, label, group, set(hashes))
    except _MALFORMED as error:
        yield f"{COHORT}: it is not a cohort ({_told(error)})"
        return
    first: dict[bytes, str] = {}
    copies = [(one, first.setdefault(pixels, one)) for one, pixels in zip(ids, hashes, strict=True)]
    if crossing := [f"{one} is {other}" for one, other in copies if group[one] != group[other]]:
        shown = ", ".join(crossing[:5]) + (", ..." if len(crossing) > 5 else "")
        yield f"{COHORT}: {len(crossing)} images are those of another {study.folds.group_by}, equal to 8 bits: {shown}"
    splits: dict[tuple[int, int], Split] = {}
    for repeat in range(study.folds.repeats):
        for fold in range(study.folds.k):
            try:
                splits[repeat, fold] = checked_split(ids, patients, folds, repeat, fold)
            except _MALFORMED as error:
                yield f"{FOLDS}: {_told(error)}"
        own = [split for (number, _), split in splits.items() if number == repeat]
        if len(own) == study.folds.k and sorted(one for split in own for one in split.test) != sorted(ids):
            yield f"{FOLDS}: repeat {repeat} does not test every image once"
    if folds.attributes.get("group_by") != study.folds.group_by:
        yield f"{FOLDS}: it says that it was not grouped by {study.folds.group_by}"
    for name, shard in sound.items():
        place = shard.task.get("repeat"), shard.task.get("fold")
        if place in splits:
            try:
                yield from (f"{name}: {what}" for what in _leaks_of(shard, splits[place], real))
            except _MALFORMED as error:
                yield f"{name}: its ids are not those of the cohort ({_told(error)})"


def _leaks_of(shard: shards.Shard, split: Split, real: _Real) -> Iterator[str]:
    """What one shard of a fold has seen or tested that it must not."""
    predicts = shard.task["stage"] == "classify"
    names = ("id", "patient", "label", "train_id", "validation_id", "validation_label") if predicts else ("train_id",)
    told = {name: _values(stored) for name, stored in shard.read_many(names).items()}
    seen, validated = told["train_id"], told.get("validation_id", [])
    held = {real.group[one] for one in split.test}
    crossing = sorted({real.patient[one] for one in seen + validated if real.group[one] in held})
    if crossing:
        yield f"patients {', '.join(crossing[:5])} are in training and in test"
    elif outside := len(set(seen) - set(split.train)):
        yield f"{outside} images that it was trained on are not in the training set of its fold"
    elif predicts and (sorted(seen) != sorted(split.train) or sorted(validated) != sorted(split.validation)):
        yield "it was not trained and validated on all images of its fold, each once"
    if predicts:
        if sorted(told["id"]) != sorted(split.test):
            yield "it does not test the images of its fold, each once"
        pairs = {"id": ("patient", "label"), "validation_id": ("validation_label",)}
        for ids, name in ((ids, name) for ids, every in pairs.items() for name in every):
            right = real.patient if name == "patient" else real.label
            if count := sum(right[one] != value for one, value in zip(told[ids], told[name], strict=True)):
                yield f"{name}: {count} differ from the cohort"
    if "image" in shard and (copies := len(set(_image_hashes(shard)) & real.images)):
        yield f"{copies} images are copies of real ones, equal to 8 bits"


def _values(stored: np.ndarray) -> list[Any]:
    """Numbers or texts of a dataset."""
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in stored.tolist()]


def _told(error: Exception) -> str:
    return error.what if isinstance(error, CmrhpcError) else str(error)


def _image_hashes(shard: shards.Shard) -> list[bytes]:
    """One hash per image at 8 bits, so that a copy which went through a .png is found as well."""
    pixels = (np.nan_to_num(image) * 127.5 + 127.5 for image in shard["image"])
    return [hashlib.sha256(p.round().clip(0, 255).astype(np.uint8).tobytes()).digest() for p in pixels]
