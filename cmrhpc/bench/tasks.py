"""What a task costs beside its training, and what plan, status and aggregate cost on many tasks."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import planning, shards
from cmrhpc.data.phantom import write_phantom
from cmrhpc.data.selection import held_out_images, training_images
from cmrhpc.hashing import canonical
from cmrhpc.init import make_workspace
from cmrhpc.names import PREDICTIONS_SCHEMA
from cmrhpc.planning import COHORT, FOLDS
from cmrhpc.workspace import Workspace

STEPS = 12  # of the task whose overhead is measured
MANY = """name = "many"
classes = []
[data]
raw = ""
spacing_mm = 5.86
image_size = 16
[folds]
k = 5
repeats = 5
[classifiers.resnet50]
[classifiers.xception]
[[arms]]
name = "none"
[[arms]]
name = "repeat-real"
ratios = [{ratios}]
[primary]
classifier = "resnet50"
arm = "repeat-real"
ratio = 0.5
"""
PER_RATIO = 50  # tasks: 5 folds, 5 repeats, 2 classifiers


def _workspace(folder: Path, study: str, patients: int) -> Workspace:
    raw = folder / "raw"
    if not raw.exists():
        write_phantom(raw, patients, 1)
    make_workspace(folder / "ws", study, raw, positive="1")
    return Workspace(folder / "ws")


def _task(workspace: Workspace, stage: str) -> tuple[dict[str, Any], float, float]:
    """What a task told, and when its process was started and had ended."""
    command = [sys.executable, "-m", "cmrhpc.bench.child", "task", str(workspace.root), stage, "0"]
    begun = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), begun, time.time()


def overhead(folder: Path, threads: int) -> dict[str, Any]:
    """Start of a process to its first training step, and last step to exit, of a synthesize and a classify task.

    The networks are those of the papers at 80 pixels; only the number of steps is small.
    """
    text = (
        f'name = "overhead"\nclasses = []\n[data]\nraw = ""\n[folds]\nk = 2\nrepeats = 1\n[compute]\n'
        f"threads = {threads}\nmode = 'fast'\n[generators.dae-gan]\ngenerations = {STEPS}\nlog_every = {STEPS}\n"
        f"[classifiers.resnet50]\nsteps = {STEPS}\nvalidate_every = {STEPS}\n"
        '[[arms]]\nname = "none"\n[[arms]]\nname = "dae-gan"\nratios = [1]\n'
        '[primary]\nclassifier = "resnet50"\narm = "dae-gan"\nratio = 1\n'
    )
    folder.mkdir()
    (folder / "study.toml").write_text(text)
    workspace = _workspace(folder, str(folder / "study.toml"), 12)
    subprocess.run([sys.executable, "-m", "cmrhpc.cli", "ingest", str(workspace.root)], check=True, capture_output=True)
    found: dict[str, Any] = {}
    for stage in ("synthesize", "classify"):
        told, begun, ended = _task(workspace, stage)
        steps = told["steps"]
        step = statistics.median(b - a for a, b in itertools.pairwise(steps[1:]))
        before, after = max(0.0, steps[0] - begun - step), ended - steps[-1]
        found[stage] = {"before_s": before, "after_s": after, "step_s": step, "peak_mib": told["peak_mib"]}
    found["seconds"] = max(one["before_s"] + one["after_s"] for one in found.values())
    return found


def many(folder: Path, n_tasks: int) -> dict[str, Any]:
    """Seconds of plan (no shard yet), status and aggregate (all shards there) of about `n_tasks` tasks."""
    folder.mkdir()
    count = max(1, round(n_tasks / PER_RATIO) - 1)
    (folder / "study.toml").write_text(MANY.format(ratios=", ".join(f"{(i + 1) / 2:g}" for i in range(count))))
    workspace = _workspace(folder, str(folder / "study.toml"), 20)
    root = str(workspace.root)
    found: dict[str, Any] = {"tasks": PER_RATIO * (count + 1) + 2}
    _cli("ingest", root)
    found["plan_s"] = _cli("plan", root, "--json")
    _predict_all(workspace)
    found["first_plan_s"] = _cli("plan", root, "--json")  # builds the index of all shards
    found["plan_done_s"] = _cli("plan", root, "--json")
    found["status_s"] = _cli("status", root, "--json")
    found["aggregate_s"] = _cli("aggregate", root)
    return found


def _cli(*arguments: str) -> float:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "cmrhpc.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cmrhpc {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - begun


def _predict_all(workspace: Workspace) -> None:
    """Shards of made-up scores for every classify task, as the task would write them."""
    study = workspace.study
    cohort, folds = (shards.read_shard(workspace.path(name)) for name in (COHORT, FOLDS))
    hashes = {COHORT: cohort.content_sha256, FOLDS: folds.content_sha256}
    rng = np.random.default_rng(0)
    parts: dict[tuple[int, int], Any] = {}
    for task in workspace.tasks("classify"):
        place = (task.repeat, task.fold)
        if place not in parts:
            held = [held_out_images(cohort, folds, *place, part) for part in ("test", "validation")]
            parts[place] = (*held, training_images(cohort, folds, *place).ids)
        test, validation, train = parts[place]
        score = rng.random((len(test.labels), 2))
        shards.write_shard(
            workspace.path(task.output),
            {
                "id": shards.text_array(test.ids),
                "patient": shards.text_array(test.patients),
                "label": test.labels,
                "score": score / score.sum(1, keepdims=True),
                "train_id": shards.text_array(train),
                "validation_id": shards.text_array(validation.ids),
                "validation_label": validation.labels,
                "validation_score": np.full((len(validation.labels), 2), 0.5),
                "history_step": np.array([1], np.int64),
                "history_train_loss": np.ones(1),
                "history_validation_loss": np.ones(1),
                "history_validation_accuracy": np.ones(1),
            },
            schema=PREDICTIONS_SCHEMA,
            task=task.to_json(),
            settings=planning.settings(study, task),
            inputs=hashes,
            seed=planning.seed(study, task),
            attributes={
                "classes": list(study.classes),
                "best_step": 1,
                "n_train_real": len(train),
                "n_train_added": 0,
            },
            info={"device": "cpu", "study": canonical(study.to_share()), "seconds": 1.0},
        )
