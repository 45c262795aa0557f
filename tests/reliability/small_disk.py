"""Fills real file systems: run as `unshare -m python -m tests.reliability.small_disk WORKSPACE MOUNT`.

The mounts live in this process's own mount namespace and vanish with it. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cmrhpc import files, shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace

STAGE = "synthesize"


def attempt(root: Path) -> str:
    try:
        run_task(Workspace(root), STAGE, 0)
    except CmrhpcError as error:
        return f"{type(error).__name__} {error.exit_code}: {error.what}"
    return "done"


def state(root: Path, output: str) -> dict[str, object]:
    """What is there: temporary files, and final shards that do not hold their checksum."""
    left = [path.name for path in root.rglob("*") if files.is_temporary(path.name)]
    broken = [path.name for path in root.rglob("*.h5") if shards.damage_of(path)]
    return {"left": left, "broken": broken, "there": (root / output).exists()}


def remove(root: Path, output: str) -> None:
    for ending in (".h5", ".jsonl", ".png", ".safetensors"):
        (root / output).with_suffix(ending).unlink(missing_ok=True)
    shutil.rmtree(root / "checkpoints", ignore_errors=True)


def fill(place: Path, free_bytes: int) -> Path:
    """A file that leaves `free_bytes` of the disk."""
    filler = place / "filler"
    info = os.statvfs(place)
    with open(filler, "wb") as stream:
        stream.write(b"x" * max(0, info.f_bavail * info.f_frsize - free_bytes))
    return filler


def main(source: Path, mount: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount], check=True)
    root = mount / "w"
    needed = [source / name for name in ("study.toml", "cohort.h5", "cohort.csv", "cohort.png", "folds.h5")]
    root.mkdir()
    for path in needed:
        shutil.copy(path, root)
    (root / "raw").mkdir()
    shutil.copy(source / "raw/cohort.csv", root / "raw")
    output = Workspace(root).tasks(STAGE)[0].output
    tries = []
    for free in (0, 4096, 16384, 32768, 65536, 98304, 131072, 196608, 262144):
        filler = fill(mount, free)
        tries.append({"free": free, "said": attempt(root)} | state(root, output))
        filler.unlink()
        again = attempt(root)
        tries[-1] |= {"again": again, "content": shards.read_shard(root / output).content_sha256}
        remove(root, output)
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    read_only = {"said": attempt(root)} | state(root, output)
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    read_only |= {"again": attempt(root), "content": shards.read_shard(root / output).content_sha256}
    print(json.dumps({"tries": tries, "read_only": read_only, "output": output}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
