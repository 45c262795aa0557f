"""Re-hashes every file of a workspace, proves that no patient leaks, and gives all results one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cmrhpc import seal, shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.plan import COHORT, FOLDS, REPORT, STAGES
from cmrhpc.workspace import Judge, Workspace, report_sources


@dataclass
class Verdict:
    """digest: sha256 over the content hashes, in path order, of all sound shards that the study asks for.

    damaged, leaks: one line each. out_of_date: what is whole but older than the study or the shards; no damage.
    """

    digest: str = ""
    damaged: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    out_of_date: list[str] = field(default_factory=list)
    files: int = 0
    shards: int = 0
    missing: int = 0


def verify(workspace: Workspace) -> Verdict:
    """Check every shard with its companions, whether it is the one that the study asks for, and every leak.

    Also the report against its seal, and the frozen task lists. Logs, which only grow, are not checked.
    """
    result = Verdict()
    judge = Judge(workspace, check=True, raw=True)
    present = workspace.listing()
    sound: dict[str, shards.Shard] = {}
    for name in sorted(present):
        result.shards += 1
        asked = name in judge.makers or name == COHORT
        try:
            shard = shards.read_shard(workspace.path(name))
            result.files += 1 + len(shard.files)
            companions = shards.check_companions(shard, workspace.path(name).parent)
            wrong = "; ".join(f"{file}: {what}" for file, what in companions) or shards.check_content(shard)
            if asked and not wrong and judge.verdict(name) and name not in judge.blocked:
                wrong = judge.verdict(name)
        except CmrhpcError as error:
            wrong = error.what
        if not wrong and asked:
            sound[name] = shard
        if wrong:
            result.damaged.append(f"{name}: {wrong}")
    expected = [COHORT, *(o for o in judge.makers if o.endswith(".h5"))]
    result.missing = sum(name not in present for name in expected)
    hashes = "".join(sound[name].content_sha256 for name in sorted(sound))
    result.digest = hashlib.sha256(hashes.encode()).hexdigest()
    result.damaged += _other_files(workspace)
    result.out_of_date = list(_older(workspace, judge))
    result.leaks = list(_leaks(sound))
    return result


def _other_files(workspace: Workspace) -> Iterator[str]:
    """What is wrong with the report and the task lists."""
    report = workspace.path(REPORT)
    for line in seal.damage(report):
        yield f"report/{line}"
    for stage in STAGES:
        try:
            workspace.tasks(stage)
        except CmrhpcError as error:
            yield f"{error.where}: {error.what}"


def _older(workspace: Workspace, judge: Judge) -> Iterator[str]:
    """Whether the report was made from the study and the shards as they are now."""
    if (told := seal.read(workspace.path(REPORT))) is None:
        return
    now, then = report_sources(judge), told["sources"]
    if now.pop("study") != then.pop("study", ""):
        yield "report: out of date, study.toml changed since it was made"
    if now != then:
        yield "report: out of date, shards were added, removed or changed since it was made"


def _leaks(sound: dict[str, shards.Shard]) -> Iterator[str]:
    """Training ids whose patient (or image) is in the test set of the fold, and synthetic copies of real images."""
    if COHORT not in sound or FOLDS not in sound:
        return
    cohort, folds = sound[COHORT], sound[FOLDS]
    try:
        patient_of = dict(zip(cohort.strings("id"), cohort.strings("patient"), strict=True))
        real = _image_hashes(cohort)
    except (ValueError, CmrhpcError) as error:
        yield f"{COHORT}: it is no cohort ({error})"
        return
    by_image = folds.attributes.get("group_by") == "image"
    group_of = {i: i for i in patient_of} if by_image else patient_of
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
            yield f"{name}: {copies} images are copies of real ones, equal to 8 bits"


def _image_hashes(shard: shards.Shard) -> set[bytes]:
    """One hash per image at 8 bits, so that a copy which went through a .png is found as well."""
    pixels = (np.nan_to_num(image) * 127.5 + 127.5 for image in shard["image"])
    return {hashlib.sha256(p.round().clip(0, 255).astype(np.uint8).tobytes()).digest() for p in pixels}
