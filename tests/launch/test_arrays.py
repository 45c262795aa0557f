"""Which arrays a submission is made of: what waits for what, and nothing for more than it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from cmrhpc import planning
from cmrhpc.launch.arrays import Array, plan_arrays
from cmrhpc.planning import COHORT, FOLDS, STAGES
from cmrhpc.profile import parse_profile
from cmrhpc.study import STUDIES, Study, parse_study
from cmrhpc.validity import State

PROFILE = parse_profile("")


def all_missing(study: Study, made: Sequence[str] = ()) -> dict[str, list[State]]:
    """What a workspace says of a study of which only these outputs are there."""
    states = {}
    for stage in STAGES:
        found = []
        for index, task in enumerate(planning.tasks(study, stage)):
            waits = tuple(path for path in planning.inputs(study, task) if path not in made)
            if task.output not in made:
                found.append(State(index, task, False, "missing", waits))
        states[stage] = found
    return states


def table(arrays: Sequence[Array]) -> list[tuple[str, list[int], tuple[str, ...], tuple[str, ...]]]:
    return [(a.name, a.tasks, a.needs, a.after) for a in arrays]


def check(arrays: Sequence[Array], missing: Mapping[str, Sequence[State]], study: Study) -> None:
    """Every task once, and every array behind whatever makes an input of it."""
    sent = [(a.stage, index) for a in arrays for index in a.tasks]
    assert sorted(sent) == sorted((stage, s.index) for stage, found in missing.items() for s in found)
    state = {(stage, s.index): s for stage, found in missing.items() for s in found}
    maker: dict[str, str] = {}
    behind: dict[str, set[str]] = {}
    for array in arrays:
        direct = {*array.needs, *array.after}
        assert direct <= set(behind), f"{array.name} waits for what comes later"
        behind[array.name] = direct | {name for other in direct for name in behind[other]}
        for index in array.tasks:
            for path in planning.inputs(study, state[array.stage, index].task):
                if path in maker and array.stage != "aggregate":
                    assert maker[path] in behind[array.name], f"{array.name} does not wait for {path}"
        for index in array.tasks:
            maker[state[array.stage, index].task.output] = array.name
            if array.stage == "ingest":
                maker[COHORT] = array.name
    assert behind[arrays[-1].name] == {a.name for a in arrays[:-1]}, "the report waits for all"


def test_a_fold_waits_for_nothing_of_another(study_text: str) -> None:
    study = parse_study(study_text)
    missing = all_missing(study)
    arrays = plan_arrays(missing, PROFILE)
    check(arrays, missing, study)
    needs = ("ingest",)
    assert table(arrays) == [
        ("ingest", [0], (), ()),
        ("synthesize-r0f0", [0, 1], needs, ()),
        ("refine-r0f0", [0, 1], needs, ("synthesize-r0f0",)),
        ("classify-r0f0", [2, 3], needs, ("synthesize-r0f0",)),
        ("classify-r0f0-2", [4], needs, ("refine-r0f0",)),
        ("synthesize-r0f1", [2, 3], needs, ()),
        ("refine-r0f1", [2, 3], needs, ("synthesize-r0f1",)),
        ("classify-r0f1", [7, 8], needs, ("synthesize-r0f1",)),
        ("classify-r0f1-2", [9], needs, ("refine-r0f1",)),
        ("classify-real", [0, 1, 5, 6], needs, ()),
        ("aggregate", [0], (), tuple(a.name for a in arrays if a.stage == "classify")),
    ]


def test_a_refiner_waits_for_its_own_generator(study_text: str) -> None:
    study = parse_study(study_text + '[generators.gan]\nexternal = "made"\n[[arms]]\nname = "gan"\nratios = [1]\n')
    missing = all_missing(study, [COHORT, FOLDS])
    arrays = plan_arrays(missing, PROFILE)
    check(arrays, missing, study)
    after = {a.name: a.after for a in arrays}
    assert after["refine-r0f0"] == ("synthesize-dae-gan-r0f0",)
    assert [names for name, names in after.items() if name.startswith("classify-r0f0")] == [
        ("synthesize-dae-gan-r0f0",),
        ("refine-r0f0",),
        ("synthesize-gan-r0f0",),
    ]
    assert "synthesize-r0f0" in {a.name for a in plan_arrays(missing, PROFILE, max_arrays=len(arrays) - 1)}


@pytest.mark.parametrize(("max_arrays", "most"), [(300, 300), (60, 60), (8, 8)])
def test_the_papers_study_is_cut_as_fine_as_is_allowed(max_arrays: int, most: int) -> None:
    text = (STUDIES / "fu2021.toml").read_text()
    study = parse_study(re.sub(r"(?m)^classes = .*$", 'classes = ["0", "1"]', text))
    missing = all_missing(study)
    arrays = plan_arrays(missing, PROFILE, max_arrays=max_arrays, max_elements=1001)
    check(arrays, missing, study)
    assert len(arrays) <= most
    assert max(len(a.elements) for a in arrays) <= 1001


def test_no_array_is_longer_than_is_allowed(study_text: str) -> None:
    study = parse_study(study_text.replace("repeats = 1", "repeats = 3"))
    missing = all_missing(study, [COHORT, FOLDS])
    arrays = plan_arrays(missing, PROFILE, max_elements=3)
    check(arrays, missing, study)
    assert max(len(a.elements) for a in arrays) == 3
    assert [a.name for a in arrays if a.name.startswith("classify-real")][:2] == ["classify-real", "classify-real-2"]


def test_what_is_queued_is_waited_for_and_not_sent_again(study_text: str) -> None:
    study = parse_study(study_text)
    missing = all_missing(study, [COHORT, FOLDS])
    held = {s.task.output: "77" for s in missing["synthesize"][:2]}
    left = missing | {"synthesize": missing["synthesize"][2:]}
    arrays = {a.name: a for a in plan_arrays(left, PROFILE, queued=held)}
    assert arrays["refine-r0f0"].after == ("77",)
    assert arrays["classify-r0f0"].after == ("77",)
    assert arrays["refine-r0f1"].after == ("synthesize-r0f1",)
    # An old report that still waits is waited for: two at once would write one folder.
    again = plan_arrays(left, PROFILE, queued=held | {missing["aggregate"][0].task.output: "78"})
    assert "78" in again[-1].after


def test_refiners_of_a_fold_wait_for_the_queued_generator_and_for_the_one_that_is_sent(study_text: str) -> None:
    missing = all_missing(parse_study(study_text), [COHORT, FOLDS])
    first = missing["synthesize"][0]
    left = missing | {"synthesize": missing["synthesize"][1:]}
    arrays = {a.name: a for a in plan_arrays(left, PROFILE, queued={first.task.output: "77"})}
    assert set(arrays["refine-r0f0"].after) == {"77", "synthesize-r0f0"}
    assert len(arrays["refine-r0f0"].tasks) == 2


def test_ingest_that_is_queued_is_needed(study_text: str) -> None:
    missing = all_missing(parse_study(study_text)) | {"ingest": []}
    arrays = plan_arrays(missing, PROFILE, queued={FOLDS: "5"})
    assert {a.needs for a in arrays if a.stage != "aggregate"} == {("5",)}


def test_tasks_share_a_gpu_and_what_their_element_asks_for_grows(study_text: str) -> None:
    study = parse_study(study_text)
    missing = all_missing(study, [COHORT, FOLDS])
    profile = parse_profile('[stages.classify]\ntasks_per_gpu = 3\ncpus = 2\nmemory = "4G"\ngres = "gpu:1"\n')
    arrays = {a.name: a for a in plan_arrays(missing, profile)}
    shared, single = arrays["classify-real"], arrays["classify-r0f0-2"]
    assert shared.elements == ((0, 1, 5), (6,))
    assert (shared.request.cpus, shared.request.memory, shared.request.gres) == (6, 12288, "gpu:1")
    assert (single.request.cpus, single.request.memory) == (2, 4096)
    assert arrays["synthesize-r0f0"].elements == ((0,), (1,))


def test_what_needs_more_goes_in_an_array_of_its_own(study_text: str) -> None:
    study = parse_study(study_text)
    missing = all_missing(study, [COHORT, FOLDS])
    arrays = plan_arrays(missing, PROFILE, more={("classify", 5): (99 * 3600, 16384)})
    check(arrays, missing, study)
    real = {a.name: (a.tasks, a.request.seconds) for a in arrays if a.name.startswith("classify-real")}
    assert real == {"classify-real": ([0, 1, 6], 6 * 3600), "classify-real-2": ([5], 99 * 3600)}


def test_nothing_missing_is_nothing_to_send(study_text: str) -> None:
    study = parse_study(study_text)
    everything = [t.output for stage in STAGES for t in planning.tasks(study, stage)]
    assert plan_arrays(all_missing(study, [COHORT, *everything]), PROFILE) == []
    report = all_missing(study, [COHORT, *everything[:-1]])
    assert table(plan_arrays(report, PROFILE)) == [("aggregate", [0], (), ())]
