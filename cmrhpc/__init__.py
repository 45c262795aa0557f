"""cmrhpc: does synthetic augmentation help my classifier, with which method, how much?

From Python: `load_study`, `plan`, `submit`, their types and `ShardDataset`, imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmrhpc.data.dataset import ShardDataset
    from cmrhpc.launch.executors import submit
    from cmrhpc.planning import Task
    from cmrhpc.study import Study, load_study
    from cmrhpc.validity import State, plan
    from cmrhpc.workspace import Workspace

__version__ = "0.1.0"
__all__ = ["ShardDataset", "State", "Study", "Task", "Workspace", "load_study", "plan", "submit"]

# No module of the package may have one of these names: once imported it would stand in its place.
_HOME = {
    "load_study": "cmrhpc.study",
    "plan": "cmrhpc.validity",
    "submit": "cmrhpc.launch.executors",
    "Study": "cmrhpc.study",
    "Workspace": "cmrhpc.workspace",
    "State": "cmrhpc.validity",
    "Task": "cmrhpc.planning",
    "ShardDataset": "cmrhpc.data.dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cmrhpc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
