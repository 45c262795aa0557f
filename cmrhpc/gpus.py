"""The GPUs that tasks of this machine may use, by the names that CUDA_VISIBLE_DEVICES takes. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path


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
    """The visible GPUs; none where CMRHPC_DEVICE decides, or where torch is missing or has no code for GPUs."""
    if os.environ.get("CMRHPC_DEVICE", "") not in ("", "cuda") or not _torch_has_cuda():
        return []
    return listed(os.environ.get("CUDA_VISIBLE_DEVICES"), os.listdir("/dev"))


def least_used(gpus: Sequence[str], taken: Sequence[str]) -> str:
    """The GPU with the fewest tasks, the first of several; `taken` names that of each running task."""
    return min(gpus, key=taken.count)


def _torch_has_cuda() -> bool:
    """Told by a file of torch, which would take seconds to import."""
    found = importlib.util.find_spec("torch")
    try:
        text = Path(found.origin).with_name("version.py").read_text() if found and found.origin else ""
    except OSError:
        return False
    return bool(re.search(r"(?m)^cuda\b.*=\s*['\"]", text))
