"""Progress for people: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from cmrhpc.plan import STAGES
from cmrhpc.workspace import State


def duration(seconds: float) -> str:
    """Seconds as people read them: 8 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """Stage, tasks done of all, what runs, time left. Use as a context manager."""

    def __init__(self, states: dict[str, list[State]], plain: bool = False):
        self.total = {stage: len(states[stage]) for stage in STAGES}
        self.done = {stage: sum(s.done for s in states[stage]) for stage in STAGES}
        self.spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.running: dict[str, tuple[State, float, float]] = {}  # title -> state, fraction, start
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
        self.running[state.task.title] = (state, 0.0, time.monotonic())

    def progress(self, state: State, done: int, total: int) -> None:
        _, _, begun = self.running[state.task.title]
        self.running[state.task.title] = (state, done / max(1, total), begun)

    def finished(self, state: State, outcome: str, reason: str, seconds: float) -> None:
        stage = state.task.stage
        del self.running[state.task.title]
        self.done[stage] += outcome == "done"
        self.spent[stage].append(seconds)
        line = f"{stage:<10} {self.done[stage]:>3}/{self.total[stage]:<3} {state.task.title}: "
        line += f"{outcome} in {duration(seconds)}"
        left = self.time_left()
        line += f"; {left}" if left and outcome == "done" else ""
        if outcome != "done":
            line += f"\n           {reason.splitlines()[0] if reason else ''}"
        if self.plain:
            print(line, flush=True)
        elif outcome != "done":
            self.bars.console.print(line, markup=False)

    def time_left(self) -> str:
        """From the mean time of a stage's finished tasks and the running ones' fraction; says what it cannot know."""
        seconds, unknown = 0.0, False
        now = time.monotonic()
        for stage in STAGES:
            running = [(fraction, now - begun) for s, fraction, begun in self.running.values() if s.task.stage == stage]
            known = list(self.spent[stage]) or [spent / fraction for fraction, spent in running if fraction > 0.05]
            remaining = self.total[stage] - self.done[stage] - sum(fraction for fraction, _ in running)
            if remaining <= 0 or stage in ("ingest", "aggregate"):
                continue
            if known:
                seconds += remaining * sum(known) / len(known)
            else:
                unknown = True
        seconds /= max(1, len(self.running))
        if not seconds:
            return ""
        return f"{'at least' if unknown else 'about'} {duration(seconds)} left"

    def tick(self) -> None:
        if not self.bars:
            return
        for stage, row in self.rows.items():
            now = [(s.task.title, fraction) for s, fraction, _ in self.running.values() if s.task.stage == stage]
            text = ", ".join(f"{title} {fraction:.0%}" for title, fraction in now[:2]) + (
                " ..." if len(now) > 2 else ""
            )
            part = self.done[stage] + sum(fraction for _, fraction in now)
            self.bars.update(row, completed=round(part, 1), now=text)
        last = list(self.rows.values())[-1]
        self.bars.update(last, now=self.time_left())
