"""Threads, determinism and number formats of a training task, set from the study and never from the allocation."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from cmrhpc.study import Compute


def setup_compute(compute: Compute) -> None:
    """Set torch's threads and determinism for this process, and keep freed memory in the process."""
    torch.set_num_threads(compute.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not use_deterministic_algorithms, which also imports the compiler for its own switch: 1.4 s.
    torch.set_deterministic_debug_mode("warn" if compute.deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none is read
    torch.backends.cudnn.deterministic = compute.deterministic
    torch.backends.cudnn.benchmark = not compute.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute.mode == "fast"
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tell glibc not to give tensors' memory back to the kernel: page faults cost more than the arithmetic on them.

    One arena for all threads: those that further threads get are given back whatever the thresholds say.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass  # another C library: only slower


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; to a GPU asynchronously: a plain copy would wait for queued work."""
    return (
        tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself computes in bfloat16.

    Where torch emulates it (CPUs without AVX-512 BF16 or AMX, GPUs before Ampere) it is several times slower than
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_bfloat16(compute: Compute, device: torch.device) -> bool:
    """Whether a training computes in bfloat16: in fast mode, on a device that is quicker with it."""
    return compute.mode == "fast" and has_bfloat16(device)


def autocast(compute: Compute, device: torch.device) -> torch.autocast:
    """Bfloat16 arithmetic where it is used. Weights, optimizer states and losses stay float32."""
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(compute, device), cache_enabled=False
    )
