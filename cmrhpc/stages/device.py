"""Which device a task computes on."""

from __future__ import annotations

import os

import torch

from cmrhpc import gpus
from cmrhpc.errors import BadInput
from cmrhpc.study import Compute


def choose_device(compute: Compute) -> torch.device:
    """The GPU where there is one, otherwise the CPU; CMRHPC_DEVICE (cpu, cuda) overrides. Sets up the arithmetic.

    Raises BadInput for a device that is not there or has no code in this torch, and where a GPU was asked for, by Slurm
    or CUDA_VISIBLE_DEVICES, that torch cannot use: the CPU would take days.
    """
    from cmrhpc.train.compute import has_bfloat16, setup_compute

    told, mend = os.environ.get("CMRHPC_DEVICE"), "see `cmrhpc doctor`; CMRHPC_DEVICE=cpu computes without"
    name = told or ("cuda" if torch.cuda.is_available() else "cpu")
    lent = gpus.named(os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("SLURM_JOB_GPUS", "")))
    if not told and name == "cpu" and lent:
        raise BadInput(f"torch {torch.__version__} cannot use the GPU of this task", f"GPU {','.join(lent)}", mend)
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1).item()  # a kernel: memory there is on GPUs without code, too
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        mend = "unset CMRHPC_DEVICE, or name cpu or cuda" if told else mend
        raise BadInput(f'no device "{name}": {reason}', "CMRHPC_DEVICE" if told else "", mend) from None
    setup_compute(compute)
    if compute.mode == "fast" and not has_bfloat16(device):
        print("note: fast mode in float32: this processor only emulates bfloat16, which is slower", flush=True)
    return device


def about(compute: Compute, device: torch.device, own_convolutions: bool = True) -> dict[str, str]:
    """What a shard tells of the arithmetic that made it. own_convolutions: whether the task takes our kernels."""
    from cmrhpc.nets.convolution import kernels
    from cmrhpc.train.compute import uses_bfloat16

    own = ", own convolutions" if own_convolutions and device.type == "cpu" and kernels() else ""
    return {"device": str(device), "arithmetic": "bfloat16" if uses_bfloat16(compute, device) else f"float32{own}"}
