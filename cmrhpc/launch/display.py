"""Progress for people: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cmrhpc.planning import STAGES
from cmrhpc.validity import State


def duration(seconds: float) -> str:
    """Seconds as people read them: 8 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


LINE_EVERY = 60.0  # seconds between two plain lines on one running task


def _so_far(fraction: float, spent: float) -> str:
    if not fraction:
        return f"running for {duration(spent)}"
    text = f"{fraction:.0%} after {duration(spent)}"
    left = duration(spent / fraction - spent)
    return f"{text}, about {left} left of this task" if fraction > 0.05 else text


def lines_of_one_task() -> Callable[[int, int], None]:
    """The progress of a task that runs alone: a plain line every LINE_EVERY seconds, for its log."""
    begun = told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_EVERY:
            told = now
            print(_so_far(done / max(1, total), now - begun), flush=True)

    return progress


@dataclass
class _Shown:
    """A running task: the fraction done, when it began, and when a line on it was last printed."""

    state: State
    begun: float
    told: float
    fraction: float = 0.0


class Display:
    """Stage, tasks done of all, what runs, time left. Use as a context manager."""

    def __init__(self, states: dict[str, list[State]], plain: bool = False, jobs: int = 1):
        self.total = {stage: len(states[stage]) for stage in STAGES}
        self.done = {stage: sum(s.done for s in states[stage]) for stage in STAGES}
        self.spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.running: dict[str, _Shown] = {}  # by title
        self.jobs = jobs
        self.stop_told = False
        self.bars: Any = None
        self.rows: dict[str, Any] = {}
        self.plain = plain or not sys.stdout.isatty()

    def __enter__(self) -> Display:
        if not self.plain:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            bar = BarColumn(bar_width=30)
            self.bars = Progress(
                TextColumn("{task.description:<10}"), bar, MofNCompleteColumn(), TextColumn("{task.fields[now]}")
            )
            for stage in STAGES:
                if self.total[stage]:
                    done = self.done[stage]
                    self.rows[stage] = self.bars.add_task(stage, total=self.total[stage], completed=done, now="")
            self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars:
            self.tick()
            self.bars.stop()

    def started(self, state: State) -> None:
        now = time.monotonic()
        self.running[state.task.title] = _Shown(state, now, now)

    def progress(self, state: State, done: int, total: int) -> None:
        self.running[state.task.title].fraction = done / max(1, total)

    def finished(self, state: State, outcome: str, reason: str, seconds: float) -> None:
        stage = state.task.stage
        del self.running[state.task.title]
        self.done[stage] += outcome == "done"
        self.spent[stage].append(seconds)
        line = f"{self._place(state)}: {outcome} in {duration(seconds)}"
        left = self.time_left()
        line += f"; {left}" if left and outcome == "done" else ""
        if outcome != "done":
            line += f"\n           {reason.splitlines()[0] if reason else ''}"
        if self.plain:
            print(line, flush=True)
        elif outcome != "done":
            self.bars.console.print(line, markup=False)

    def _place(self, state: State) -> str:
        stage = state.task.stage
        return f"{stage:<10} {self.done[stage]:>3}/{self.total[stage]:<3} {state.task.title}"

    def stopping(self) -> None:
        """A stop was asked for: say once what is being waited for."""
        if not self.stop_told:
            self.stop_told = True
            count = len(self.running)
            line = f"stopping: {count} running task{'s save' if count > 1 else ' saves'} what can be saved; "
            line += "Ctrl-C again ends at once"
            print(line, flush=True) if self.plain else self.bars.console.print(line, markup=False)

    def time_left(self) -> str:
        """From the mean time of a stage's finished tasks, or the running ones' fraction.

        A stage of which no task was timed yet is named: how long it takes is not known, and no part of the sum.
        """
        seconds: dict[str, float] = {}
        unknown = []
        now = time.monotonic()
        for stage in STAGES:
            running = [(task.fraction, now - task.begun) for task in self._of(stage)]
            known = list(self.spent[stage]) or [spent / fraction for fraction, spent in running if fraction > 0.05]
            remaining = self.total[stage] - self.done[stage] - sum(fraction for fraction, _ in running)
            if remaining <= 0 or stage in ("ingest", "aggregate"):
                continue
            if known:
                seconds[stage] = remaining * sum(known) / len(known) / min(self.jobs, math.ceil(remaining))
            else:
                unknown.append(stage)
        if not seconds:
            return ""
        text = f"about {duration(sum(seconds.values()))}"
        return f"{text} left of {', '.join(seconds)}; {', '.join(unknown)} not timed yet" if unknown else f"{text} left"

    def _of(self, stage: str) -> list[_Shown]:
        return [task for task in self.running.values() if task.state.task.stage == stage]

    def _tell_running(self) -> None:
        """Without bars: a line on each running task every LINE_EVERY seconds, so that a long one is seen to live."""
        now = time.monotonic()
        for task in self.running.values():
            if now - task.told < LINE_EVERY:
                continue
            task.told = now
            print(f"{self._place(task.state)}: {_so_far(task.fraction, now - task.begun)}", flush=True)

    def tick(self) -> None:
        if not self.bars:
            self._tell_running()
            return
        for stage, row in self.rows.items():
            now = [(task.state.task.title, task.fraction) for task in self._of(stage)]
            text = ", ".join(f"{title} {fraction:.0%}" for title, fraction in now[:2]) + (
                " ..." if len(now) > 2 else ""
            )
            part = self.done[stage] + sum(fraction for _, fraction in now)
            self.bars.update(row, completed=round(part, 1), now=text)
        last = list(self.rows.values())[-1]
        self.bars.update(last, now=self.time_left())
