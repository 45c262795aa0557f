"""What is installed, which GPU, which Slurm, which container, and what is missing; each finding with its mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cmrhpc import __version__
from cmrhpc.findings import Finding, finding
from cmrhpc.launch.cluster import container_findings, disk_findings, folder_findings, path_findings, slurm_findings
from cmrhpc.launch.slurm import ask

if TYPE_CHECKING:
    from cmrhpc.profile import Profile


def findings(workspace: Path | None = None, profile: Profile | None = None) -> list[Finding]:
    """All findings: {"what", "ok", "mend"}. Asks programs with a time limit and leaves everything as it was."""
    found = [
        finding(sys.version_info >= (3, 11), f"cmrhpc {__version__}, Python {sys.version.split()[0]}", "use 3.11+")
    ]
    for name in ("numpy", "h5py", "scipy", "scikit-learn", "SimpleITK", "submitit", "matplotlib"):
        found.append(_package(name, "pip install cmrhpc"))
    for name in ("torch", "torchvision", "timm", "safetensors"):
        found.append(
            _package(name, "only where tasks compute, and not with the container: pip install 'cmrhpc[train]'")
        )
    found.append(_gpu())
    found += slurm_findings(profile) + container_findings(profile) + disk_findings()
    return found + (path_findings(workspace, profile) + folder_findings(workspace) if workspace else [])


def _package(name: str, mend: str) -> Finding:
    try:
        return finding(True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return finding(False, f"{name} is not installed", mend)


def _gpu() -> Finding:
    answer = ask(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    text = ", ".join(answer.out.split("\n")).strip(", ")
    if answer.code != 0 or not text:
        return finding(False, "no NVIDIA GPU here", "tasks compute on the CPU; on a cluster ask on a GPU node")
    if importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            mend = "install a torch build for this driver; GPUs older than Turing need torch 2.6 with CUDA 12"
            return finding(False, f"GPU {text}, but torch {torch.__version__} cannot use it", mend)
    return finding(True, f"GPU {text}")
