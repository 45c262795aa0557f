"""What the benchmark runs in a process of its own, to see its memory or its whole life; prints one JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmrhpc.errors import UsageError


def peak_mib() -> float:
    """Peak memory of this process in MiB. Where only getrusage is available, the parent's memory counts too."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ingest(raw: str, folder: str) -> dict[str, Any]:
    """Ingest a raw folder with masks, then read the same files with SimpleITK and nothing else."""
    from cmrhpc.data.ingest import ingest as read_all
    from cmrhpc.data.table import labels_of, read_table
    from cmrhpc.study import Data

    rows = read_table(Path(raw), "cohort.csv", {})
    begun = time.perf_counter()
    read_all(Data(raw=raw), labels_of(rows), Path(raw), Path(folder) / "cohort.h5")
    took = time.perf_counter() - begun
    peak = peak_mib() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    import SimpleITK

    begun = time.perf_counter()
    for row in rows:
        for name in (row.image, row.mask):
            if name:
                SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(Path(raw) / name)))
    return {"ingest_s": took, "plain_s": time.perf_counter() - begun, "peak_mib": peak}


def task(workspace: str, stage: str, index: str) -> dict[str, Any]:
    """One task as `cmrhpc task` runs it; the times of its steps and its peak memory."""
    from cmrhpc.stages.task import run_task
    from cmrhpc.workspace import Workspace

    steps: list[float] = []
    run_task(Workspace(workspace), stage, int(index), lambda done, total: steps.append(time.time()))
    return {"steps": steps, "peak_mib": peak_mib()}


def predict(study: str, kind: str, name: str, images: str, validation: str, synthetic: str) -> dict[str, Any]:
    """The costs of one kind of task (`cmrhpc.bench.predict.measure`); `study` is its JSON."""
    from cmrhpc.bench.predict import measure
    from cmrhpc.study import Study

    return measure(Study.from_json(json.loads(study)), kind, name, int(images), int(validation), int(synthetic))


def model(generations: str, seed: str, device: str, net: str) -> dict[str, Any]:
    """One of many models: says when it is warm, and trains on when its stdin is closed."""
    from cmrhpc.bench.training import train_one_of_many

    def ready() -> None:
        os.write(OUT, b"ready\n")
        sys.stdin.read()

    train_one_of_many(int(generations), int(seed), device, ready, net)
    return {}


CALLS: dict[str, Callable[..., dict[str, Any]]] = {"ingest": ingest, "task": task, "predict": predict, "model": model}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in CALLS:
        raise UsageError("this is a part of `cmrhpc bench`", "", "run `cmrhpc bench --help`")
    told = CALLS[arguments[0]](*arguments[1:])
    # Whatever the work prints goes to stderr, so that the answer stands alone.
    os.write(OUT, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    OUT = os.dup(1)
    os.dup2(2, 1)
    main(sys.argv[1:])
