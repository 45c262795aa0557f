"""What the tests of a submission share: a profile, a job array that was sent, and what would be sent now."""

from __future__ import annotations

from cmrhpc.launch import submit
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.slurm import Limits
from cmrhpc.launch.submissions import Submission
from cmrhpc.profile import parse_profile
from cmrhpc.workspace import Workspace

PROFILE = '[slurm]\nmax_memory = "20G"\nmax_time = "20:00:00"\n'
SENT = Submission("7", "classify", ((0,), (1, 2)), 1e9, time_limit_s=6 * 3600, memory="16G", name="classify-real-aa")


def propose(workspace: Workspace, text: str = PROFILE) -> submit.Proposal:
    return submit.propose(workspace, parse_profile(text), ask_queue(workspace), Limits())
