"""What is installed, which GPU, which Slurm, which container, and what is missing; each finding with its mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cmrhpc import __version__
from cmrhpc.findings import Finding, finding
from cmrhpc.launch.cluster import (
    DOCS,
    container_findings,
    disk_findings,
    folder_findings,
    path_findings,
    slurm_findings,
)
from cmrhpc.launch.slurm import ask

if TYPE_CHECKING:
    from cmrhpc.profile import Profile


def findings(workspace: Path | None = None, profile: Profile | None = None) -> list[Finding]:
    """All findings: {"what", "ok", "mend", "needed"}. Asks programs with a time limit, leaves everything as it was.

    Needed is what cmrhpc itself stands on, and what was named: the workspace, the profile with its Slurm, the image.
    """
    found = [
        finding(sys.version_info >= (3, 11), f"cmrhpc {__version__}, Python {sys.version.split()[0]}", "use 3.11+")
    ]
    names = ("numpy", "h5py", "scipy", "scikit-learn", "SimpleITK", "submitit", "matplotlib")
    for name in (*names, "pillow", "jinja2", "tomlkit", "rich"):
        found.append(_package(name, "pip install .   # in the clone"))
    for name in ("torch", "torchvision", "timm", "safetensors"):
        mend = "only where tasks compute, and not with the container: pip install '.[train]' in the clone"
        found.append(_package(name, mend, needed=False))
    if importlib.util.find_spec("torch"):
        found.append(_kernels())
    found.append(_gpu())
    found += slurm_findings(profile) + container_findings(profile) + disk_findings()
    return found + (path_findings(workspace, profile) + folder_findings(workspace) if workspace else [])


def _package(name: str, mend: str, needed: bool = True) -> Finding:
    try:
        return finding(True, f"{name} {importlib.metadata.version(name)}", needed=needed)
    except importlib.metadata.PackageNotFoundError:
        return finding(False, f"{name} is not installed", mend, needed)


def _kernels() -> Finding:
    """Whether those that pip compiled can be loaded; which processors they serve is decided when tasks compute."""
    code = "from cmrhpc.nets.convolution import load; print(load()[1])"
    answer = ask([sys.executable, "-P", "-c", code], seconds=60)
    why = answer.out.strip() if answer.code == 0 else "torch does not load"
    mend = "trainings on CPUs with AVX2 take up to a fifth longer; install a C compiler, then pip install again"
    what = f"cannot be used: {why}" if why else "are compiled"
    return finding(not why, f"convolutions for CPUs {what}", mend, needed=False)


def _gpu() -> Finding:
    answer = ask(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    text = ", ".join(answer.out.split("\n")).strip(", ")
    if answer.code != 0 or not text:
        mend = "tasks compute on the CPU; on a cluster ask on a GPU node"
        return finding(False, "no NVIDIA GPU here", mend, needed=False)
    why, mend = _unusable() if importlib.util.find_spec("torch") else ("", "")
    return finding(not why, f"GPU {text}{why and ', but '}{why}", mend)


def _unusable() -> tuple[str, str]:
    """Why the torch of this environment cannot compute on the GPUs here, and the mend; two empty texts when it can."""
    import torch

    who = f"torch {torch.__version__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return f"{who} cannot use it", "install a torch build for this driver"
        try:
            here = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
        except (RuntimeError, AssertionError) as error:
            return f"{who} cannot start it: {str(error).splitlines()[0]}", "is another process using it alone?"
    built = torch.cuda.get_arch_list()
    for major, minor in sorted(here):
        if not has_code_for((major, minor), built):
            mend = "use other GPUs or the CPU: no torch that serves here has code for these"
            if (5, 0) <= (major, minor) < (7, 5):
                mend = f"pip install 'torch==2.6.*' '.[train]' in the clone, or containers/build.sh --torch 2.6; {DOCS}"
            elif major > 8:
                mend = "install a newer torch"
            return f"{who} has no code for compute capability {major}.{minor}, only {' '.join(built)}", mend
    return "", ""


def has_code_for(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a torch build runs on a GPU.

    capability: (major, minor). built: `torch.cuda.get_arch_list()`. sm_86 is machine code, for 8.6 and later minors of
    8; sm_90a and the like for exactly theirs; compute_90 is compiled on the spot for 9.0 and everything later.
    """
    for name in built:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)):
            continue
        code = int(found[2]), int(found[3])
        if found[1] == "compute" and not found[4]:
            serves = capability >= code
        else:
            serves = capability[0] == code[0] and capability[1] >= code[1]
        if capability == code if found[4] else serves:
            return True
    return False
