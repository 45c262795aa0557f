"""The GPUs and cores of this machine that tasks may use. Standard library only.

A GPU has the name that CUDA_VISIBLE_DEVICES takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tasks_on_cores(threads: int) -> int:
    """How many tasks of so many threads these cores carry side by side; one at least."""
    return max(1, cores() // threads)


def tasks_at_once(threads: int) -> int:
    """How many tasks `run` starts side by side where nobody says: one per visible GPU, else what the cores carry."""
    return len(usable()) or tasks_on_cores(threads)


def named(visible: str) -> list[str]:
    """The devices that a CUDA_VISIBLE_DEVICES names: numbers, UUIDs or MIG instances, up to the first that is none."""
    names: list[str] = []
    for name in visible.split(","):
        if name.strip() in ("", "-1", "NoDevFiles"):
            break
        names.append(name.strip())
    return names


def listed(visible: str | None, devices: Iterable[str]) -> list[str]:
    """The GPUs that are visible: those that the variable names, without it those of `devices`, names in /dev."""
    if visible is not None:
        return named(visible)
    # CUDA counts those it sees from 0, whatever the numbers of their files are.
    return [str(number) for number, _ in enumerate(filter(re.compile(r"nvidia\d+").fullmatch, devices))]


def usable() -> list[str]:
    """The visible GPUs; none where CMRHPC_DEVICE decides, or torch has no code for GPUs.

    Without CUDA_VISIBLE_DEVICES, GPUs count only if the driver is new enough for torch.
    """
    version = _cuda_of_torch()
    if os.environ.get("CMRHPC_DEVICE", "") not in ("", "cuda") or not version:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = listed(visible, os.listdir("/dev"))
    return found if visible is not None or (found and driver_serves(version)) else []


def least_used(gpus: Sequence[str], taken: Sequence[str]) -> str:
    """The GPU with the fewest tasks, the first of several; `taken` names that of each running task."""
    return min(gpus, key=taken.count)


def driver_serves(version: str) -> bool:
    """Whether this machine's driver runs programs of a version of CUDA: any of its first number, since CUDA 11."""
    told = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(told)) != 0:
            return False
    except (OSError, AttributeError):
        return False
    return told.value // 1000 >= int(version.partition(".")[0])


def _cuda_of_torch() -> str:
    """The version of CUDA that torch was built for, empty without; told by a file of it: it takes seconds to import."""
    found = importlib.util.find_spec("torch")
    try:
        text = Path(found.origin).with_name("version.py").read_text() if found and found.origin else ""
    except OSError:
        return ""
    match = re.search(r"(?m)^cuda\b.*=\s*['\"](\d+\.\d+)", text)
    return match[1] if match else ""
