"""Re-hashes every file of a workspace, proves that no patient leaks, and gives all results one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cmrhpc import shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.plan import COHORT, FOLDS
from cmrhpc.workspace import Judge, Workspace, damage


@dataclass
class Verdict:
    """digest: sha256 over the content hashes of all sound shards in path order. damaged, leaks: one line each."""

    digest: str = ""
    damaged: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    files: int = 0
    shards: int = 0
    missing: int = 0


def verify(workspace: Workspace) -> Verdict:
    """Check every shard with its companions, whether it is the one that the study asks for, and every leak."""
    result = Verdict()
    judge = Judge(workspace)
    present = workspace.listing()
    sound: dict[str, shards.Shard] = {}
    for name in sorted(present):
        path = workspace.path(name)
        result.shards += 1
        wrong = damage(path)
        if not wrong:
            shard = shards.read_shard(path)
            result.files += 1 + len(shard.files)
            wrong = shards.check_content(shard)
            if not wrong and (name in judge.makers or name == COHORT):
                wrong = judge.verdict(name)
            if not wrong:
                sound[name] = shard
        if wrong:
            result.damaged.append(f"{name}: {wrong}")
    expected = [COHORT, *(o for o in judge.makers if o.endswith(".h5"))]
    result.missing = sum(name not in present for name in expected)
    hashes = "".join(sound[name].content_sha256 for name in sorted(sound))
    result.digest = hashlib.sha256(hashes.encode()).hexdigest()
    result.leaks = list(_leaks(sound))
    return result


def _leaks(sound: dict[str, shards.Shard]) -> Iterator[str]:
    """Training ids whose patient (or image) is in the test set of the fold, and synthetic copies of real images."""
    if COHORT not in sound or FOLDS not in sound:
        return
    cohort, folds = sound[COHORT], sound[FOLDS]
    patient_of = dict(zip(cohort.strings("id"), cohort.strings("patient"), strict=True))
    by_image = folds.attributes.get("group_by") == "image"
    group_of = {i: i for i in patient_of} if by_image else patient_of
    real = _image_hashes(cohort)
    for name, shard in sound.items():
        task = shard.task
        if "fold" not in task:
            continue
        place = f"repeat{task['repeat']}_fold{task['fold']}"
        try:
            test = {group_of[i] for i in folds.strings(f"{place}_test")}
            tested = shard.strings("id") if "id" in shard else []
            trained = shard.strings("train_id") + (shard.strings("validation_id") if tested else [])
            crossing = sorted({patient_of[i] for i in trained if group_of[i] in test})
            if tested and {group_of[i] for i in tested} != test:
                yield f"{name}: it does not test the images of its fold"
        except (KeyError, CmrhpcError) as error:
            yield f"{name}: its ids are not those of the cohort ({error})"
            continue
        if crossing:
            yield f"{name}: patients {', '.join(crossing[:5])} are in training and in test"
        if "image" in shard and (copies := len(_image_hashes(shard) & real)):
            yield f"{name}: {copies} images are bit-for-bit copies of real ones"


def _image_hashes(shard: shards.Shard) -> set[bytes]:
    images = np.ascontiguousarray(shard["image"])
    return {hashlib.sha256(image.tobytes()).digest() for image in images}
