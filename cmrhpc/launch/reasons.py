"""Slurm's words in plain ones: why something waits, how it ended, and what to do."""

from __future__ import annotations

import pwd
import signal

from cmrhpc.launch.slurm import Element

# Slurm's reason for waiting -> ours. The word itself stays in brackets, for those who look it up.
_WAITS = {
    "": "waits in the queue",
    "Priority": "waits in the queue: other jobs go first",
    "Resources": "waits in the queue: no free resources",
    "Dependency": "waits for another job",
    "BeginTime": "waits in the queue: may start in a moment",
    "JobArrayTaskLimit": "waits in the queue: as many elements of its array run as may at once",
    "JobHeldUser": "is held by its user: `scontrol release` releases it",
    "JobHeldAdmin": "is held by an administrator",
    "JobHoldMaxRequeue": "is held, it was requeued too often: `scontrol release` releases it",
    "Licenses": "waits in the queue: no free licence",
    "Reservation": "waits for its reservation",
    "PartitionDown": "waits: its partition is down",
    "PartitionInactive": "waits: its partition is inactive",
    "PartitionTimeLimit": "cannot start: its time limit is above the partition's",
    "PartitionNodeLimit": "cannot start: it asks for more nodes than the partition allows",
    "BadConstraints": "cannot start: no node has what it asks for",
    "DependencyNeverSatisfied": "never starts, a job it waits for failed: `scancel` it and submit again",
}
_LIMITS = ("Assoc", "QOS", "Max", "Grp")
_ENDS = {
    "BOOT_FAIL": "its node could not start",
    "CANCELLED": "cancelled",
    "COMPLETED": "its job ended without its result",
    "DEADLINE": "its deadline has passed",
    "FAILED": "its job failed",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory: submit again with more",
    "PREEMPTED": "preempted by another job, and not requeued",
    "TIMEOUT": "out of time: its job reached its time limit",
}
_BEFORE = {
    "PREEMPTED": "preempted by another job and requeued",
    "NODE_FAIL": "its node failed, requeued",
    "REQUEUED": "requeued",
    "BOOT_FAIL": "its node could not start, requeued",
}


def why_waiting(element: Element, after: tuple[str, ...] = ()) -> str:
    """Why an element has not started. after: jobs that it was submitted to wait for."""
    word = element.reason
    if word.startswith(("ReqNodeNotAvail", "Nodes required")):
        word, words = "ReqNodeNotAvail", "waits: the nodes it could run on are not available"
    elif word.startswith(_LIMITS):
        words = "waits in the queue: a limit of the user, account or quality of service"
    else:
        words = _WAITS.get(word, "waits in the queue")
    if word == "Dependency" and after:
        words += f", {', '.join(after[:3])}{' and more' if len(after) > 3 else ''}"
    return f"{words} ({word})" if word else words


def never_starts(element: Element) -> bool:
    """Whether it stays in the queue for ever."""
    return element.reason == "DependencyNeverSatisfied"


def how_ended(element: Element) -> str:
    """How an element ended that left no result."""
    words = _ENDS.get(element.state, f"its job ended as {element.state}")
    if element.state == "CANCELLED":
        if never_starts(element):
            return "cancelled by Slurm: a job it waited for failed"
        return f"cancelled by {user_name(element.by)}" if element.by else words
    if element.state == "FAILED":
        number = element.signal or _ended_by(element.exit_code)
        if number:
            return f"its process was ended by {_signal(number)}"
        return f"{words} with exit code {element.exit_code}" if element.exit_code else words
    return words


def _ended_by(exit_code: int) -> int:
    """The signal that an exit code stands for, or 0. A shell adds 128; Apptainer says the bare number."""
    if 128 < exit_code < 160:
        return exit_code - 128
    bare = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
    return exit_code if exit_code in bare else 0


def how_requeued(before: tuple[str, ...]) -> str:
    """Why an element is back in the queue, from the states of its earlier runs; empty where none."""
    return _BEFORE.get(before[-1], "requeued") if before else ""


def user_name(number: int | str) -> str:
    """Of the user of a number, where it has one here."""
    try:
        return f"user {pwd.getpwuid(int(number)).pw_name}"
    except (KeyError, ValueError):
        return f"user {number}"


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name} (killed, or out of memory)" if number == signal.SIGKILL else name
