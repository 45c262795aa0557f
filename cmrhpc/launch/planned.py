"""The verb `cmrhpc plan`: what is done and missing, and the missing as `sbatch --array` takes it."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence

from cmrhpc import files, validity
from cmrhpc.errors import BadInput
from cmrhpc.launch import slurm
from cmrhpc.validity import State
from cmrhpc.workspace import Workspace

DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own, where the cluster does not say
SHOWN_REASONS = 5  # of a stage
_MADE_BY = {"synthetic": "synthesize", "refined": "refine", "predictions": "classify"}  # by folder
_PLACE = re.compile(r"fold\d+_repeat\d+(_class(es|\d+))?")


def print_plan(workspace: Workspace, stages: tuple[str, ...], as_json: bool, every: bool) -> None:
    """Counts per stage, and why tasks are missing: one line per stage and reason, with `every` one per task."""
    states = validity.states(workspace, stages, freeze=False)
    counts = {
        stage: {"total": len(found), "done": sum(s.done for s in found), "missing": sum(not s.done for s in found)}
        for stage, found in states.items()
    }
    if as_json:
        tasks = [
            {"stage": stage, "index": s.index, "output": s.task.output, "done": s.done, "reason": s.reason}
            for stage, found in states.items()
            for s in found
        ]
        print(json.dumps({"stages": counts, "tasks": tasks}))
        return
    for stage, count in counts.items():
        print(f"{stage:<10} {count['total']:>6} tasks  {count['done']:>6} done  {count['missing']:>6} missing")
    if every:
        for stage, found in states.items():
            for s in found:
                print(f"{stage} {s.index:>5}  {s.task.title}: {'done' if s.done else s.reason}")
        return
    for stage, found in states.items():
        why = Counter(_why(s) for s in found if not s.done)
        for text, number in why.most_common(SHOWN_REASONS):
            print(f"{stage}: {number} {text}")
        if len(why) > SHOWN_REASONS:
            print(f"{stage}: and {len(why) - SHOWN_REASONS} more reasons, which --stage {stage} lists")


def _why(state: State) -> str:
    """Why a task is missing, in the same words for every fold, repeat and class."""
    if state.reason != "missing":
        return _PLACE.sub("*", state.reason)
    stages = dict.fromkeys(_MADE_BY.get(path.partition("/")[0], "ingest") for path in state.waits_for)
    return f"not made yet; waits for {', '.join(stages)}" if stages else "not made yet"


def print_ranges(workspace: Workspace, stage: str, chunk: int, offset: bool) -> None:
    """The missing tasks of a stage, one line per array; with `offset` RANGE OFFSET.

    Slurm refuses an index of MaxArraySize or more, whatever the length of the array: those tasks need an offset.
    """
    missing = [s.index for s in validity.states(workspace, (stage,))[stage] if not s.done]
    if not missing:
        print(f"stage {stage}: nothing is missing", file=sys.stderr)
        return
    with contextlib.suppress(BadInput):  # with the group of the workspace, before the first job makes it
        files.make_folder(workspace.root / "logs")
    told = (slurm.config() or {}).get("MaxArraySize")
    limit = int(told) if told and told.isdigit() else DEFAULT_MAX_ARRAY_SIZE
    if not limit:
        mend = "`cmrhpc submit` sends single jobs there"
        raise BadInput("this cluster takes no job arrays: MaxArraySize is 0", "scontrol show config", mend)
    if offset:
        for line in offset_ranges(missing, min(chunk or limit, limit)):
            print(line)
        return
    if missing[-1] >= limit:
        known = f"of this cluster is {told}" if told else f"is {limit} where the cluster does not say otherwise"
        print(f"the index {missing[-1]} is too high for one array: MaxArraySize {known}", file=sys.stderr)
        print(f"  mend:  --array --chunk {limit} --offset, or cmrhpc submit", file=sys.stderr)
    for line in array_ranges(missing, chunk):
        print(line)


def array_ranges(indices: Sequence[int], chunk: int = 0) -> list[str]:
    """Missing indices as `sbatch --array` takes them, one text per chunk of at most `chunk` tasks.

    >>> array_ranges([0, 1, 2, 5, 7, 8])
    ['0-2,5,7-8']
    """
    chunks = [indices[i : i + chunk] for i in range(0, len(indices), chunk)] if chunk else [indices]
    texts = []
    for part in filter(None, chunks):
        runs: list[list[int]] = []
        for index in part:
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        texts.append(",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs))
    return texts


def offset_ranges(indices: Sequence[int], size: int) -> list[str]:
    """The same as `RANGE OFFSET` with every index below `size`: the task is the array index plus the offset.

    >>> offset_ranges([0, 1, 7, 8, 9], 4)
    ['0-1 0', '3 4', '0-1 8']
    """
    texts = []
    for start in range(0, max(indices, default=-1) + 1, size):
        here = [index - start for index in indices if start <= index < start + size]
        texts += [f"{text} {start}" for text in array_ranges(here)]
    return texts
