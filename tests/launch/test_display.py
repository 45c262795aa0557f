"""What a run without a terminal prints while it works, and how it speaks of the time left."""

from __future__ import annotations

import pytest

from cmrhpc.launch import display as module
from cmrhpc.launch.display import Display, lines_of_one_task
from cmrhpc.planning import STAGES, Task
from cmrhpc.validity import State


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def states(**counts: int) -> dict[str, list[State]]:
    return {
        stage: [State(i, Task(stage, fold=i, generator="g", label=0), False) for i in range(counts.get(stage, 0))]
        for stage in STAGES
    }


def test_a_long_task_is_told_once_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = states(synthesize=2)
    with Display(tasks, plain=True, jobs=2) as display:
        for state in tasks["synthesize"]:
            display.started(state)
        for second in range(1, 181):
            clock.now += 1
            display.progress(tasks["synthesize"][0], second, 360)
            display.tick()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "synthesize   0/2   g fold 0 repeat 0 class 0: 17% after 60 s, about 5 min left of this task",
        "synthesize   0/2   g fold 1 repeat 0 class 0: running for 60 s",
        "synthesize   0/2   g fold 0 repeat 0 class 0: 33% after 2 min, about 4 min left of this task",
        "synthesize   0/2   g fold 1 repeat 0 class 0: running for 2 min",
        "synthesize   0/2   g fold 0 repeat 0 class 0: 50% after 3 min, about 3 min left of this task",
        "synthesize   0/2   g fold 1 repeat 0 class 0: running for 3 min",
    ]


def test_a_stop_is_told_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = states(classify=2)
    with Display(tasks, plain=True, jobs=2) as display:
        for state in tasks["classify"]:
            display.started(state)
        display.stopping()
        display.finished(tasks["classify"][0], "stopped", "a checkpoint was saved", 3)
        display.stopping()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stopping: 2 running tasks save what can be saved; Ctrl-C again ends at once"
    assert [line for line in lines if "stopping" in line] == lines[:1]


def test_a_task_alone_says_every_minute_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = lines_of_one_task()
    for step in range(1, 91):
        clock.now += 1
        progress(step, 600)
    assert capsys.readouterr().out == "10% after 60 s, about 9 min left of this task\n"


def test_the_estimate_names_the_stages_that_it_cannot_know(clock: Clock) -> None:
    tasks = states(synthesize=5, classify=4)
    display = Display(tasks, plain=True, jobs=2)
    assert display.time_left() == ""
    first = tasks["synthesize"][0]
    display.started(first)
    clock.now += 10
    display.finished(first, "done", "", 10)
    # Four tasks of 10 s on two places.
    assert display.time_left() == "about 20 s left of synthesize; classify not timed yet"
    for state in tasks["synthesize"][1:]:
        display.started(state)
        display.finished(state, "done", "", 10)
    display.started(tasks["classify"][0])
    display.progress(tasks["classify"][0], 1, 2)
    clock.now += 15
    # Half of a task took 15 s: three and a half of 30 s on two places.
    assert display.time_left() == "about 52 s left"
