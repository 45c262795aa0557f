"""Killed anywhere, any number of times: the study finished later is the same study, and nothing is left over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from cmrhpc.launch.records import read_record
from tests.reliability.conftest import TIMEOUT, TINY, cmrhpc, command, copy_of, digest, names

LONG_KILLS = int(os.environ.get("CMRHPC_TEST_KILLS", "200"))


def kill_once(root: Path, random_: random.Random, seconds: float, aim: str) -> Counter[str] | None:
    """Start a run and kill its whole process group at a random moment; None when the run ended before.

    Three of four kills fall into the first `seconds` after a task of the stage `aim` has begun, because starting up
    takes most of a short life and some stages are over in a moment; the others fall anywhere. Returns which stages
    were at work.
    """
    begun = time.time()
    process = subprocess.Popen(
        command("run", root, "--jobs", "2", "--plain"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    anywhere = random_.random() < 0.25
    try:
        if not anywhere:
            while process.poll() is None and not at_work(root, begun)[aim]:
                time.sleep(0.02)
        process.wait(timeout=random_.uniform(0, 2 * seconds if anywhere else seconds))
    except subprocess.TimeoutExpired:
        stages = at_work(root, begun)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for_group(process.pid)
        return stages or Counter({"start": 1})
    errors = process.stderr.read().decode() if process.stderr else ""
    assert process.returncode == 0, errors
    return None


STAGES = {"ingest": "folds.h5", "synthesize": "synthetic", "refine": "refined", "classify": "predictions"}


def stages_to_come(root: Path, undisturbed: Path) -> list[str]:
    """The stages that still lack outputs: what the next run will begin with, and what follows."""
    lacking = [s for s, name in STAGES.items() if len(shards_in(root / name)) < len(shards_in(undisturbed / name))]
    return [*lacking, "aggregate"]


def shards_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.rglob("*.h5"))


def at_work(root: Path, since: float) -> Counter[str]:
    """Stages whose tasks a run that began at `since` has begun and not ended."""
    found: Counter[str] = Counter()
    for path in (root / "logs").glob("*.json"):
        record = read_record(path)
        if record and record.time >= since and record.state == "running":
            found[path.name.partition("_")[0]] += 1
    return found


def wait_for_group(group: int) -> None:
    for _ in range(200):
        if not any(is_of_group(path, group) for path in Path("/proc").glob("[0-9]*/stat")):
            return
        time.sleep(0.05)
    raise AssertionError("processes of the killed run live on")


def is_of_group(path: Path, group: int) -> bool:
    try:
        state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(its_group) == group and state != "Z"


def assert_same_study(root: Path, undisturbed: Path) -> None:
    cmrhpc("run", root, "--jobs", "2", "--plain")
    assert digest(root) == digest(undisturbed)
    assert names(root) == names(undisturbed)


def made_so_far(root: Path) -> set[str]:
    return {path.name + str(path.parent) for path in root.rglob("*") if path.suffix in (".h5", ".checkpoint")}


def kill_studies(fresh: Path, undisturbed: Path, tmp_path: Path, kills: int, seed: int) -> Counter[str]:
    """Kill runs until there were `kills` kills, beginning a new study whenever one is done; check each.

    The time that a run gets adapts, so that about every second one brings the study on, on however busy a machine.
    A fifth of all kills is aimed at each stage of a study at most: without that bound the long stages have them all.
    """
    random_ = random.Random(seed)
    total: Counter[str] = Counter()
    seconds = defaultdict(lambda: 2.0)
    while total["kills"] < kills:
        root = copy_of(fresh, tmp_path / f"killed{total['studies']}")
        aimed: Counter[str] = Counter()
        while total["kills"] < kills:
            made, stages_left = made_so_far(root), stages_to_come(root, undisturbed)
            aim = next((s for s in stages_left if aimed[s] < kills / 5), "aggregate")
            aimed[aim] += 1
            stages = kill_once(root, random_, seconds[aim], aim)
            if stages is None:
                break
            total.update(stages)
            total["kills"] += 1
            seconds[aim] *= 1.5 if made_so_far(root) == made else 0.75
            print(f"kill {total['kills']}: aimed at {aim}, met {dict(stages)}", flush=True)
        assert_same_study(root, undisturbed)
        total["studies"] += 1
        print(f"study {total['studies']}: the same digest after {total['kills']} kills in all", flush=True)
    return total


def test_killed_six_times_it_is_the_same_study(fresh: Path, undisturbed: Path, tmp_path: Path) -> None:
    total = kill_studies(fresh, undisturbed, tmp_path, 6, 1)
    assert total["kills"] == 6


@pytest.fixture
def demo(tmp_path: Path) -> tuple[Path, Path]:
    """The shipped demo study, fresh and after an undisturbed run; its checkpoints follow each other closely."""
    fresh = tmp_path / "demo"
    cmrhpc("phantom", fresh / "raw", "--patients", "80", "--seed", "1")
    cmrhpc("init", fresh, "--study", "demo", "--raw", fresh / "raw")
    study = fresh / "study.toml"
    text = (
        study.read_text().replace(str(fresh / "raw"), "raw").replace("[compute]", "[compute]\ncheckpoint_seconds = 1")
    )
    study.write_text(text)
    undisturbed = copy_of(fresh, tmp_path / "undisturbed")
    cmrhpc("run", undisturbed, "--jobs", "2", "--plain")
    return fresh, undisturbed


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("study", ["seconds", "demo"])
def test_killed_two_hundred_times_over_all_stages(
    study: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        whole = request.getfixturevalue("demo") if study == "demo" else None
        fresh, undisturbed = whole or (request.getfixturevalue("fresh"), request.getfixturevalue("undisturbed"))
        total = kill_studies(fresh, undisturbed, tmp_path, LONG_KILLS, int(time.time()))
        print(f"\nkill test, {study}: {dict(total)}")
    if LONG_KILLS >= 200:
        assert all(total[stage] for stage in ("ingest", "synthesize", "refine", "classify", "aggregate"))


# ------------------------------------------------------------------------------------------------ asked to stop

LONGER = (
    TINY.replace("generations = 3", "generations = 150")
    .replace("steps = 2\npretrain", "steps = 150\npretrain")
    .replace("steps = 2\nbatch", "steps = 4\nbatch")
)


def stop_once(root: Path, stage: str, number: int) -> int:
    """Start a task, send the signal once it has saved a new checkpoint, return its exit code."""
    folder = root / "checkpoints"
    before = set(folder.rglob("*.checkpoint"))
    process = subprocess.Popen(command("task", root, "--stage", stage, "--index", "0"), stderr=subprocess.PIPE)
    while process.poll() is None and not set(folder.rglob("*.checkpoint")) - before:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert b"Traceback" not in errors
    return process.returncode


@pytest.mark.parametrize(
    ("stage", "signals"),
    [
        ("synthesize", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]),
        ("refine", [signal.SIGUSR2]),
        ("classify", [signal.SIGTERM]),
    ],
)
def test_asked_to_stop_it_saves_a_checkpoint_and_goes_on_to_the_same_bits(
    undisturbed: Path, tmp_path: Path, stage: str, signals: list[signal.Signals]
) -> None:
    from cmrhpc.shards import read_shard
    from cmrhpc.stages.task import run_task
    from cmrhpc.workspace import Workspace

    roots = [copy_of(undisturbed, tmp_path / name) for name in ("stopped", "whole")]
    for root in roots:
        (root / "study.toml").write_text(LONGER)
        for earlier in ("synthesize", "refine") if stage == "refine" else ():
            if earlier != stage:
                run_task(Workspace(root), earlier, 0)
    for number in signals:
        assert stop_once(roots[0], stage, number) == (130 if number == signal.SIGINT else 75)
        assert list((roots[0] / "checkpoints").rglob("*.checkpoint"))
    cmrhpc("task", roots[0], "--stage", stage, "--index", "0")
    assert not list((roots[0] / "checkpoints").rglob("*.checkpoint"))
    run_task(Workspace(roots[1]), stage, 0)
    output = Workspace(roots[0]).tasks(stage)[0].output
    hashes = [read_shard(root / output).content_sha256 for root in roots]
    assert hashes[0] == hashes[1] != read_shard(undisturbed / output).content_sha256


def test_checkpoints_of_a_task_that_was_killed_right_after_its_shard_are_removed(copied: Path) -> None:
    left = copied / "checkpoints/synthetic/dae-gan/fold0_repeat0_class0/step0000000002.checkpoint"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"left")
    assert "already done" in cmrhpc("task", copied, "--stage", "synthesize", "--index", "0").stdout
    assert not left.parent.exists()
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    assert "nothing to do" in cmrhpc("run", copied).stdout
    assert not left.parent.exists()
    assert json.loads(cmrhpc("verify", copied, "--json").stdout)["damaged"] == []
