"""What is installed, which GPU, which Slurm, which container, and what is missing; each finding with its mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cmrhpc import __version__

Finding = dict[str, Any]


def finding(ok: bool, what: str, mend: str = "") -> Finding:
    return {"what": what, "ok": ok, "mend": mend}


def findings(workspace: Path | None = None) -> list[Finding]:
    """All findings: {"what", "ok", "mend"}. Asks programs with a time limit and changes nothing."""
    found = [
        finding(sys.version_info >= (3, 11), f"cmrhpc {__version__}, Python {sys.version.split()[0]}", "use 3.11+")
    ]
    for name in ("numpy", "h5py", "scipy", "scikit-learn", "SimpleITK", "submitit", "matplotlib"):
        found.append(_package(name, "pip install cmrhpc"))
    for name in ("torch", "torchvision", "timm", "safetensors"):
        found.append(_package(name, "only where tasks compute: pip install 'cmrhpc[train]'"))
    found.append(_gpu())
    found.append(_program("sbatch", ["sbatch", "--version"], "only for sbatch: use a login node"))
    found.append(_program("apptainer", ["apptainer", "--version"], "only for the container: see containers/README.md"))
    if workspace is not None:
        found.append(_writable(workspace))
    return found


def _package(name: str, mend: str) -> Finding:
    try:
        return finding(True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return finding(False, f"{name} is not installed", mend)


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _program(name: str, command: list[str], mend: str) -> Finding:
    text = _output(command)
    return finding(text is not None, text.splitlines()[0] if text else f"{name} is not here", mend)


def _gpu() -> Finding:
    text = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    if not text:
        return finding(False, "no NVIDIA GPU here", "tasks compute on the CPU; on a cluster ask on a GPU node")
    if importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            mend = "install a torch build for this driver; GPUs older than Turing need torch 2.6 with CUDA 12"
            return finding(False, f"GPU {text}, but torch {torch.__version__} cannot use it", mend)
    return finding(True, f"GPU {text}")


def _writable(workspace: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=workspace, prefix=".doctor"):
            free = os.statvfs(workspace).f_bavail * os.statvfs(workspace).f_frsize / 2**30
    except OSError as error:
        return finding(
            False, f"{workspace} is not writable: {error.strerror}", "choose another folder, or mend its access"
        )
    return finding(free > 1, f"{workspace} is writable, {free:.0f} GiB free", "free some space")
