"""What the fork server of a local run loads once for all tasks. Importing torch starts no threads and no GPU."""

import h5py  # noqa: F401
import numpy  # noqa: F401
import torch  # noqa: F401
