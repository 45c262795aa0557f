"""Interleaved timing: the contestants take turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds` rounds, after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def ratio(times: Mapping[str, list[float]], base: str, name: str) -> float:
    """How many times faster `name` is than `base`: the median over rounds of the quotient within a round."""
    return statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
