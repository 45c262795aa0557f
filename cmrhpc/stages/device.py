"""Which device a task computes on."""

from __future__ import annotations

import os

import torch

from cmrhpc.errors import BadInput
from cmrhpc.study import Compute


def choose_device(compute: Compute) -> torch.device:
    """The GPU where there is one, otherwise the CPU; CMRHPC_DEVICE (cpu, cuda) overrides. Sets up the arithmetic.

    Raises BadInput for a device that is not there.
    """
    from cmrhpc.train.compute import has_bfloat16, setup_compute

    name = os.environ.get("CMRHPC_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f'no device "{name}": {reason}', "CMRHPC_DEVICE", "unset it, or name cpu or cuda") from None
    setup_compute(compute)
    if compute.mode == "fast" and not has_bfloat16(device):
        print("note: fast mode in float32: this processor only emulates bfloat16, which is slower", flush=True)
    return device


def about(compute: Compute, device: torch.device) -> dict[str, str]:
    """What a shard tells of the arithmetic that made it."""
    from cmrhpc.train.compute import uses_bfloat16

    return {"device": str(device), "arithmetic": "bfloat16" if uses_bfloat16(compute, device) else "float32"}
