"""What the fork server of a local run loads once for all tasks. Importing torch starts no threads and no GPU."""

import contextlib

import h5py  # noqa: F401
import numpy  # noqa: F401
import torch

with contextlib.suppress(ImportError):  # what deterministic algorithms and optimizers pull in: seconds in every task
    import torch._inductor.config  # noqa: F401
    import torchvision  # noqa: F401
