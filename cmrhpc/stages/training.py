"""What the three training stages share: the log, the checkpoints and the weights file."""

from __future__ import annotations

import json
from typing import Any

import torch

from cmrhpc import planning
from cmrhpc.stages.context import Context
from cmrhpc.train.checkpoint import Checkpoints


class TrainingLog:
    """Collects one JSON line per log step; warnings are printed as well, into the task's log."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if "warning" in line:
            print(f"warning at step {line.get('step', '?')}: {line['warning']}", flush=True)

    def text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.lines)


def checkpoints(context: Context) -> Checkpoints:
    """Where this task keeps its checkpoints; they belong to its settings, seed and inputs and to no other."""
    study = context.workspace.study
    belongs_to = {
        "task": context.task.to_json(),
        "settings": planning.settings(study, context.task),
        "seed": context.seed,
        "inputs": context.hashes,
    }
    folder = context.workspace.checkpoint_folder(context.task)
    return Checkpoints(folder, belongs_to, study.compute.checkpoint_seconds)


def weights_bytes(weights: dict[str, torch.Tensor]) -> bytes:
    """Weights as the bytes of a safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
