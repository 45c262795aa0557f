"""More time or memory for tasks whose job ran out of it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cmrhpc.launch import slurm
from cmrhpc.launch.arrays import More
from cmrhpc.launch.queued import Queue
from cmrhpc.launch.records import FAILED, read_record, record_path
from cmrhpc.profile import Profile, memory_mb, memory_text, time_seconds, time_text
from cmrhpc.validity import State
from cmrhpc.workspace import Workspace


def more_for_what_lacked_it(
    workspace: Workspace, missing: Mapping[str, Sequence[State]], queue: Queue, profile: Profile
) -> tuple[More, list[str]]:
    """Twice the time or memory, up to the maximum, for tasks whose job ran out of it, with notes.

    The maximum is the profile's; of time the partition's too. A task that recorded another cause gets no more.
    """
    wanted = {(stage, s.index) for stage, found in missing.items() for s in found}
    tried = [s for s in queue.submissions if any((s.stage, i) in wanted for e in s.elements for i in e)]
    # What slurmctld still remembers serves where accounting is off.
    told = queue.elements | (slurm.accounting({s.job for s in tried}) or {})
    # Accounting may lag behind, but it alone knows of steps that ran out of memory.
    lacking = {key for key, element in told.items() if element.state == "OUT_OF_MEMORY"}
    told |= {key: element for key, element in queue.elements.items() if element.ended and key not in lacking}
    most_of_stage = functools.cache(lambda stage: _most_seconds(profile, stage))
    most_memory = memory_mb(profile.slurm.max_memory) if profile.slurm.max_memory else math.inf
    more: dict[tuple[str, int], tuple[int, int]] = {}
    for submission in tried:
        together = max(len(element) for element in submission.elements)
        for k, indices in enumerate(submission.elements):
            state = element.state if (element := submission.find(k, told)) else ""
            for task in ((submission.stage, index) for index in indices):
                if task not in wanted or state not in ("TIMEOUT", "OUT_OF_MEMORY"):
                    continue
                record = read_record(record_path(workspace, *task))
                own = record and record.state == FAILED and record.key == submission.key(k)
                if own and "out of memory" not in record.reason:  # type: ignore[union-attr]
                    continue
                asked = profile.resources(submission.stage)
                seconds, memory = more.get(task, (asked.seconds, memory_mb(asked.memory)))
                if state == "TIMEOUT":
                    most_time = most_of_stage(submission.stage)
                    seconds = max(seconds, int(min(2 * submission.time_limit_s, most_time)) // 60 * 60)
                elif submission.memory:
                    memory = max(memory, int(min(2 * (memory_mb(submission.memory) // together), most_memory)))
                more[task] = (seconds, memory)
    return more, _notes(more, profile, most_of_stage, most_memory)


def _notes(more: More, profile: Profile, most_of_stage: Callable[[str], float], most_memory: float) -> list[str]:
    """In words, one line for what was lacking and each amount that is asked for now."""
    lacked: Counter[tuple[str, str, str]] = Counter()
    for (stage, _), (seconds, memory) in more.items():
        asked = profile.resources(stage)
        if (seconds, memory) == (asked.seconds, memory_mb(asked.memory)):
            lacked[stage, "time or memory", "what the profile says, and max_time and max_memory allow no more"] += 1
        if seconds != asked.seconds:
            limit = profile.slurm.max_time
            whose = "profile" if limit and seconds >= time_seconds(limit) else "partition"
            end = f" (max_time of the {whose})" if seconds >= most_of_stage(stage) else ""
            lacked[stage, "time", f"{time_text(seconds)} instead of {time_text(asked.seconds)}{end}"] += 1
        if memory != memory_mb(asked.memory):
            end = " (max_memory of the profile)" if memory >= most_memory else ""
            usual = memory_text(memory_mb(asked.memory))
            lacked[stage, "memory", f"{memory_text(memory)} instead of {usual}{end}"] += 1
    return [
        f"{stage}: {n} task{'s' * (n > 1)} ran out of {what}; asking for {end}"
        for (stage, what, end), n in sorted(lacked.items())
    ]


def _most_seconds(profile: Profile, stage: str) -> float:
    """The longest time that a task of a stage may be given, as far as it is known."""
    told = time_seconds(profile.slurm.max_time) if profile.slurm.max_time else math.inf
    names = [name for name in profile.slurm_of(stage).partition.split(",") if name]
    here = [p.most_seconds for p in slurm.partitions() or [] if (p.name in names if names else p.default)]
    return min(told, max(here, default=math.inf))
