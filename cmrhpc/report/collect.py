"""Predictions folder -> one checked table in memory: which cells the study expects, which are there, which are not.

A cell is one classify task. Works on a workspace and on a copied predictions folder alone; then the study is the one
that the newest shard carries. A shard that is damaged, that belongs to another task, study or cohort, or whose scores
cannot be measured is refused: its cell counts as missing and the reason is kept. Nothing is ever filled in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, plan, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.measure.metrics import check_scores
from cmrhpc.plan import COHORT, FOLDS, Task
from cmrhpc.shards import Shard
from cmrhpc.study import Study, load_study

SCHEMA = "predictions-1"
Key = tuple[str, str, float]  # classifier, arm, ratio


@dataclass(frozen=True)
class Images:
    """A set of tested images, shared by all cells of a fold and repeat."""

    row: np.ndarray  # (N,) i8, row of Collection.ids
    label: np.ndarray  # (N,) i8
    patient: np.ndarray  # (N,) i8, row of Collection.patients


@dataclass(frozen=True)
class Cell:
    """One classify task whose shard was accepted."""

    task: Task
    shard: Shard
    images: Images
    score: np.ndarray  # (N, K) f8
    n_train: int  # real images that training or the choice of the best step saw
    validation_label: np.ndarray
    validation_score: np.ndarray
    best_step: int


@dataclass(frozen=True)
class Collection:
    """All predictions of a study, checked against its plan."""

    root: Path  # the folder that holds `predictions`
    study: Study
    study_from: str  # in words
    expected: list[Task]
    cells: dict[Key, dict[tuple[int, int], Cell]]  # inner key: repeat, fold
    missing: dict[str, str]  # output path -> reason, in the order of the plan
    refused: dict[str, str]  # path -> reason: files that are there and not used
    unasked: list[str]  # sound shards that the study no longer asks for
    ids: np.ndarray  # (I,) S32 of all tested images, sorted
    image_label: np.ndarray  # (I,)
    image_patient: np.ndarray  # (I,) row of patients
    patients: list[str]
    leaks: list[str]
    unchecked_ids: int  # training ids whose patient no shard tells

    @property
    def keys(self) -> list[Key]:
        """(classifier, arm, ratio) in the order of the study, classifier first."""
        order = dict.fromkeys((t.classifier, t.arm, t.ratio) for t in self.expected)
        rank = {name: i for i, name in enumerate(self.study.classifiers)}
        return sorted(order, key=lambda key: rank[key[0]])

    def patients_per_class(self) -> list[tuple[str, int, int]]:
        """(class, patients, images) of all tested images."""
        table = []
        for label, name in enumerate(self.study.classes):
            of_class = self.image_label == label
            table.append((name, len(np.unique(self.image_patient[of_class])), int(of_class.sum())))
        return table


@dataclass
class _Found:
    """A shard as read, before the study is known."""

    shard: Shard
    data: dict[str, np.ndarray]


@dataclass
class _Pool:
    """Equal arrays are kept once: all arms of a fold have the same ids."""

    seen: dict[tuple[Any, ...], np.ndarray] = field(default_factory=dict)

    def keep(self, array: np.ndarray) -> np.ndarray:
        return self.seen.setdefault((array.dtype.str, array.shape, array.tobytes()), array)


_NEEDED = ("id", "patient", "label", "score", "train_id")
_OPTIONAL = ("validation_id", "validation_label", "validation_score")


def _predictions_place(folder: Path) -> Path:
    """The predictions folder of a workspace, or `folder` when it is one itself. Raises BadInput when there is none."""
    if not folder.is_dir():
        raise BadInput("no such folder", str(folder), "name a workspace or a copied predictions folder")
    return folder / "predictions" if (folder / "predictions").is_dir() else folder


def _shard_paths(place: Path) -> Iterator[Path]:
    """ARM/RATIO/CLASSIFIER/*.h5 below the predictions folder, sorted; links are not followed."""
    for folder, names, found in os.walk(place):
        names.sort()
        depth = len(Path(folder).relative_to(place).parts)
        if depth >= 3:
            names.clear()
        for name in sorted(found):
            path = Path(folder, name)
            if depth == 3 and name.endswith(".h5") and not files.is_temporary(name) and not path.is_symlink():
                yield path


def _read(path: Path, pool: _Pool) -> _Found:
    """Read one shard whole. Raises BadInput when it cannot be used, whatever the study."""
    shard = shards.read_shard(path, SCHEMA)
    absent = [name for name in _NEEDED if name not in shard]
    if absent:
        raise BadInput(f"it lacks {', '.join(absent)}")
    data = {name: shard[name] for name in (*_NEEDED, *_OPTIONAL) if name in shard}
    if any(data[name].dtype.kind != "S" for name in ("id", "patient", "train_id")) or data["label"].dtype.kind != "i":
        raise BadInput("its datasets have the wrong types")
    wrong = check_scores(data["label"], data["score"])
    if wrong or not len(data["id"]) == len(data["patient"]) == len(data["label"]):
        raise BadInput(wrong or "id, patient and label differ in length")
    if len(np.unique(data["id"])) < len(data["id"]):
        raise BadInput("it tests an image twice")
    kept = {name: values if name.endswith("score") else pool.keep(values) for name, values in data.items()}
    return _Found(shard, kept)


def _newest_study(found: dict[str, _Found]) -> tuple[Study, str]:
    """The study of the shard that was written last. Raises BadInput when no shard carries a readable one."""
    told: CmrhpcError | None = None
    for name in sorted(found, key=lambda name: (str(found[name].shard.info.get("written", "")), name), reverse=True):
        try:
            return Study.from_json(json.loads(found[name].shard.info["study"]), name), f"the newest shard, {name}"
        except (KeyError, ValueError, TypeError, RecursionError):
            told = told or BadInput("it carries no study", name)
        except CmrhpcError as error:
            told = told or error
    raise BadInput(
        f"no study: no study.toml here and none in the shards ({told.what if told else 'no shard'})",
        "predictions",
        "copy study.toml beside the predictions folder",
    )


class Asked:
    """Whether a shard is what the study asks for; inputs are compared where they are at hand."""

    def __init__(self, root: Path, study: Study, reference: dict[str, str]):
        self.root, self.study = root, study
        self.reference = reference  # content hashes of cohort and folds when the files are not at hand
        self.makers = {t.output: t for stage in ("synthesize", "refine") for t in plan.tasks(study, stage)}
        self.headers: dict[str, shards.Header | None] = {}
        self.verdicts: dict[str, str] = {}
        self.hashes: dict[tuple[str, ...], str] = {}  # settings hash by what a task's settings depend on

    def header(self, path: str) -> shards.Header | None:
        if path not in self.headers:
            try:
                self.headers[path] = shards.read_header(self.root / path)
            except (CmrhpcError, OSError):
                self.headers[path] = None
        return self.headers[path]

    def reason(self, task: Task, header: shards.Header) -> str:
        """Empty when valid, otherwise why not."""
        if header.task != task.to_json():
            return "it is the shard of another task"
        key = (task.stage, task.generator, task.refiner, task.arm, task.classifier)
        if key not in self.hashes:
            self.hashes[key] = shards.sha256_of(plan.settings(self.study, task))
        if header.settings_sha256 != self.hashes[key]:
            return "it was made with other settings than the study asks for"
        if header.seed != plan.seed(self.study, task):
            return "it was made with another seed: of another study?"
        return self._inputs_reason(task, header)

    def _inputs_reason(self, task: Task, header: shards.Header) -> str:
        for path in plan.inputs(self.study, task):
            source = self.header(path)
            known = source.content_sha256 if source else self.reference.get(path)
            if known and header.inputs.get(path) != known:
                return f"it was made from another {path}"
            if source and path in self.makers:
                if path not in self.verdicts:
                    self.verdicts[path] = self.reason(self.makers[path], source)
                if self.verdicts[path]:
                    return f"{path}: {self.verdicts[path]}"
        return ""


def collect(folder: Path) -> Collection:
    """Read and check every prediction of a workspace or of a copied predictions folder.

    Raises BadInput when there is no usable prediction at all, or when accepted shards contradict each other about an
    image (its patient or class): then two cohorts are mixed and no number would mean anything.
    """
    folder = Path(folder)
    place = _predictions_place(folder)
    root = place.parent if place.name == "predictions" else folder
    prefix = "predictions/"

    # Read all shards; keep the reason of each that cannot be read.
    pool, found, refused = _Pool(), {}, {}
    for path in _shard_paths(place):
        name = prefix + path.relative_to(place).as_posix()
        try:
            found[name] = _read(path, pool)
        except CmrhpcError as error:
            refused[name] = error.what
    if not found:
        told = f"{len(refused)} refused, first: {next(iter(refused.items()))}" if refused else "no shard found"
        mend = "run `cmrhpc run` first, or copy the predictions folder whole (ARM/ratioR/CLASSIFIER/*.h5)"
        raise BadInput(f"no prediction to aggregate ({told})", str(place), mend)

    # Which study asks? Which cells does it expect?
    study_path = root / "study.toml"
    if study_path.is_file():
        study, study_from = load_study(study_path), "study.toml"
    else:
        study, study_from = _newest_study(found)
    expected = plan.tasks(study, "classify")
    tasks = {task.output: task for task in expected}

    # Accept what the study asks for; refuse the rest with its reason.
    newest = max(found, key=lambda name: (name in tasks, str(found[name].shard.info.get("written", "")), name))
    reference = {path: found[newest].shard.inputs.get(path, "") for path in (COHORT, FOLDS)}
    asked = Asked(root, study, reference)
    accepted: dict[str, _Found] = {}
    unasked = []
    for name, one in found.items():
        if name not in tasks:
            unasked.append(name)
            continue
        reason = _fits(one, study) or asked.reason(tasks[name], one.shard)
        if reason:
            refused[name] = reason
        else:
            accepted[name] = one
    if not accepted:
        why = next((f"{name}: {refused[name]}" for name in tasks if name in refused), "none is of this study")
        mend = "compute the predictions of this study, or copy the study.toml that belongs to them"
        raise BadInput(f"no prediction that this study asks for ({why})", str(place), mend)

    table = _image_table(accepted)
    cells: dict[Key, dict[tuple[int, int], Cell]] = {}
    shared: dict[tuple[int, int, int], Images] = {}
    for name in (name for name in tasks if name in accepted):
        task, one = tasks[name], accepted[name]
        row = cells.setdefault((task.classifier, task.arm, task.ratio), {})
        row[task.repeat, task.fold] = _cell(task, one, table, shared)
    leaks, unchecked = _find_leaks(accepted, tasks, table)
    missing = {name: refused.get(name, "not computed") for name in tasks if name not in accepted}
    return Collection(
        root,
        study,
        study_from,
        expected,
        cells,
        missing,
        refused,
        unasked,
        table.ids,
        table.label,
        table.patient,
        table.patients,
        leaks,
        unchecked,
    )


def _fits(one: _Found, study: Study) -> str:
    if tuple(one.shard.attributes.get("classes", ())) != study.classes:
        return f"its classes are {one.shard.attributes.get('classes')}, not {list(study.classes)}"
    if one.data["score"].shape[1] != len(study.classes):
        return f"scores of {one.data['score'].shape[1]} classes, not {len(study.classes)}"
    return ""


@dataclass(frozen=True)
class _Table:
    ids: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    patients: list[str]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row of each id, -1 where no accepted shard tests it."""
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place, -1)


def _image_table(accepted: dict[str, _Found]) -> _Table:
    """All tested images, each once. Raises BadInput when two shards disagree about one."""
    distinct: dict[tuple[int, ...], tuple[str, _Found]] = {}  # equal arrays were kept once, so identity tells
    for name, one in accepted.items():
        distinct.setdefault(tuple(id(one.data[n]) for n in ("id", "patient", "label")), (name, one))
    parts = [one.data for _, one in distinct.values()]
    ids, patient, label = (np.concatenate([part[n] for part in parts]) for n in ("id", "patient", "label"))
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    contradiction = (patient != patient[first][inverse]) | (label != label[first][inverse])
    if contradiction.any():
        where = int(np.flatnonzero(contradiction)[0])
        owner = np.repeat(np.arange(len(parts)), [len(part["id"]) for part in parts])[where]
        raise BadInput(
            f"shards disagree about the patient or class of image {ids[where].decode('utf-8', 'replace')}",
            list(distinct.values())[owner][0],
            "predictions of two cohorts are mixed here: keep those of one",
        )
    names, rows = np.unique(patient[first], return_inverse=True)
    patients = [name.decode("utf-8", "replace") for name in names.tolist()]
    return _Table(unique, label[first], rows, patients)


def _cell(task: Task, one: _Found, table: _Table, shared: dict[tuple[int, int, int], Images]) -> Cell:
    data = one.data
    key = (id(data["id"]), id(data["patient"]), id(data["label"]))
    if key not in shared:
        rows = table.rows(data["id"])
        shared[key] = Images(rows, data["label"], table.patient[rows])
    k = data["score"].shape[1]
    label = data.get("validation_label", np.zeros(0, np.int64))
    score = data.get("validation_score", np.zeros((0, k)))
    if check_scores(label, score) or score.shape[1] != k:
        label, score = np.zeros(0, np.int64), np.zeros((0, k))  # nothing to choose a ratio by
    best = one.shard.attributes.get("best_step", -1)
    return Cell(
        task,
        one.shard,
        shared[key],
        data["score"].astype(float),
        len(np.unique(data["train_id"])) + len(np.unique(data.get("validation_id", data["id"][:0]))),
        label,
        score,
        best if isinstance(best, int) else -1,
    )


def _find_leaks(accepted: dict[str, _Found], tasks: dict[str, Task], table: _Table) -> tuple[list[str], int]:
    """Test images or patients that training or validation saw, one line per fold and kind; and ids not checkable."""
    found: dict[tuple[int, int, str], list[str]] = {}
    checked: dict[tuple[int, ...], list[str]] = {}
    unknown: set[bytes] = set()
    for name, one in accepted.items():
        data, task = one.data, tasks[name]
        key = tuple(id(data.get(n)) for n in ("id", "train_id", "validation_id"))
        if key not in checked:
            checked[key] = _leaks_of(data, table, unknown)
        for line in checked[key]:
            found.setdefault((task.repeat, task.fold, line), []).append(name)
    lines = [
        f"repeat {repeat} fold {fold}: {line} ({len(names)} shard{'s' * (len(names) > 1)})"
        for (repeat, fold, line), names in sorted(found.items())
    ]
    return lines, len(unknown)


def _leaks_of(data: dict[str, np.ndarray], table: _Table, unknown: set[bytes]) -> list[str]:
    lines = []
    tested = np.unique(table.patient[table.rows(data["id"])])
    for part in ("train", "validation"):
        ids = np.unique(data.get(f"{part}_id", data["id"][:0]))
        if both := len(np.intersect1d(ids, data["id"])):
            lines.append(f"{both} test image{'s' * (both > 1)} in {part}")
        rows = table.rows(ids)
        unknown.update(ids[rows < 0].tolist())
        patients = np.intersect1d(table.patient[rows[rows >= 0]], tested)
        if len(patients):
            some = ", ".join(table.patients[p] for p in patients[:5]) + (", ..." if len(patients) > 5 else "")
            lines.append(f"{len(patients)} test patient{'s' * (len(patients) > 1)} in {part}: {some}")
    return lines
