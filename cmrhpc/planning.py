"""Study -> tasks. Pure: no file is read or written here.

A task is one array element and makes one output (ingest makes two). What a task reads, which settings it uses and
which seed it has are decided here and nowhere else; a shard is valid while all three are what the study now asks for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmrhpc.names import STAGES
from cmrhpc.seeds import derive_seed
from cmrhpc.study import ArmParts, Data, Study, arm_parts, cell_of

COHORT, FOLDS, REPORT = "cohort.h5", "folds.h5", "report/sources.json"
WEIGHTS = "weights"  # what a prediction calls the file that its classifier starts from, among its inputs


@dataclass(frozen=True)
class Task:
    """One array element. Fields that its stage does not use keep their defaults; `label` None means all classes."""

    stage: str
    repeat: int = 0
    fold: int = 0
    generator: str = ""
    refiner: str = ""
    label: int | None = None
    arm: str = ""
    ratio: float = 0.0
    classifier: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields that name this task, as stored in its shard."""
        used = {
            "ingest": (),
            "synthesize": ("generator", "fold", "repeat", "label"),
            "refine": ("refiner", "generator", "fold", "repeat", "label"),
            "classify": ("arm", "ratio", "classifier", "fold", "repeat"),
            "aggregate": (),
        }[self.stage]
        return {"stage": self.stage} | {name: getattr(self, name) for name in used}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Task:
        """The task that `to_json` wrote. Raises TypeError or ValueError when it is none."""
        task = Task(**values)
        if task.stage not in STAGES:
            raise ValueError(task.stage)
        return task

    @property
    def output(self) -> str:
        """Path of the shard, from the workspace; the last file that the task writes."""
        place = f"fold{self.fold}_repeat{self.repeat}"
        part = "classes" if self.label is None else f"class{self.label}"
        return {
            "ingest": FOLDS,
            "synthesize": f"synthetic/{self.generator}/{place}_{part}.h5",
            "refine": f"refined/{self.refiner}/{self.generator}/{place}_{part}.h5",
            "classify": f"predictions/{self.arm}/ratio{self.ratio:g}/{self.classifier}/{place}.h5",
            "aggregate": REPORT,
        }[self.stage]

    @property
    def title(self) -> str:
        """For people: `dae-gan fold 0 repeat 0 class 1`."""
        if self.stage in ("ingest", "aggregate"):
            return self.stage
        what = {
            "synthesize": self.generator,
            "refine": f"{self.generator}+{self.refiner}",
            "classify": f"{self.arm} ratio {self.ratio:g} {self.classifier}",
        }[self.stage]
        part = "" if self.label is None or self.stage == "classify" else f" class {self.label}"
        return f"{what} fold {self.fold} repeat {self.repeat}{part}"


def cells(study: Study) -> list[tuple[str, float, ArmParts]]:
    """The (arm, ratio) pairs that are trained, each once, in the order of the study."""
    found: dict[tuple[str, float], ArmParts] = {}
    for arm in study.arms:
        for ratio in arm.ratios:
            cell = cell_of(arm.name, ratio, arm_parts(arm.name, study))
            found.setdefault(cell, arm_parts(cell[0], study))
    return [(name, ratio, parts) for (name, ratio), parts in found.items()]


def _places(study: Study) -> list[tuple[int, int]]:
    return [(r, f) for r in range(study.folds.repeats) for f in range(study.folds.k)]


def tasks(study: Study, stage: str) -> list[Task]:
    """All tasks of a stage in a fixed order: repeat, fold, then what is done there."""
    if stage in ("ingest", "aggregate"):
        return [Task(stage)]
    labels = range(len(study.classes))
    used = [parts for _, _, parts in cells(study) if parts.generator]
    made: list[Task] = []
    for repeat, fold in _places(study):
        if stage == "synthesize":
            for generator in dict.fromkeys(p.generator or "" for p in used):
                every = [None] if study.generators[generator].conditional else list(labels)
                made += [Task(stage, repeat, fold, generator, label=label) for label in every]
        elif stage == "refine":
            for generator, refiner in dict.fromkeys((p.generator or "", p.refiner) for p in used if p.refiner):
                made += [Task(stage, repeat, fold, generator, refiner or "", label) for label in labels]
        else:
            for arm, ratio, _ in cells(study):
                for name in study.classifiers:
                    made.append(Task(stage, repeat, fold, arm=arm, ratio=ratio, classifier=name))
    return made


def images_wanted(ratio: float, n_real: int) -> int:
    """How many images a ratio asks for: the product, rounded up.

    1.1 x 50 is 55, although the float product is slightly larger.
    """
    return math.ceil(ratio * n_real - 1e-9)


def inputs(study: Study, task: Task) -> list[str]:
    """Paths of the shards that a task reads, from the workspace."""
    if task.stage == "ingest":
        return []
    if task.stage == "aggregate":
        return [other.output for other in tasks(study, "classify")]
    read = [COHORT, FOLDS]
    here: dict[str, Any] = {"repeat": task.repeat, "fold": task.fold}
    if task.stage == "refine":
        conditional = study.generators[task.generator].conditional
        label = None if conditional else task.label
        read.append(Task("synthesize", generator=task.generator, label=label, **here).output)
    if task.stage == "classify":
        parts = arm_parts(task.arm, study)
        if parts.generator:
            conditional = study.generators[parts.generator].conditional and not parts.refiner
            every: list[int | None] = [None] if conditional else list(range(len(study.classes)))
            stage = "refine" if parts.refiner else "synthesize"
            for label in every:
                made = Task(stage, generator=parts.generator, refiner=parts.refiner or "", label=label, **here)
                read.append(made.output)
    return read


def cohort_settings(data: Data, classes: Sequence[str]) -> dict[str, Any]:
    """The settings that decide a cohort's content. Where the raw folder lies decides nothing."""
    return {"data": {k: v for k, v in dataclasses.asdict(data).items() if k != "raw"}, "classes": list(classes)}


def settings(study: Study, task: Task, output: str = "") -> dict[str, Any]:
    """The settings that decide the content of `output` (default: the task's own), and no others."""
    whole = dataclasses.asdict(study)
    if task.stage == "ingest":
        if output == COHORT:
            return cohort_settings(study.data, study.classes)
        return {"folds": whole["folds"]}
    # How often a log line or a checkpoint is written decides no result.
    compute = {k: v for k, v in whole["compute"].items() if k != "checkpoint_seconds"}
    if task.stage == "synthesize" and study.generators[task.generator].external:
        # Where the folder lies decides nothing; what is in it is an input.
        return {"external": {"max_ratio": study.generators[task.generator].max_ratio}}
    if task.stage == "synthesize":
        own = {k: v for k, v in whole["generators"][task.generator].items() if k not in ("log_every", "external")}
        affine = {"affine": whole["affine"]} if own["expand"] else {}
        return {"generator": own, "compute": compute} | affine
    if task.stage == "refine":
        own = {k: v for k, v in whole["refiners"][task.refiner].items() if k != "log_every"}
        affine = {"affine": whole["affine"]} if own["expand"] else {}
        return {"refiner": own, "compute": compute} | affine
    if task.stage == "classify":
        affine = {"affine": whole["affine"]} if arm_parts(task.arm, study).affine else {}
        return {"classifier": whole["classifiers"][task.classifier], "compute": compute} | affine
    return {}


def settings_key(task: Task, output: str = "") -> tuple[str, ...]:
    """Tasks with equal keys have equal settings in one study: for thousands of tasks."""
    own = output if task.stage == "ingest" else ""
    return task.stage, task.generator, task.refiner, task.arm, task.classifier, own


def seed(study: Study, task: Task, output: str = "") -> int:
    """The seed of a task. A classifier's does not know the arm, so that arms are paired."""
    label = -1 if task.label is None else task.label
    if task.stage == "ingest":
        return 0 if output == COHORT else derive_seed(study.seed, "folds")
    if task.stage == "synthesize":
        return derive_seed(study.seed, "synthesize", task.generator, task.fold, task.repeat, label)
    if task.stage == "refine":
        return derive_seed(study.seed, "refine", task.refiner, task.generator, task.fold, task.repeat, label)
    return derive_seed(study.seed, task.stage, task.classifier, task.fold, task.repeat)
