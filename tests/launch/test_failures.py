"""The closing words of a failed run: nothing distinct is dropped, nothing equal is told twice."""

from __future__ import annotations

from cmrhpc.launch.failures import Failure, told


def failure(number: int, what: str = "disk full", where: str = "a.h5", mend: str = "free space") -> Failure:
    return Failure(f"task {number}", what, where, mend, f"logs/{number}.log")


def test_equal_failures_are_one_group_and_each_kind_is_told_whole() -> None:
    many = [failure(i, where=f"{i}.h5") for i in range(30)]
    lines = told([*many, failure(40, "no weights\nsecond line", "w", "name a file")], ["last"]).splitlines()
    assert lines[0] == "31 tasks failed, 1 could not start"
    assert lines.count("  30 tasks: disk full") == 1
    assert lines.count("    mend:  free space") == 1
    assert lines.count("    where: and 27 more") == lines.count("    task:  and 27 more") == 1
    at = lines.index("  1 task: no weights")
    assert lines[at + 1 : at + 6] == [
        "    second line",
        "    where: w",
        "    mend:  name a file",
        "    task:  task 40",
        "    log:   logs/40.log",
    ]
    assert lines[-1] == "  not started, inputs are missing: last"


def test_the_same_fault_with_another_mend_is_another_kind() -> None:
    text = told([failure(1), failure(2, mend="ask the administrator")], [])
    assert text.count("1 task: disk full") == 2


def test_very_many_kinds_are_cut_with_their_count() -> None:
    lines = told([failure(i, what=f"fault {i}") for i in range(25)], []).splitlines()
    assert lines[-1] == "  and 5 more kinds of failure: `cmrhpc status` lists them"
