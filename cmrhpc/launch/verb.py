"""The verb `cmrhpc submit`: shows, asks, sends."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cmrhpc.errors import BadInput, UsageError
from cmrhpc.launch.arrays import Array
from cmrhpc.launch.estimate import table
from cmrhpc.launch.planned import array_ranges
from cmrhpc.launch.queued import ask_queue
from cmrhpc.launch.send import other_version, send, settings
from cmrhpc.launch.submit import Proposal, as_json, describe, dry_run, limits_for, propose, submit_all
from cmrhpc.paths import check_for_slurm
from cmrhpc.profile import Profile, load_profile
from cmrhpc.workspace import Workspace

if TYPE_CHECKING:
    from submitit import Job


def submit(root: str, profile_name: str, dry: bool, yes: bool, json_wanted: bool) -> int:
    """Everything missing in a workspace, on Slurm. Returns the exit code; raises what it cannot do."""
    workspace, profile = Workspace(root), load_profile(profile_name)
    check_for_slurm(workspace.root)
    limits = limits_for(profile)
    proposal = propose(workspace, profile, ask_queue(workspace), limits)
    if dry:
        return _dry_run(workspace, profile, proposal, json_wanted)
    if proposal.arrays and not all(map(shutil.which, ("squeue", "sbatch", "srun"))):
        mend = "go to a login node; --dry-run shows the files here too, `cmrhpc run` needs no Slurm"
        raise BadInput("Slurm is not installed here", "squeue, sbatch, srun", mend)
    for stage in {array.stage for array in proposal.arrays}:
        settings(workspace, profile, stage)  # what is wrong with the image is said before anything is asked
    held = profile.container
    if proposal.arrays and held.image and (differs := other_version(held.image, held.options)):
        proposal.notes.append(differs)
    if not json_wanted:
        _show(proposal)
    if proposal.arrays and not yes and not _agreed(proposal):
        print("nothing was sent", file=sys.stderr)
        return 0
    token, sent = secrets.token_hex(4), []

    def send_one(array: Array, jobs: Mapping[str, str]) -> list[Job[str]]:
        return send(workspace, array, profile, token, jobs, limits.cluster)

    if proposal.arrays:
        say = (lambda text: None) if json_wanted else (lambda text: print(text, flush=True))
        sent = submit_all(workspace, profile, limits, send_one, proposal, say)
    if json_wanted:
        print(json.dumps(as_json(proposal, sent)))
    elif sent:
        print(f"sent {proposal.tasks} tasks in {len(sent)} arrays; see `cmrhpc status {shlex.quote(root)}`")
    return 0


def _show(proposal: Proposal) -> None:
    if proposal.queued:
        print(f"{proposal.queued} tasks are waiting or running already; they are left out")
    if not proposal.arrays:
        print(f"nothing to submit: {proposal.done} tasks are done")
        return
    print("\n".join(table(proposal.expected)))
    for note in proposal.notes:
        print(note)


def _agreed(proposal: Proposal) -> bool:
    if not sys.stdin.isatty():
        mend = "--yes sends without asking, --dry-run shows what would be sent"
        raise UsageError("nobody to ask: this is not a terminal", "cmrhpc submit", mend)
    print(f"send {proposal.tasks} tasks? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _dry_run(workspace: Workspace, profile: Profile, proposal: Proposal, json_wanted: bool) -> int:
    found, right = dry_run(workspace, profile, proposal)
    if json_wanted:
        print(json.dumps(as_json(proposal, []) | {"scripts": found}))
    else:
        _show(proposal)
        for array, file in zip(proposal.arrays, found, strict=True):
            print(f"\n##### {array.name}: {describe(array)}\n##### tasks {array_ranges(sorted(array.tasks))[0]}")
            print("".join(f"##### {name}={value}\n" for name, value in file["variables"].items()) + file["script"])
            verdict = {True: "accepted", False: "REFUSED", None: "not asked"}[file["accepted"]]
            print(f"##### sbatch --test-only: {verdict}: {file['answer']}")
    if not right:
        refused = [file["name"] for file in found if file["accepted"] is False]
        mend = "mend the profile: Slurm's reason stands below each file"
        raise BadInput(f"Slurm would refuse {len(refused)} arrays", ", ".join(refused[:5]), mend)
    return 0
