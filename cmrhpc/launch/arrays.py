"""Which job arrays a submission is made of. Pure: nothing is asked and nothing is sent here.

Slurm's dependencies hang on whole arrays, so arrays are cut where a task would wait for what it does not need: one for
each generator of a fold, one for its refiners, and the classifiers of the fold by what they wait for; classifiers that
wait for nothing share one. A dependency is `afterany`: a failed task holds up nobody, and each task looks at its inputs
itself. Everything depends on ingest with `afterok`: without a cohort there is nothing to do, and Slurm cancels these
jobs (`--kill-on-invalid-dep`) instead of starting each only to fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cmrhpc.planning import COHORT, FOLDS
from cmrhpc.profile import Profile, memory_mb
from cmrhpc.validity import State

MAX_ARRAYS = 300  # above that, arrays are shared: each is a question to the controller, and a line in squeue
TRAINING = ("synthesize", "refine", "classify")


@dataclass(frozen=True)
class Request:
    """What one array element asks for. seconds: time limit. memory: MiB. gres, gpus: as the profile writes them."""

    seconds: int
    cpus: int
    memory: int
    gres: str
    gpus: str = ""


@dataclass(frozen=True)
class Array:
    """One job array. Element k runs the tasks elements[k], side by side.

    after: starts when these have ended, however they did. needs: starts when these have succeeded, and is taken away
    when they have not. Both hold names of arrays of the same plan, or numbers of jobs that are queued already.
    """

    name: str
    stage: str
    elements: tuple[tuple[int, ...], ...]
    request: Request
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[int]:
        return [index for element in self.elements for index in element]


# What single tasks are to be given instead of what the profile says: (stage, index) -> (seconds, MiB).
More = Mapping[tuple[str, int], tuple[int, int]]


def plan_arrays(
    missing: Mapping[str, Sequence[State]],
    profile: Profile,
    *,
    queued: Mapping[str, str] | None = None,
    more: More | None = None,
    max_elements: int = 1000,
    max_arrays: int = MAX_ARRAYS,
) -> list[Array]:
    """The arrays for the missing tasks, each after those that it depends on, fold by fold.

    queued: output -> the job that already makes it; such tasks are not among the missing. max_elements: of one array.
    The report is made anew, at the end, whenever anything else is submitted.
    """
    arrays: list[Array] = []
    for cut, apart in ((_by_fold, True), (_by_fold, False), (_by_repeat, False), (_together, False)):
        arrays = _plan(missing, profile, queued or {}, more or {}, max_elements, cut, apart)
        if len(arrays) <= max_arrays:
            break
    return arrays


def _by_fold(state: State) -> tuple[int, ...]:
    return (state.task.repeat, state.task.fold)


def _by_repeat(state: State) -> tuple[int, ...]:
    return (state.task.repeat,)


def _together(state: State) -> tuple[int, ...]:
    return ()


def _plan(
    missing: Mapping[str, Sequence[State]],
    profile: Profile,
    queued: Mapping[str, str],
    more: More,
    max_elements: int,
    cut: Callable[[State], tuple[int, ...]],
    apart: bool,
) -> list[Array]:
    """apart: each generator has arrays of its own, so that what waits for one does not wait for all."""
    maker = dict(queued)  # output -> array or job that makes it
    arrays: list[Array] = []
    names: Counter[str] = Counter()

    def add(label: str, stage: str, states: Sequence[State], **dependencies: tuple[str, ...]) -> None:
        for part, request in _chunks(states, profile, more, max_elements):
            names[label] += 1
            name = label if names[label] == 1 else f"{label}-{names[label]}"
            array = Array(name, stage, part, request, **dependencies)
            arrays.append(array)
            held = set(array.tasks)
            maker.update({s.task.output: name for s in states if s.index in held})
            if stage == "ingest":
                maker[COHORT] = name

    if FOLDS in queued:
        maker[COHORT] = queued[FOLDS]
    add("ingest", "ingest", missing.get("ingest", ()))
    needs = tuple(dict.fromkeys(maker[path] for path in (COHORT, FOLDS) if path in maker))

    def waits_for(state: State) -> tuple[str, ...]:
        made = dict.fromkeys(maker[path] for path in state.waits_for if path in maker)
        return tuple(name for name in made if name not in needs)

    # Fold by fold, so that a submission that meets the cluster's limit has sent whole folds; what is free comes last.
    places = sorted({cut(s) for stage in TRAINING for s in missing.get(stage, ())})
    free: list[State] = []
    for place in places:
        for stage in TRAINING:
            here = [state for state in missing.get(stage, ()) if cut(state) == place]
            if stage == "classify":
                groups: dict[tuple[str, ...], list[State]] = {}
                for state in here:
                    groups.setdefault(waits_for(state), []).append(state)
                free += groups.pop((), [])
                for after, states in groups.items():
                    add(_label(stage, place), stage, states, after=after, needs=needs)
                continue
            several = len({state.task.generator for state in missing.get(stage, ())}) > 1
            for name in dict.fromkeys(state.task.generator if apart else "" for state in here):
                states = [state for state in here if not apart or state.task.generator == name]
                after = tuple(dict.fromkeys(made for state in states for made in waits_for(state)))
                label = _label(f"{stage}-{name}" if apart and several else stage, place)
                add(label, stage, states, after=after, needs=needs)
    add("classify-real" if places else "classify", "classify", free, needs=needs)

    # The report waits for every end of the chain, and runs in any case.
    report = missing.get("aggregate", ())
    waited = {name for array in arrays for name in (*array.after, *array.needs)}
    ends = [array.name for array in arrays if array.name not in waited]
    ends += [job for job in dict.fromkeys(queued.values()) if job not in waited]
    add("aggregate", "aggregate", report, after=tuple(ends))
    return arrays


def _label(stage: str, place: tuple[int, ...]) -> str:
    return stage + "".join(f"{'-r' if i == 0 else 'f'}{number}" for i, number in enumerate(place))


def _chunks(
    states: Iterable[State], profile: Profile, more: More, max_elements: int
) -> Iterator[tuple[tuple[tuple[int, ...], ...], Request]]:
    """Elements of tasks that ask for the same, at most `max_elements` at a time."""
    alike: dict[tuple[int, int], list[State]] = {}
    for state in states:
        asked = profile.resources(state.task.stage)
        usual = (asked.seconds, memory_mb(asked.memory))
        alike.setdefault(more.get((state.task.stage, state.index), usual), []).append(state)
    for (seconds, memory), group in alike.items():
        stage = group[0].task.stage
        asked, together = profile.resources(stage), profile.tasks_per_element(stage)
        indices = [state.index for state in group]
        elements = [tuple(indices[i : i + together]) for i in range(0, len(indices), together)]
        for i in range(0, len(elements), max_elements):
            part = tuple(elements[i : i + max_elements])
            most = max(len(element) for element in part)
            yield part, Request(seconds, asked.cpus * most, memory * most, asked.gres, asked.gpus)
