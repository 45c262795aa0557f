"""Two runs on one workspace at once: both end well, with the results of one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmrhpc import files, shards
from tests.reliability.conftest import TIMEOUT, command, copy_of, digest, names, needs_root

RACES = int(os.environ.get("CMRHPC_TEST_RACES", "20"))


def race(fresh: Path, undisturbed: Path, root: Path) -> None:
    copy_of(fresh, root)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command("run", root, "--jobs", "1", "--plain"), **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for one in runs:
        out, errors = one.communicate(timeout=TIMEOUT)
        assert one.returncode == 0, out + errors
        assert "Traceback" not in errors
    assert digest(root) == digest(undisturbed)
    assert names(root) == names(undisturbed)


def write_again_and_again(path: Path, name: str, barrier: Any) -> None:
    for turn in range(25):
        barrier.wait()
        shards.write_shard(
            path,
            {"label": np.arange(3)},
            schema="images-1",
            task={},
            settings={},
            inputs={},
            seed=0,
            companions={ending: f"{name} {turn}".encode() for ending in (".jsonl", ".png", ".safetensors")},
        )
        barrier.wait()
        assert shards.check_companions(shards.read_shard(path), path.parent) == []
        barrier.wait()


def test_two_writers_of_one_shard_leave_it_with_its_own_companions(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=120)
    both = [context.Process(target=write_again_and_again, args=(tmp_path / "a.h5", n, barrier)) for n in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "a.jsonl", "a.png", "a.safetensors"]


def test_two_runs_at_once(fresh: Path, undisturbed: Path, tmp_path: Path) -> None:
    race(fresh, undisturbed, tmp_path / "race")


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_two_runs_at_once_twenty_times(
    fresh: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(RACES):
        race(fresh, undisturbed, tmp_path / f"race{number}")
        with capsys.disabled():
            print(f"race {number + 1} of {RACES}: same digest", flush=True)


@needs_root
def test_a_temporary_file_of_a_container_with_its_own_process_numbers_is_left_alone(tmp_path: Path) -> None:
    import sys

    code = (
        "import sys; from pathlib import Path; from cmrhpc import files;"
        "p = files.temporary_name(Path(sys.argv[1]) / 'x'); p.write_text('half'); print(p.name)"
    )
    inside = ["unshare", "-p", "-f", "--mount-proc", sys.executable, "-c", code, str(tmp_path)]
    made = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.strip()
    assert files.is_temporary(made)
    assert files.remove_stale(tmp_path) == 0
    os.utime(tmp_path / made, (1, 1))
    assert files.remove_stale(tmp_path) == 1
