"""Random states derive from the study seed and the parts of a task that matter, and from nothing else."""

from __future__ import annotations

import hashlib
import json


def derive_seed(study_seed: int, *parts: str | int) -> int:
    """Seed in [0, 2**63) of the named part of a study; independent of order, machine and time.

    >>> derive_seed(1, "synthesize", 0) == derive_seed(1, "synthesize", 0)
    True
    """
    text = json.dumps([study_seed, *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
