"""Threads that each run whole passes through the networks, on a generator of their own.

Two passes side by side, each on one thread, take less time than one after the other on two threads: nobody waits at
the end of each operation, and operations that know no threads lose nothing. The results do not depend on which thread
ran what.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmrhpc.nets.convolution import quick_convolutions
from cmrhpc.nets.spectral import SpectralNorm
from cmrhpc.train.flat import Flat

T = TypeVar("T")


class Replica:
    """A generator that one pass at a time may load and run."""

    def __init__(self, module: nn.Module):
        self.module, self.flat = module, Flat(module)

    def load(self, vector: Tensor, buffers: Tensor) -> None:
        """Load one individual."""
        self.flat.vector.copy_(vector)
        self.flat.buffers.copy_(buffers)


class Workers:
    """Runs jobs side by side on the CPU, one after the other elsewhere.

    replicas: the generator itself, and as many copies of it as there are further workers. count: by default torch's
    number of threads.
    """

    def __init__(self, generator: nn.Module, count: int | None = None):
        self.device = next(generator.parameters()).device
        self.count = (count or torch.get_num_threads()) if self.device.type == "cpu" else 1
        self.replicas = [Replica(copy.deepcopy(generator)) for _ in range(self.count - 1)]
        self.replicas.insert(0, Replica(generator))
        self._free: queue.SimpleQueue[Replica] = queue.SimpleQueue()
        for replica in self.replicas:
            self._free.put(replica)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[Callable[[Replica], T]], alone: bool = False) -> list[T]:
        """Every job's result, in order. `alone`: one after the other, each on all threads."""
        if self.count == 1 or len(jobs) == 1 or alone:
            with quick_convolutions(self.device):
                return [job(self.replicas[0]) for job in jobs]
        if self._pool is None:
            threads = torch.get_num_threads()
            here = threading.Barrier(self.count)
            self._pool = ThreadPoolExecutor(self.count, initializer=_take_one_thread)
            list(self._pool.map(lambda _: here.wait(), range(self.count)))  # every thread starts now
            torch.set_num_threads(threads)  # what a new thread sets counts for later ones too
        return [future.result() for future in [self._pool.submit(self._on_replica, job) for job in jobs]]

    def _on_replica(self, job: Callable[[Replica], T]) -> T:
        replica = self._free.get()
        try:
            with quick_convolutions(self.device):
                return job(replica)
        finally:
            self._free.put(replica)


def _take_one_thread() -> None:
    """Query before setting: a new thread's first query resets its count to the process's."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def keep_no_state(module: nn.Module) -> bool:
    """Whether passes through the module may run side by side: it declares whether it mixes samples, draws no random
    numbers, and holds no buffers but batch norm's statistics, which are frozen or handed out with the result, and
    spectral norm's, which stand still."""
    known = hasattr(module, "mixes_samples")
    for part in module.modules():
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm | SpectralNorm)
        known &= norm or not any(True for _ in part.buffers(recurse=False))
        known &= not isinstance(part, nn.modules.dropout._DropoutNd)
    return known
