"""Predictions folder -> one checked table in memory: which cells the study expects, which are there, which are not.

A cell is one classify task. Works on a workspace and on a copied predictions folder alone; then the study is the one
that the newest shard carries. A shard that is damaged, that belongs to another task, study or cohort, or whose scores
cannot be measured is refused: its cell counts as missing and the reason is kept. Nothing is ever filled in.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, planning, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.forked import in_order
from cmrhpc.hashing import sha256_file, sha256_of
from cmrhpc.measure.metrics import check_scores
from cmrhpc.names import IMAGES_SCHEMA, PREDICTIONS_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, WEIGHTS, Task
from cmrhpc.report.leaks import ImageTable, find_leaks, image_table
from cmrhpc.shards import Shard
from cmrhpc.study import Primary, Study, load_study
from cmrhpc.typed import build

Key = tuple[str, str, float]  # classifier, arm, ratio


@dataclass(frozen=True)
class Images:
    """A set of tested images, shared by all cells of a fold and repeat."""

    row: np.ndarray  # (N,) i8, row of Collection.ids
    label: np.ndarray  # (N,) i8
    patient: np.ndarray  # (N,) i8, row of Collection.patients


@dataclass(frozen=True)
class Normalised:
    """How the cohort says that its images came to [-1, 1] (METHODS M1)."""

    images: dict[str, int]  # per kind: window, percentile
    clipped: float  # mean share of the pixels
    classes: dict[str, dict[str, int]] = field(default_factory=dict)  # images per kind; untold by older cohorts


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One classify task whose shard was accepted."""

    task: Task
    shard: Shard
    images: Images
    score: np.ndarray  # (N, K) f8
    n_train: int  # real images that the weights were trained on; those for the choice of the best step do not count
    validation_label: np.ndarray
    validation_score: np.ndarray
    best_step: int


@dataclass(frozen=True, kw_only=True)
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
    made_checked: int  # synthetic and refined shards behind the predictions whose training ids were compared
    made_unchecked: int  # those that are not at hand or cannot be read
    normalised: Normalised | None  # where the cohort is at hand and tells it
    primaries: Counter[Primary | None]  # carried by the predictions; None: untold
    asked: Asked  # knows the shards beside the predictions that were read and checked

    @property
    def declared_before(self) -> bool:
        """Every prediction was made under the primary comparison that the study now names."""
        return set(self.primaries) == {self.study.primary}

    @property
    def leaks_by_design(self) -> bool:
        """The study splits images and some patient has more than one, so that near copies cross the folds."""
        return self.study.folds.group_by == "image" and len(self.patients) < len(self.ids)

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

    def keep_all(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All but the scores, which hardly ever are equal."""
        return {name: values if name.endswith("score") else self.keep(values) for name, values in data.items()}


_NEEDED = {"id": "S", "patient": "S", "label": "i", "score": "f", "train_id": "S"}  # kind of each dataset
_OPTIONAL = {"validation_id": "S", "validation_label": "i", "validation_score": "f"}


def _predictions_place(folder: Path) -> Path:
    """The predictions folder of a workspace, or `folder` when it is one itself. Raises BadInput when there is none."""
    if not folder.is_dir():
        raise BadInput("no such folder", str(folder), "name a workspace or a copied predictions folder")
    whole = (folder / "predictions").is_dir() or (folder / "study.toml").is_file()
    return folder / "predictions" if whole else folder


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


def _read_or_why(path: Path) -> _Found | str:
    """One shard, or why it cannot be used."""
    try:
        return _read(path)
    except CmrhpcError as error:
        return error.what


def _read(path: Path) -> _Found:
    """Read one shard whole. Raises BadInput when it cannot be used, whatever the study."""
    kinds = _NEEDED | _OPTIONAL
    shard, data = shards.read_shard_with(path, kinds, PREDICTIONS_SCHEMA)
    absent = [name for name in _NEEDED if name not in shard]
    if absent:
        raise BadInput(f"it lacks {', '.join(absent)}")
    for name, values in data.items():
        if values.dtype.kind != kinds[name] or values.ndim != (2 if name.endswith("score") else 1):
            raise BadInput(f"its dataset {name} has the wrong type or shape")
    wrong = check_scores(data["label"], data["score"])
    if wrong or not len(data["id"]) == len(data["patient"]) == len(data["label"]):
        raise BadInput(wrong or "id, patient and label differ in length")
    if len(np.unique(data["id"])) < len(data["id"]):
        raise BadInput("it tests an image twice")
    return _Found(shard, data)


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
        self.makers = {t.output: t for stage in ("synthesize", "refine") for t in planning.tasks(study, stage)}
        self.headers: dict[str, shards.Shard | None] = {}
        self.verdicts: dict[str, str] = {}
        self.hashes: dict[tuple[str, ...], str] = {}  # settings hash by what a task's settings depend on

    def header(self, path: str) -> shards.Shard | None:
        if path not in self.headers:
            try:
                there = (self.root / path).is_file()  # where it is not, `read_shard` would look again and again
                self.headers[path] = shards.read_shard(self.root / path) if there else None
            except (CmrhpcError, OSError):
                self.headers[path] = None
        return self.headers[path]

    def reason(self, task: Task, header: shards.Header) -> str:
        """Empty when valid, otherwise why not."""
        if header.task != task.to_json():
            return "it is the shard of another task"
        key = planning.settings_key(task)
        if key not in self.hashes:
            self.hashes[key] = sha256_of(planning.settings(self.study, task))
        if header.settings_sha256 != self.hashes[key]:
            return "it was made with other settings than the study asks for"
        if header.seed != planning.seed(self.study, task):
            return "it was made with another seed: of another study?"
        return self._inputs_reason(task, header)

    def _inputs_reason(self, task: Task, header: shards.Header) -> str:
        for path in planning.inputs(self.study, task):
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
    pool, found, refused = _Pool(), dict[str, _Found](), dict[str, str]()
    paths = list(_shard_paths(place))
    for path, one in zip(paths, in_order(_read_or_why, paths), strict=True):
        name = prefix + path.relative_to(place).as_posix()
        if isinstance(one, str):
            refused[name] = one
        else:
            found[name] = _Found(one.shard, pool.keep_all(one.data))
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
    expected = planning.tasks(study, "classify")
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
    for name in _other_start(root, study, accepted, tasks):
        del accepted[name]
        refused[name] = "it was trained from other start weights"
    if not accepted:
        why = next((f"{name}: {refused[name]}" for name in tasks if name in refused), "none is of this study")
        mend = "compute the predictions of this study, or copy the study.toml that belongs to them"
        raise BadInput(f"no prediction that this study asks for ({why})", str(place), mend)

    data = {name: one.data for name, one in accepted.items()}
    table = image_table(data)
    cells: dict[Key, dict[tuple[int, int], Cell]] = {}
    shared: dict[tuple[int, int, int], Images] = {}
    for name in (name for name in tasks if name in accepted):
        task, one = tasks[name], accepted[name]
        row = cells.setdefault((task.classifier, task.arm, task.ratio), {})
        row[task.repeat, task.fold] = _cell(task, one, table, shared)
    _check_tested_once(cells)
    made, made_unchecked = _made_from(asked, [tasks[name] for name in accepted], data, pool)
    both = data | made
    leaks, unchecked = find_leaks(both, tasks | asked.makers, table, by_image=study.folds.group_by == "image")
    missing = {name: refused.get(name, "not computed") for name in tasks if name not in accepted}
    return Collection(
        root=root,
        study=study,
        study_from=study_from,
        expected=expected,
        cells=cells,
        missing=missing,
        refused=refused,
        unasked=unasked,
        ids=table.ids,
        image_label=table.label,
        image_patient=table.patient,
        patients=table.patients,
        leaks=leaks,
        unchecked_ids=unchecked,
        made_checked=len(made),
        made_unchecked=made_unchecked,
        normalised=_normalised(asked.header(COHORT)),
        primaries=_primaries(accepted),
        asked=asked,
    )


def _made_from(
    asked: Asked, read_by: list[Task], predictions: Mapping[str, Mapping[str, np.ndarray]], pool: _Pool
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Per synthetic or refined shard behind the predictions what it was made from and the ids that its fold tests.

    The second value counts those that are not at hand (a copied predictions folder has none) or cannot be read.
    """
    waiting, behind = list(read_by), dict[str, Task]()
    while waiting:
        for path in planning.inputs(asked.study, waiting.pop()):
            if path in asked.makers and path not in behind:
                behind[path] = asked.makers[path]
                waiting.append(asked.makers[path])
    tested: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for task in read_by:
        ids = predictions[task.output]["id"]
        tested.setdefault((task.repeat, task.fold), {})[id(ids)] = ids
    by_fold = {fold: pool.keep(np.unique(np.concatenate(list(ids.values())))) for fold, ids in tested.items()}
    found = {}
    for path, task in behind.items():
        shard = asked.header(path)
        if shard is None or shard.schema != IMAGES_SCHEMA:
            continue
        try:
            made_from = shard["train_id"]
        except CmrhpcError:
            continue
        if made_from.dtype.kind == "S" and made_from.ndim == 1:
            found[path] = {"id": by_fold[task.repeat, task.fold], "made_from_id": pool.keep(made_from)}
    return found, len(behind) - len(found)


def _other_start(root: Path, study: Study, accepted: Mapping[str, _Found], tasks: Mapping[str, Task]) -> list[str]:
    """Predictions whose classifier was trained from other weights than now, or where these are not at hand than the
    newest. A shard that tells none is believed, as by the plan: another path of the file is another setting."""
    told = {name: one.shard.inputs[WEIGHTS] for name, one in accepted.items() if WEIGHTS in one.shard.inputs}
    right: dict[str, str] = {}
    for name in sorted(told, key=lambda name: (str(accepted[name].shard.info.get("written", "")), name)):
        right[tasks[name].classifier] = told[name]
    for classifier in right if (root / "study.toml").is_file() else ():
        if text := study.classifiers[classifier].weights:
            with contextlib.suppress(OSError):
                right[classifier] = sha256_file(root / text)
    return [name for name, value in told.items() if value != right[tasks[name].classifier]]


def _normalised(cohort: Shard | None) -> Normalised | None:
    try:
        return build(Normalised, cohort.attributes["normalise"], COHORT, "normalise") if cohort else None
    except (KeyError, CmrhpcError):
        return None


def _primaries(accepted: dict[str, _Found]) -> Counter[Primary | None]:
    """The primary comparison under which each prediction was made; None where a shard tells none."""
    told: Counter[str] = Counter(str(one.shard.info.get("study", "")) for one in accepted.values())
    found: Counter[Primary | None] = Counter()
    for text, number in told.items():
        try:
            found[build(Primary, json.loads(text)["primary"], "study", "primary")] += number
        except (CmrhpcError, ValueError, TypeError, KeyError, RecursionError):
            found[None] += number
    return found


def _check_tested_once(cells: dict[Key, dict[tuple[int, int], Cell]]) -> None:
    """Raises BadInput when two folds of a repeat test the same image: then they come from two splits."""
    for key, row in cells.items():
        for repeat in {repeat for repeat, _ in row}:
            rows = np.concatenate([cell.images.row for (r, _), cell in row.items() if r == repeat])
            if len(np.unique(rows)) < len(rows):
                where = f"{key[1]} ratio {key[2]:g} {key[0]}, repeat {repeat}"
                raise BadInput("two folds test the same image", where, "predictions of two splits are mixed: keep one")


def _fits(one: _Found, study: Study) -> str:
    if one.shard.attributes.get("classes") != list(study.classes):
        return f"its classes are {one.shard.attributes.get('classes')}, not {list(study.classes)}"[:300]
    if one.data["score"].shape[1] != len(study.classes):
        return f"scores of {one.data['score'].shape[1]} classes, not {len(study.classes)}"
    return ""


def _cell(task: Task, one: _Found, table: ImageTable, shared: dict[tuple[int, int, int], Images]) -> Cell:
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
        task=task,
        shard=one.shard,
        images=shared[key],
        score=data["score"].astype(float),
        n_train=len(np.unique(data["train_id"])),
        validation_label=label,
        validation_score=score,
        best_step=best if isinstance(best, int) else -1,
    )
