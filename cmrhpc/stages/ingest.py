"""Raw folder -> cohort.h5 and folds.h5."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from cmrhpc import planning, shards
from cmrhpc.data.folds import make_folds
from cmrhpc.data.ingest import ingest
from cmrhpc.errors import BadInput, Checkpointed
from cmrhpc.names import COHORT_SCHEMA, FOLDS_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, Task
from cmrhpc.validity import Judge
from cmrhpc.workspace import Workspace

TASK = Task("ingest")


def run_ingest(
    workspace: Workspace,
    judge: Judge,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Make whichever of the two shards is missing or no longer what the study asks for; returns a summary in words.

    Raises Checkpointed when `should_stop` asked for it between two images: nothing is written then.
    """
    lines = []
    begun = time.time()
    info: dict[str, Any] = {"study_sha256": workspace.study_sha256, "device": "cpu"}

    def read(done: int, total: int) -> None:
        progress(done, total)
        info["seconds"] = round(time.time() - begun, 3)  # until the last image: `ingest` writes the cohort
        if done < total and should_stop():
            raise Checkpointed(f"stopped on request after image {done} of {total}, nothing kept", mend="run it again")

    study = workspace.study
    if os.path.realpath(workspace.raw) == os.path.realpath(workspace.root):
        mend = "move the raw images to a folder of their own and name it in study.toml [data]"
        raise BadInput("the raw folder is the workspace: cohort.csv would be overwritten", str(workspace.root), mend)
    if judge.whole(COHORT):
        summary = ingest(
            study.data,
            study.classes,
            workspace.raw,
            workspace.path(COHORT),
            task=TASK.to_json(),
            settings=planning.settings(study, TASK, COHORT),
            info=info,
            folds=study.folds,
            progress=read,
        )
        lines.append(f"{summary}\nread in {time.time() - begun:.1f} s")
    cohort = shards.read_shard(workspace.path(COHORT), COHORT_SCHEMA)
    seed = planning.seed(study, TASK, FOLDS)
    ids, patients, labels = cohort.strings("id"), cohort.strings("patient"), cohort["label"]
    splits, warnings = make_folds(ids, patients, labels, study.folds, len(study.classes), seed, study.classes)
    datasets = {
        f"repeat{repeat}_fold{fold}_{part}": shards.text_array(getattr(split, part))
        for (repeat, fold), split in splits.items()
        for part in ("train", "validation", "test")
    }
    shards.write_shard(
        workspace.path(FOLDS),
        datasets,
        schema=FOLDS_SCHEMA,
        task=TASK.to_json(),
        settings=planning.settings(study, TASK, FOLDS),
        inputs={COHORT: cohort.content_sha256},
        seed=seed,
        attributes={"k": study.folds.k, "repeats": study.folds.repeats, "group_by": study.folds.group_by},
        info=info | {"seconds": round(time.time() - begun, 3)},
    )
    lines += [f"warning: {text}" for text in warnings]
    lines.append(f"{study.folds.k} folds x {study.folds.repeats} repeats, grouped by {study.folds.group_by}")
    return "\n".join(lines)
