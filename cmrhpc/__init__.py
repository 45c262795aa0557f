"""cmrhpc: does synthetic augmentation help my classifier, with which method, how much?

From Python: `load_study`, `plan`, `submit` and `ShardDataset`, imported when first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["ShardDataset", "load_study", "plan", "submit"]

_HOME = {
    "load_study": ("cmrhpc.study", "load_study"),
    "plan": ("cmrhpc.workspace", "plan"),
    "submit": ("cmrhpc.launch.executors", "submit"),
    "ShardDataset": ("cmrhpc.data.dataset", "ShardDataset"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cmrhpc' has no attribute {name!r}")
    import importlib

    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
