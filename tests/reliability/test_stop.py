"""`cmrhpc run` asked to stop at any moment of its life: one line, its exit code, and nothing half done."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmrhpc.launch.records import read_record
from tests.reliability.conftest import TIMEOUT, assert_no_half_file, cmrhpc, command, copy_of, digest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGHUP: 75}


def start(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("run", root, "--jobs", "2", "--plain"),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def stop(process: subprocess.Popen[bytes], number: signal.Signals, group: bool = True) -> tuple[int, list[str]]:
    """Send the signal, to the whole group as a terminal does, and return (exit code, lines on stderr)."""
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors.decode().splitlines()


def children(process: subprocess.Popen[bytes]) -> list[str]:
    """Command lines of the run's own children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(path.with_name("cmdline").read_text())
        except OSError:
            continue
    return found


def wait_until(process: subprocess.Popen[bytes], there: Callable[[], bool]) -> None:
    while not there():
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)


def working(root: Path) -> bool:
    records = map(read_record, (root / "logs").glob("*.json"))
    return any(record is not None and record.state == "running" for record in records)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_the_fork_server_loads_torch(fresh: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(copy_of(fresh, tmp_path / "run"))
    wait_until(process, lambda: any("forkserver" in line for line in children(process)))
    code, lines = stop(process, number)
    assert code == CODES[number]
    assert len(lines) == 1, lines
    assert "what was finished is kept" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_stopped_while_tasks_work_it_goes_on_to_the_same_digest(
    fresh: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    root = copy_of(fresh, tmp_path / "run")
    process = start(root)
    wait_until(process, lambda: working(root))
    code, lines = stop(process, number)
    assert code == CODES[number]
    assert len(lines) == 1, lines
    assert_no_half_file(root)
    cmrhpc("run", root, "--jobs", "2", "--plain")
    assert digest(root) == digest(undisturbed)


def test_a_signal_to_the_run_alone_reaches_its_tasks(fresh: Path, tmp_path: Path) -> None:
    root = copy_of(fresh, tmp_path / "run")
    process = start(root)
    wait_until(process, lambda: working(root))
    code, lines = stop(process, signal.SIGTERM, group=False)
    assert (code, len(lines)) == (75, 1), lines
    assert not working(root)


def test_a_task_that_is_stopped_alone_is_named_at_the_end(fresh: Path, tmp_path: Path) -> None:
    root = copy_of(fresh, tmp_path / "run")
    study = (root / "study.toml").read_text()
    (root / "study.toml").write_text(study.replace("generations = 3", "generations = 1000000"))
    process = start(root)
    while process.poll() is None:
        for record in map(read_record, (root / "logs").glob("synthesize_*.json")):
            if record and record.state == "running":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGTERM)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4
    lines = errors.decode().splitlines()
    assert lines[0].endswith("0 tasks failed, 6 could not start, 4 stopped by a signal")
    assert len([line for line in lines if line.startswith("  stopped, the next run goes on with it: ")]) == 4


def test_a_second_interrupt_ends_the_tasks_at_once(fresh: Path, tmp_path: Path) -> None:
    """A task that stands still never answers a request: only a kill ends it."""
    root = copy_of(fresh, tmp_path / "run")
    process = start(root)
    wait_until(process, lambda: working(root))
    (worker,) = {record.pid for record in map(read_record, (root / "logs").glob("*.json")) if record}
    os.kill(worker, signal.SIGSTOP)
    for _ in range(TIMEOUT):
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
            time.sleep(1)
    _, errors = process.communicate(timeout=TIMEOUT)
    code, lines = process.returncode, errors.decode().splitlines()
    assert (code, len(lines)) == (130, 1), lines
    assert not working(root)
    assert not Path(f"/proc/{worker}").exists()
    assert_no_half_file(root)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stopped_at_thirty_random_moments(fresh: Path, undisturbed: Path, tmp_path: Path) -> None:
    """From half a second on: what comes before is Python's own start, where no code of ours runs yet."""
    root, random_ = copy_of(fresh, tmp_path / "run"), random.Random(11)
    for _ in range(30):
        process = start(root)
        try:
            process.wait(random_.uniform(0.5, 12))
        except subprocess.TimeoutExpired:
            number = random_.choice(list(CODES))
            code, lines = stop(process, number)
            assert code in (0, CODES[number])
            assert len(lines) == (code != 0), lines
        assert_no_half_file(root)
    cmrhpc("run", root, "--jobs", "2", "--plain")
    assert digest(root) == digest(undisturbed)
