"""A call on many items in forked processes: order, a process that is killed, a caller that is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmrhpc import forked
from cmrhpc.forked import in_order


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody asked for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_the_order_of_the_items_from_other_processes() -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 3 == 0))  # later items are done before earlier ones
        return item * item, os.getpid()

    found = list(in_order(work, range(50), processes=3))
    assert [square for square, _ in found] == [i * i for i in range(50)]
    assert len({process for _, process in found} - {os.getpid()}) == 3


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_items_than_processes(count: int) -> None:
    assert list(in_order(str, range(count), processes=3)) == [str(i) for i in range(count)]


def test_few_items_are_worked_on_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "_processes", lambda: 2)
    assert set(in_order(lambda _: os.getpid(), range(forked.LEAST - 1))) == {os.getpid()}
    assert os.getpid() not in set(in_order(lambda _: os.getpid(), range(forked.LEAST)))


def test_what_a_killed_process_leaves_is_done_here() -> None:
    here = os.getpid()

    def work(item: int) -> int:
        if item == 20 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert list(in_order(work, range(60), processes=2)) == list(range(60))


def test_so_is_that_of_one_killed_in_the_middle_of_a_result() -> None:
    here = os.getpid()

    def work(item: int) -> tuple[int, int, bytes]:
        return item, os.getpid(), b"x" * 200_000  # more than a pipe holds: it always waits in the middle of one

    found = []
    for item, process, _ in in_order(work, range(40), processes=2):
        found.append((item, process))
        if item == 0:
            os.kill(process, signal.SIGKILL)
    assert [item for item, _ in found] == list(range(40))
    assert {process for item, process in found if item % 2 == 0 and item > 2} == {here}


def test_where_no_process_can_be_started_all_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    assert list(in_order(lambda item: (item, os.getpid()), range(9), processes=2)) == [
        (i, os.getpid()) for i in range(9)
    ]


def test_an_error_in_another_process_is_raised_here_and_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // (item - 5), range(9), processes=2))
    assert capfd.readouterr().err == ""


def test_a_daemon_works_alone() -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)

    def ask() -> None:
        writer.send(len(list(in_order(str, range(forked.LEAST)))))

    child = multiprocessing.get_context("fork").Process(target=ask, daemon=True)
    child.start()
    writer.close()
    assert reader.recv() == forked.LEAST
    child.join()


def test_no_process_is_left_when_the_caller_stops_early_or_is_killed(tmp_path: Path) -> None:
    started: set[int] = set()
    for process in in_order(lambda _: os.getpid(), range(100_000), processes=2):
        started.add(process)
        if len(started) == 2:
            break
    assert len(started) == 2
    assert not any(alive(process) for process in started)

    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom cmrhpc.forked import in_order\n"
        "for number, process in enumerate(in_order(lambda _: (os.getpid(), 'x' * 5000), range(10**6), processes=2)):\n"
        "    if number < 2:\n        print(process[0], flush=True)\n"
    )
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    children = [int(caller.stdout.readline()) for _ in range(2)]
    assert len(set(children)) == 2
    caller.kill()
    caller.wait()
    caller.stdout.close()
    for _ in range(100):
        if not any(alive(child) for child in children):
            break
        time.sleep(0.1)
    assert not any(alive(child) for child in children)
