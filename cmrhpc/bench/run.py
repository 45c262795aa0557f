"""The sections of `cmrhpc bench`, what they say in words, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmrhpc import gpus
from cmrhpc.errors import BadInput

OUTSIDE = 0.3  # seconds of a task of `cmrhpc run`, which loads torch once for all, before and after its trainer
BUSY = 0.5  # load per core above which the machine is called busy


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions; no names of hosts or people."""
    import numpy
    import torch

    from cmrhpc import __version__

    model = platform.processor() or platform.machine()
    flags = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
            if line.startswith("flags"):
                flags = line
                break
    except OSError:
        pass  # not Linux
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    load = os.getloadavg()[0]
    return {
        "cpu": model,
        "instructions": known,
        "cores": gpus.cores(),
        "load": round(load, 2),
        "busy": load > BUSY * (os.cpu_count() or 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cmrhpc": __version__,
    }


def bench(
    only: list[str],
    quick: bool,
    threads: int,
    tasks: int,
    images: int,
    workspace: str,
    profile: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the sections and return what `--json` prints. `say` is told each section's figures as they come."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise BadInput("torch is not installed here", "", "pip install '.[train]' in the clone, or use the container")
    from cmrhpc.bench import predict, storage, training
    from cmrhpc.bench import tasks as many
    from cmrhpc.data.phantom import write_phantom
    from cmrhpc.profile import load_profile

    cluster = load_profile(profile) if profile else None
    study, opened = predict.load(workspace)  # what is no workspace is told before anything is measured
    rounds = 3 if quick else 9
    found: dict[str, Any] = {"machine": machine(), "threads": threads, "quick": quick}
    here = found["machine"]
    say(f"{here['cpu']}, {here['cores']} cores, torch {here['torch']}, {threads} threads")
    if here["busy"]:
        say(f"the machine is busy (load {here['load']:g}): these figures are not those of an idle one")

    def wanted(section: str) -> bool:
        return section in only if only else section != "predict" or bool(workspace or profile)

    with tempfile.TemporaryDirectory(prefix="cmrhpc-bench-") as text:
        folder = Path(text)
        found["generation"] = {}
        for net in training.NETS if wanted("generation") else ():
            found["generation"][net] = row = training.generation(net, rounds, threads)
            say(
                f"generation {net}: plain {row['plain_s']:.3f} s; exact {row['exact_s']:.3f} s,"
                f" {row['exact_ratio']:.2f} times; fast {row['fast_s']:.3f} s,"
                f" {row['fast_ratio']:.2f} times; with our layers in the plain step"
                f" {row['exact_ratio_same_layers']:.2f} and {row['fast_ratio_same_layers']:.2f} times;"
                f" exact reaches {row['share_of_peak']:.0%} of the convolution peak,"
                f" fast {row['fast_share_of_peak']:.0%} of its own"
            )
        found["classifier"] = {}
        for name in training.CLASSIFIERS if wanted("classifier") else ():
            found["classifier"][name] = row = training.classifier(name, rounds, threads)
            say(
                f"classifier {name}: plain {row['plain_s']:.3f} s a step; exact {row['exact_ratio']:.2f} times,"
                f" fast {row['ratio']:.2f} times, {row['images_per_second']:.0f} images per second"
            )
        found["task_overhead_s"] = None
        if wanted("overhead"):
            found["overhead"] = row = many.overhead(folder / "overhead", threads)
            found["task_overhead_s"] = row["seconds"]
            for stage in ("synthesize", "classify"):
                one = row[stage]
                say(
                    f"task {stage}: {one['before_s']:.1f} s before the first step, {one['after_s']:.1f} s after the"
                    f" last; peak memory {one['peak_mib']:.0f} MiB"
                )
        found["shards"] = {"read_ratio": None}
        if wanted("shards"):
            found["shards"] = row = storage.reading(folder, rounds)
            say(
                f"shards: read at {row['read_ratio']:.0%} of numpy's speed ({row['megabytes_per_second']:.0f} MB/s);"
                f" with opening and hashing the file {row['checked_ratio']:.0%}"
            )
        if wanted("ingest"):
            (folder / "ingest").mkdir()
            write_phantom(folder / "phantom", 20, 1)
            found["ingest"] = row = storage.ingest(
                folder / "phantom", folder / "ingest", images or (200 if quick else 3000)
            )
            say(
                f"ingest: {row['images_per_second']:.0f} of {row['images']} images per second in {row['peak_mib']:.0f}"
                f" MiB; plain SimpleITK reads {row['plain_images_per_second']:.0f}"
            )
        if wanted("tasks"):
            found["tasks"] = row = many.many(folder / "many", tasks or (500 if quick else 10_000))
            say(
                f"{row['tasks']} tasks: plan {row['plan_s']:.1f} s, with all done {row['plan_done_s']:.1f} s (the first"
                f" time {row['first_plan_s']:.1f} s); status {row['status_s']:.1f} s;"
                f" aggregate {row['aggregate_s']:.1f} s"
            )
        found["gpu"] = training.gpu(rounds) if wanted("gpu") else None
        if found["gpu"]:
            told = found["gpu"]["generations_per_second"].items()
            rates = ", ".join(f"{count}: {f'{rate:.1f}' if rate else 'do not fit'}" for count, rate in told)
            say(f"GPU {found['gpu']['name']}: generations per second by number of models {rates}")
            for name, row in {"generation": found["gpu"]["one_model"], **found["gpu"]["classifier"]}.items():
                if row["not_recorded"]:
                    say(f"GPU, {name}: not recorded as a CUDA graph, so slower: {row['not_recorded']}")
        if wanted("predict"):
            jobs = gpus.tasks_at_once(study.compute.threads)  # as `run` does
            row = predict.predict(study, opened, jobs, OUTSIDE)
            found["prediction"] = row
            for stage, one in row["stages"].items():
                say(
                    f"predicted {study.name} {stage}: {one['tasks']} tasks, longest {one['longest_task_s']:.0f} s,"
                    f" {one['task_hours']:.2f} task hours; {one['wall_s'] / 3600:.2f} h with {jobs} at once"
                )
            if cluster:
                row["profile"] = {"name": cluster.name, "warnings": predict.against_profile(row, cluster)}
                for line in row["profile"]["warnings"]:
                    say(line)
    return found
