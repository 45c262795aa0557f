"""How many GPU-hours a submission will take: measured where shards of the same kind exist, else the time limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cmrhpc.launch.arrays import TRAINING, Array
from cmrhpc.planning import STAGES, Task
from cmrhpc.profile import Profile
from cmrhpc.validity import State
from cmrhpc.workspace import Entry


@dataclass(frozen=True)
class Expected:
    """What the arrays of one stage will take. measured: of how many tasks the time was."""

    tasks: int
    elements: int
    arrays: int
    gpu_hours: float
    measured: int


def kind(task: Task) -> str:
    """Tasks of one kind take about the same time."""
    names = {"synthesize": task.generator, "refine": task.refiner, "classify": task.classifier}
    return f"{task.stage} {names.get(task.stage, '')}"


def mean_seconds(states: Iterable[State], index: Mapping[str, Entry]) -> dict[str, float]:
    """Kind -> mean seconds of its finished tasks, of those that tell it."""
    found: dict[str, list[float]] = {}
    for state in states:
        entry = index.get(state.task.output)
        if state.done and entry and entry.seconds:
            found.setdefault(kind(state.task), []).append(entry.seconds)
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items()}


def expected(
    index: Mapping[str, Entry], arrays: Sequence[Array], states: Mapping[str, Sequence[State]], profile: Profile
) -> dict[str, Expected]:
    """Per stage that is submitted. An element takes as long as the longest of its tasks. index: of the workspace."""
    known = mean_seconds((s for stage in TRAINING for s in states.get(stage, ())), index)
    kinds = {(stage, s.index): kind(s.task) for stage, found in states.items() for s in found}
    rows = {}
    for stage in STAGES:
        own = [array for array in arrays if array.stage == stage]
        if not own:
            continue
        seconds = 0.0
        for array in own:
            for element in array.elements:
                seconds += max(known.get(kinds[stage, index], array.request.seconds) for index in element)
        rows[stage] = Expected(
            tasks=sum(len(array.tasks) for array in own),
            elements=sum(len(array.elements) for array in own),
            arrays=len(own),
            gpu_hours=seconds * profile.gpus(stage) / 3600,
            measured=sum(kinds[stage, index] in known for array in own for index in array.tasks),
        )
    return rows


def table(rows: Mapping[str, Expected]) -> list[str]:
    """For people: one line per stage, and where the hours come from."""
    lines = [f"{'stage':<11}{'tasks':>7}{'elements':>10}{'arrays':>8}{'GPU-hours':>11}"]
    for stage, row in rows.items():
        origin = "measured" if row.measured == row.tasks else f"{row.measured} of {row.tasks} tasks measured"
        if not row.measured:
            origin = "at most: the time limit"
        if not row.gpu_hours:
            origin = "no GPU"
        line = f"{stage:<11}{row.tasks:>7}{row.elements:>10}{row.arrays:>8}{row.gpu_hours:>11.1f}"
        lines.append(f"{line}  {origin}")
    total = sum(row.gpu_hours for row in rows.values())
    lines.append(f"{'in all':<11}{sum(row.tasks for row in rows.values()):>7}{'':>18}{total:>11.1f}")
    return lines
