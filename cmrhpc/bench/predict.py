"""Predicts what the stages of a study take on this machine, from a few real steps of the study's own networks.

Each kind of task (a generator, a refiner, a classifier) is trained by the real trainer for a few steps, at the study's
own sizes and with its own threads, in as many processes at once as a run would start. What follows is arithmetic:
steps, log entries, validations and samples times their measured seconds, plus what a task costs beside its training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cmrhpc import planning, shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.planning import COHORT, Task
from cmrhpc.profile import Profile
from cmrhpc.study import Study
from cmrhpc.workspace import Workspace

STEPS, MORE_STEPS = 10, 50  # real steps of each kind; more where they are short
SHORT = 0.25  # seconds
LOGS = 10  # log entries in a GPU's real steps: scored generations of one mutation are recorded after a few of them
WARM = 2  # steps that are slower than those that follow: memory is taken for the first time, a step recorded
PAPER_IMAGES = (77, 221)  # images per class of the papers' set: what is assumed without a cohort


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Images per class, and how they fall into the parts of a fold."""

    per_class: tuple[int, ...]
    train: float
    validation: float
    test: float


def sizes_of(study: Study, workspace: Workspace | None) -> Sizes:
    """From the cohort of the workspace where it is there, from its table otherwise, else as in the papers."""
    counts = list(PAPER_IMAGES[: len(study.classes)]) + [100] * (len(study.classes) - len(PAPER_IMAGES))
    if workspace is not None:
        try:
            labels = shards.read_shard(workspace.path(COHORT))["label"].tolist()
            counts = [labels.count(label) for label in range(len(study.classes))]
        except CmrhpcError:
            from cmrhpc.data.table import read_table

            data = study.data
            told = [row.label for row in read_table(workspace.raw, data.table, data.columns, classes=study.classes)]
            counts = [told.count(name) for name in study.classes]
    test = 1 / study.folds.k
    validation = (1 - test) * study.folds.validation_fraction
    return Sizes(tuple(counts), 1 - test - validation, validation, test)


def measure(study: Study, kind: str, name: str, images: int, validation: int, synthetic: int) -> dict[str, float]:
    """Seconds of a step, a log entry (or validation), sampling one image, and the rest, by the real trainer.

    kind: synthesize, refine or classify; name: of the generator, refiner or classifier; images, validation, synthetic:
    sizes of the sets. Called in a process of its own.
    """
    begun = time.perf_counter()
    import torch
    import torchvision  # noqa: F401

    imports = time.perf_counter() - begun
    told = _measure(study, kind, name, images, validation, synthetic, STEPS)
    if told["step_s"] < SHORT or torch.cuda.is_initialized():  # there the first steps are recorded and checked
        told = _measure(study, kind, name, images, validation, synthetic, MORE_STEPS)
    return told | {"import_s": imports}


def _measure(
    study: Study, kind: str, name: str, images: int, validation: int, synthetic: int, steps: int
) -> dict[str, float]:
    import torch

    from cmrhpc.stages.device import choose_device

    data = study.data

    def made(count: int) -> torch.Tensor:
        return torch.randn(max(4, count), data.channels, data.image_size, data.image_size).tanh()

    begun = time.perf_counter()
    device = choose_device(study.compute)
    ticks: list[float] = []

    def tick(done: int, total: int) -> None:
        if device.type == "cuda":  # it works on after a step has returned
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    every = max(2, steps // LOGS) if device.type == "cuda" else steps - 1
    common: dict[str, Any] = {"device": device, "progress": tick}
    x = made(images)
    labels = torch.arange(len(x)) % len(study.classes)
    told: dict[str, float] = {}
    if kind == "synthesize":
        from cmrhpc.train.gan import train_gan

        generator = dataclasses.replace(study.generators[name], generations=steps, log_every=every)
        trained = train_gan(
            x, labels, generator, study.compute, study.affine, n_classes=len(study.classes), seed=0, **common
        )
        ended = time.perf_counter()
        trained.sample(64, 0, 0 if generator.conditional else None)
        told["sample_s"] = (time.perf_counter() - ended) / 64
    elif kind == "refine":
        from cmrhpc.train.refine import train_refiner

        refiner = dataclasses.replace(
            study.refiners[name], log_every=10**6, pretrain_refiner=steps, pretrain_discriminator=steps, steps=steps
        )
        made_images = made(synthetic)
        trained_refiner = train_refiner(made_images, x, refiner, study.compute, study.affine, seed=0, **common)
        ended = time.perf_counter()
        trained_refiner.refine(made_images[:64])
        told["sample_s"] = (time.perf_counter() - ended) / len(made_images[:64])
    else:
        from cmrhpc.train.classify import train_classifier

        classifier = dataclasses.replace(study.classifiers[name], steps=steps, validate_every=every, weights="")
        held = made(validation)
        train_classifier(
            x, labels, held, torch.arange(len(held)) % len(study.classes), classifier, study.compute,
            n_classes=len(study.classes), init_seed=0, order_seed=0, **common,
        )  # fmt: skip
        ended = time.perf_counter()
    told |= step_costs(kind, ticks, steps, every)
    told["before_s"] = max(0.0, ticks[0] - begun - told["step_s"])
    told["after_s"] = max(0.0, ended - ticks[-1])
    return told


def step_costs(kind: str, ticks: list[float], steps: int, every: int) -> dict[str, float]:
    """From the times at which steps ended: seconds of a step and of what is done at a log entry.

    Every `every`th step and the last one end with a log entry or a validation, of which the last two count. A refiner
    has `steps` steps in each of three phases and no log entry.
    """
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    warm = max(WARM, steps // 8)
    if kind == "refine":
        phases = [gaps[first + warm : first + steps - 1] for first in (0, steps, 2 * steps)]
        names = ("pretrain_refiner_s", "pretrain_discriminator_s", "step_s")
        return {name: statistics.fmean(phase) for name, phase in zip(names, phases, strict=True)} | {"log_s": 0.0}
    logged = [i for i in range(len(gaps)) if (i + 2) % every == 0 or i + 2 == steps]  # gap i is that of step i + 2
    step = statistics.fmean(gaps[i] for i in range(warm, len(gaps)) if i not in logged)
    return {"step_s": step, "log_s": max(0.0, statistics.fmean(gaps[i] for i in logged[-2:]) - step)}


def task_seconds(study: Study, task: Task, costs: dict[str, float], sizes: Sizes, outside: float) -> float:
    """Seconds of one task. `outside`: seconds of starting and ending a task's process."""
    total = costs["before_s"] + costs["after_s"] + outside
    if task.stage == "synthesize":
        generator = study.generators[task.generator]
        own = sum(sizes.per_class) if task.label is None else sizes.per_class[task.label]
        total += generator.generations * costs["step_s"]
        total += math.ceil(generator.generations / generator.log_every) * costs["log_s"]
        return total + generator.max_ratio * own * sizes.train * costs["sample_s"]
    if task.stage == "refine":
        refiner = study.refiners[task.refiner]
        total += refiner.pretrain_refiner * costs["pretrain_refiner_s"]
        total += refiner.pretrain_discriminator * costs["pretrain_discriminator_s"] + refiner.steps * costs["step_s"]
        count = sizes.per_class[task.label or 0] * study.generators[task.generator].max_ratio
        return total + count * sizes.train * costs["sample_s"]
    classifier = study.classifiers[task.classifier]
    validations = math.ceil(classifier.steps / classifier.validate_every)
    # At the end the test and the validation images are scored once more.
    held = 1 + sizes.test / max(sizes.validation, 1e-9)
    return total + classifier.steps * costs["step_s"] + (validations + held) * costs["log_s"]


def kind_of(task: Task) -> tuple[str, str]:
    return task.stage, {"synthesize": task.generator, "refine": task.refiner, "classify": task.classifier}[task.stage]


def predict(study: Study, workspace: Workspace | None, jobs: int, outside: float) -> dict[str, Any]:
    """Seconds per stage when `jobs` tasks run at once, with what was measured. Nothing of the workspace is changed."""
    sizes, found = sizes_of(study, workspace), {}
    rarest, whole = min(sizes.per_class), sum(sizes.per_class)
    for stage in ("synthesize", "refine", "classify"):
        # Images that something else made are only read.
        made_elsewhere = {name for name, generator in study.generators.items() if generator.external}
        every = planning.tasks(study, stage)
        tasks = [task for task in every if stage != "synthesize" or task.generator not in made_elsewhere]
        costs: dict[tuple[str, str], dict[str, float]] = {}
        for task in tasks:
            kind = kind_of(task)
            if kind in costs:
                continue
            ratio = study.generators[task.generator].max_ratio if stage == "refine" else 0.0
            images = whole if stage == "classify" or task.label is None else rarest
            counts = (images * sizes.train, whole * sizes.validation, images * sizes.train * ratio)
            costs[kind] = _in_children(study, kind, [math.ceil(count) for count in counts], min(jobs, len(tasks)))
        seconds = [task_seconds(study, task, costs[kind_of(task)], sizes, outside) for task in tasks]
        if seconds:
            found[stage] = {
                "tasks": len(seconds),
                "longest_task_s": max(seconds),
                "task_hours": sum(seconds) / 3600,
                "wall_s": schedule(seconds, jobs),
                "import_s": max(cost["import_s"] for cost in costs.values()),
                "measured": {" ".join(kind): cost for kind, cost in costs.items()},
            }
    return {"study": study.name, "images": list(sizes.per_class), "jobs": jobs, "stages": found}


def schedule(seconds: list[float], jobs: int) -> float:
    """Wall time of tasks taken in order by `jobs` workers."""
    free = [0.0] * jobs
    for one in seconds:
        first = free.index(min(free))
        free[first] += one
    return max(free)


def _in_children(study: Study, kind: tuple[str, str], counts: list[int], jobs: int) -> dict[str, float]:
    """The mean of what `jobs` processes measure at the same time."""
    command = [sys.executable, "-m", "cmrhpc.bench.child", "predict", json.dumps(study.to_json()), *kind]
    command += [str(count) for count in counts]
    with tempfile.TemporaryFile("w+") as errors:
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) for _ in range(max(1, jobs))
        ]
        answers = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            errors.seek(0)
            raise CmrhpcError(f"a few steps of {' '.join(kind)} could not be run: {errors.read()[-500:].strip()}")
    told = [json.loads(answer) for answer in answers]
    return {name: statistics.fmean(one[name] for one in told) for name in told[0]}


def against_profile(predicted: dict[str, Any], profile: Profile) -> list[str]:
    """Warnings for stages whose predicted task time comes near the profile's limit; meaningful only for machines like
    this one."""
    lines = []
    for stage, row in predicted["stages"].items():
        limit = profile.resources(stage).seconds
        longest = row["longest_task_s"]
        if longest > 0.8 * limit:
            lines.append(
                f"{stage}: the longest task takes {longest / 3600:.1f} h here, its time limit in {profile.name} is "
                f"{limit / 3600:.1f} h: it will checkpoint and be requeued, unless that machine is faster"
            )
    return lines


def load(workspace: str) -> tuple[Study, Workspace | None]:
    """The study to predict: of a workspace, or without one fu2021 with two classes."""
    if workspace:
        opened = Workspace(workspace)
        return opened.study, opened
    from cmrhpc.study import STUDIES, parse_study

    text = Path(STUDIES / "fu2021.toml").read_text(encoding="utf-8")
    text = text.replace("classes = []", 'classes = ["0", "1"]', 1).replace('raw = ""', 'raw = "raw"', 1)
    return parse_study(text, "fu2021.toml"), None
