"""The closing words of a run in which tasks failed: each distinct failure once, with where, mend, tasks and log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_KINDS, SHOWN_EACH = 20, 3


@dataclass(frozen=True)
class Failure:
    """One failed task. what, where, mend: of its error; log: path of its log."""

    title: str
    what: str
    where: str
    mend: str
    log: str


def told(failures: Sequence[Failure], missing: Sequence[str], stopped: Sequence[str] = ()) -> str:
    """All failures grouped by what went wrong and how to mend it, and the tasks that could not start for them.

    stopped: tasks that a signal of their own ended; the next run goes on with them.
    """
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        kinds.setdefault((failure.what, failure.mend), []).append(failure)
    lines = [f"{_tasks(len(failures))} failed, {len(missing)} could not start"]
    lines[0] += f", {len(stopped)} stopped by a signal" if stopped else ""
    for (what, mend), group in list(kinds.items())[:SHOWN_KINDS]:
        first, *more = what.splitlines() or ["no message"]
        lines += [f"  {_tasks(len(group))}: {first}", *(f"    {line}" for line in more)]
        values = {
            "where": [f.where for f in group],
            "mend": [mend],
            "task": [f.title for f in group],
            "log": [f.log for f in group],
        }
        for name, found in values.items():
            lines += [f"    {name + ':':<6} {text}" for text in _some(found)]
    if len(kinds) > SHOWN_KINDS:
        lines.append(f"  and {len(kinds) - SHOWN_KINDS} more kinds of failure: `cmrhpc status` lists them")
    lines += [f"  stopped, the next run goes on with it: {text}" for text in _some(stopped)]
    if missing:
        lines += [f"  not started, inputs are missing: {text}" for text in _some(missing)]
    return "\n".join(lines)


def _some(texts: Sequence[str]) -> list[str]:
    """The first few different texts, and how many more there are."""
    different = [text for text in dict.fromkeys(texts) if text]
    more = len(different) - SHOWN_EACH
    return different[:SHOWN_EACH] + ([f"and {more} more"] if more > 0 else [])


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"
