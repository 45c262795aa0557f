"""Prediction shards with known truth: a cohort, its folds, and whatever scores a test wants; and a report, read."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import planning, shards
from cmrhpc.hashing import canonical
from cmrhpc.planning import Task
from cmrhpc.study import Study, parse_study

HASHES = {"cohort.h5": "a" * 64, "folds.h5": "b" * 64}
Scores = Callable[[Task, np.ndarray], np.ndarray]  # task, rows of the cohort -> scores (N, K)


def toml(
    arms: str = "none affine dae-gan:0,1,3",
    k: int = 3,
    repeats: int = 2,
    classes: tuple[str, ...] = ("normal", "disease"),
    classifiers: str = "resnet50",
    primary: str = 'arm = "dae-gan"\nratio = 3',
    group_by: str = "patient",
    name: str = "made",
    seed: int = 5,
) -> str:
    """A study file; arms are `NAME` or `NAME:ratio,ratio` separated by blanks."""
    lines = [
        f'name = "{name}"',
        f"seed = {seed}",
        f"classes = {json.dumps(list(classes))}",
        "[data]",
        'raw = "raw"',
    ]
    lines += ["[folds]", f"k = {k}", f"repeats = {repeats}", f'group_by = "{group_by}"']
    parts = {part for arm in arms.split() for part in arm.partition(":")[0].split("+")}
    lines += [f"[generators.{g}]" for g in ("dae-gan", "egan", "dcgan", "acgan") if g in parts]
    lines += ["[refiners.simgan]"] * ("simgan" in parts)
    lines += [f"[classifiers.{c}]" for c in classifiers.split()]
    lines += ["[primary]", f'classifier = "{classifiers.split()[0]}"', primary]
    for arm in arms.split():
        arm_name, _, ratios = arm.partition(":")
        lines += ["[[arms]]", f'name = "{arm_name}"'] + ([f"ratios = [{ratios}]"] if ratios else [])
    return "\n".join(lines) + "\n"


def study(**options: Any) -> Study:
    return parse_study(toml(**options))


@dataclass
class Cohort:
    """ids, patients and labels of all images; split[repeat, fold] = masks of train, validation and test."""

    ids: np.ndarray
    patient: np.ndarray
    label: np.ndarray
    split: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def cohort(study: Study, patients: tuple[int, ...] = (9, 15), images: int = 3, seed: int = 0) -> Cohort:
    """`patients` of each class with 1 to `images` images, split by patient and class."""
    rng = np.random.default_rng(seed)
    of_patient = np.repeat(np.arange(len(patients)), patients)
    owner = np.repeat(np.arange(len(of_patient)), rng.integers(1, images + 1, len(of_patient)))
    split = {}
    for repeat in range(study.folds.repeats):
        fold_of = np.empty(len(of_patient), int)
        for label in range(len(patients)):
            own = rng.permutation(np.flatnonzero(of_patient == label))
            fold_of[own] = np.arange(len(own)) % study.folds.k
        for fold in range(study.folds.k):
            test = fold_of[owner] == fold
            others = rng.permutation(np.flatnonzero(fold_of != fold))
            validation = np.isin(owner, others[: max(1, len(others) // 4)])
            split[repeat, fold] = (~test & ~validation, validation, test)
    ids = np.array([f"r{i + 1:06d}" for i in range(len(owner))])
    return Cohort(ids, np.array([f"p{i + 1:04d}" for i in owner]), of_patient[owner], split)


def noisy_scores(label: np.ndarray, n_classes: int, skill: dict[str, float], seed: int = 1) -> Scores:
    """Softmax scores around the truth; `skill` by arm (default 0.8)."""

    def scores(task: Task, rows: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([seed, task.repeat, task.fold, *task.output.encode()])
        logit = rng.normal(size=(len(rows), n_classes)) + skill.get(task.arm, 0.8) * np.eye(n_classes)[label[rows]]
        return np.exp(logit) / np.exp(logit).sum(1, keepdims=True)

    return scores


def datasets(one: Cohort, task: Task, scores: Scores) -> dict[str, np.ndarray]:
    """The datasets of one prediction shard."""
    train, validation, test = (np.flatnonzero(mask) for mask in one.split[task.repeat, task.fold])
    steps = np.arange(50, 301, 50)
    return {
        "id": shards.text_array(one.ids[test].tolist()),
        "patient": shards.text_array(one.patient[test].tolist()),
        "label": one.label[test].astype(np.int64),
        "score": np.asarray(scores(task, test), float),
        "train_id": shards.text_array(one.ids[train].tolist()),
        "validation_id": shards.text_array(one.ids[validation].tolist()),
        "validation_label": one.label[validation].astype(np.int64),
        "validation_score": np.asarray(scores(task, validation), float),
        "history_step": steps.astype(np.int64),
        "history_train_loss": np.exp(-steps / 200.0),
        "history_validation_loss": np.exp(-steps / 300.0) + 0.1,
        "history_validation_accuracy": 1 - np.exp(-steps / 200.0),
    }


def write_one(
    root: Path,
    study: Study,
    task: Task,
    data: dict[str, np.ndarray],
    /,
    inputs: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """Write one prediction shard as the classify stage does; `changes` override what goes into it."""
    named = HASHES | (inputs or {})
    wanted = {path: named.get(path, "c" * 64) for path in planning.inputs(study, task)}
    wanted |= {path: value for path, value in named.items() if path == planning.WEIGHTS}
    options: dict[str, Any] = {
        "schema": "predictions-1",
        "task": task.to_json(),
        "settings": planning.settings(study, task),
        "inputs": wanted,
        "seed": planning.seed(study, task),
        "attributes": {"classes": list(study.classes), "best_step": 200, "n_train_real": 1, "n_train_added": 0},
        "info": {"device": "cpu", "seconds": 2.0, "study": canonical(study.to_json())},
    }
    path = root / changes.pop("path", task.output)
    shards.write_shard(path, data, **(options | changes))
    return path


def write(
    root: Path,
    study: Study,
    one: Cohort,
    scores: Scores,
    skip: Callable[[Task], bool] = lambda task: False,
    **changes: Any,
) -> list[Task]:
    """Write all prediction shards but those that `skip` names; returns the tasks written."""
    tasks = [task for task in planning.tasks(study, "classify") if not skip(task)]
    for task in tasks:
        write_one(root, study, task, datasets(one, task, scores), **changes)
    return tasks


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def visible_text(page: str) -> str:
    """The text of a page as a reader sees it, blanks collapsed."""
    body = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))
