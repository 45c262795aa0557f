"""Who wrote a shard, where, when and with which code: for information, never part of a content hash."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from cmrhpc import __version__


def provenance() -> dict[str, Any]:
    """Code version, image, host and time, and under Slurm the numbers of the job."""
    slurm = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
    return {
        "code_version": code_version(),
        "container_sha256": os.environ.get("CMRHPC_CONTAINER_SHA256") or _container_sha256(),
        "host": socket.gethostname(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    } | {name.lower(): os.environ[name] for name in slurm if name in os.environ}


def _container_sha256() -> str:
    """Of the image that Apptainer runs us in, as build.sh wrote it beside it; empty where that is not to be seen."""
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    try:
        told = Path(f"{image}.sha256").read_text()[:64] if image else ""
    except (OSError, ValueError):
        return ""
    return told if re.fullmatch("[0-9a-f]{64}", told) else ""


@functools.cache
def code_version() -> str:
    """Package version, and where this is a git checkout its commit and whether files were changed."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists() and (commit := _git(root, "rev-parse", "--short=12", "HEAD")):
            dirty = _git(root, "status", "--porcelain", "-uno")
            return f"{__version__} {commit}{' dirty' if dirty else ''}"
    return __version__


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    return done.stdout.strip()
