"""What the fork server of a local run loads once for all tasks. Importing torch starts no threads and no GPU."""

import contextlib

import h5py  # noqa: F401
import numpy  # noqa: F401

with contextlib.suppress(Exception):  # what cannot be loaded is told by the task that needs it
    import torch
    import torch._dynamo  # noqa: F401  (what optimizers pull in: over a second in every task)
    import torchvision  # noqa: F401
