"""Each call that writes, syncs, renames, links or sets permissions may fail: one clear error, nothing damaged."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmrhpc import files, shards
from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.stages.task import run_task
from cmrhpc.workspace import Workspace
from tests.reliability.conftest import assert_no_half_file, copy_of, names

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)
CALLS = {
    files: ("create", "write_all", "set_permissions", "_follow_group", "sync_file", "sync_folder", "rename"),
    files.os: ("link", "mkdir"),
    shards: ("_write_datasets", "_write_header", "_stamp"),
}
Call = tuple[str, str]  # function of the file layer, call site outside of it


def call_site() -> str:
    """Module and line of the nearest caller outside the file layer."""
    frame = sys._getframe(2)
    while frame and ("cmrhpc/files.py" in frame.f_code.co_filename or "contextlib" in frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Faults:
    """Counts the calls of the file layer by function and call site, and makes one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, fail: tuple[Call, int] | None, error: int = 0):
        self.counts: Counter[Call] = Counter()
        self.hit = False
        for module, functions in CALLS.items():
            for name in functions:
                real = getattr(module, name)
                monkeypatch.setattr(module, name, self.wrapped(name, real, str(root), fail, error))

    def wrapped(self, name: str, real: Callable[..., Any], root: str, fail: Any, error: int) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if not any(str(argument).startswith(root) for argument in arguments):
                return real(*arguments, **more)
            key = (name, call_site())
            self.counts[key] += 1
            if fail and fail[0] == key and fail[1] == self.counts[key]:
                self.hit = True
                raise OSError(error, os.strerror(error))
            return real(*arguments, **more)

        return call


def before(undisturbed: Path, target: Path, stage: str) -> Path:
    """A workspace in which the stage's first task is the next to do."""
    root = copy_of(undisturbed, target)
    shutil.rmtree(root / "tasks" / stage)
    workspace = Workspace(root)
    output = root / workspace.tasks(stage)[0].output
    shutil.rmtree(root / "tasks" / stage)
    for path in [output, *([root / "cohort.h5"] if stage == "ingest" else [])]:
        for companion in (".h5", ".csv", ".png", ".jsonl", ".safetensors", ".json"):
            path.with_suffix(companion).unlink(missing_ok=True)
    return root


def counted(undisturbed: Path, tmp_path: Path, stage: str) -> Counter[Call]:
    with pytest.MonkeyPatch.context() as patch:
        root = before(undisturbed, tmp_path / f"counted_{stage}", stage)
        faults = Faults(patch, root, None)
        run_task(Workspace(root), stage, 0)
    return faults.counts


def inject(undisturbed: Path, tmp_path: Path, stage: str, call: Call, number: int, error: int) -> str:
    """Run the task with one failing call, then again without; returns what the failing run said."""
    root = before(undisturbed, tmp_path / "faulty", stage)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, root, (call, number), error)
        try:
            run_task(Workspace(root), stage, 0)
            raised = None
        except CmrhpcError as caught:
            raised = caught
    assert faults.hit, (call, number)
    said = "done all the same"
    if raised:
        assert isinstance(raised, BadInput)
        assert os.strerror(error) in raised.what
        assert raised.where
        assert raised.mend
        said = raised.what
    assert_no_half_file(root)
    run_task(Workspace(root), stage, 0)
    whole = Workspace(undisturbed)
    for name in [whole.tasks(stage)[0].output, *(["cohort.h5"] if stage == "ingest" else [])]:
        if name.endswith(".h5"):
            assert shards.read_shard(root / name).content_sha256 == shards.read_shard(whole.path(name)).content_sha256
            assert shards.check_companions(shards.read_header(root / name), (root / name).parent) == []
    assert names(root) <= names(undisturbed)
    assert_no_half_file(root)
    shutil.rmtree(root)
    return said


def first_and_last(counts: Counter[Call]) -> Iterator[tuple[Call, int]]:
    for call, number in sorted(counts.items()):
        yield from ((call, n) for n in sorted({1, number}))


TOLERATED = {"workspace.py"}  # the index only saves time


@pytest.mark.parametrize("stage", ["synthesize"])
def test_the_first_and_the_last_call_at_every_site_may_fail(undisturbed: Path, tmp_path: Path, stage: str) -> None:
    counts = counted(undisturbed, tmp_path, stage)
    assert {name for name, _ in counts} >= {"create", "write_all", "sync_file", "sync_folder", "rename", "link"}
    errors = itertools.cycle(ERRORS)
    for call, number in first_and_last(counts):
        said = inject(undisturbed, tmp_path, stage, call, number, next(errors))
        tolerable = call[1].partition(":")[0] in TOLERATED or call[0] == "_follow_group"
        assert tolerable or said != "done all the same", (call, number)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", ["ingest", "synthesize", "refine", "classify", "aggregate"])
def test_each_may_fail_with_each_error_in_each_stage(
    undisturbed: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = counted(undisturbed, tmp_path, stage)
    said: Counter[str] = Counter()
    for call, number in first_and_last(counts):
        for error in ERRORS:
            said[inject(undisturbed, tmp_path, stage, call, number, error)] += 1
    with capsys.disabled():
        print(f"\n{stage}: {len(counts)} sites, {sum(said.values())} faults: {dict(said)}")


@pytest.mark.parametrize("name", ["create", "write_all", "sync_file", "rename", "sync_folder"])
def test_an_index_that_cannot_be_written_stops_nothing(copied: Path, name: str) -> None:
    """It only saves time."""
    (copied / "index.json").unlink(missing_ok=True)
    expected = Workspace(copied).index()
    (copied / "index.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, copied, None)
        found = Workspace(copied).index()
    [call] = [call for call in faults.counts if call[0] == name]
    assert found == expected
    (copied / "index.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, copied, (call, 1), errno.ENOSPC)
        assert Workspace(copied).index() == expected
    assert faults.hit
    assert_no_half_file(copied)


def test_a_workspace_renamed_in_the_middle_is_not_made_anew(undisturbed: Path, tmp_path: Path) -> None:
    root = before(undisturbed, tmp_path / "here", "synthesize")

    def move(done: int, total: int) -> None:
        if root.exists() and done >= 1:
            root.rename(tmp_path / "there")

    with pytest.raises(BadInput, match="the folder is gone") as caught:
        run_task(Workspace(root), "synthesize", 0, progress=move)
    assert caught.value.exit_code == 3
    assert not root.exists()
    (tmp_path / "there").rename(root)
    run_task(Workspace(root), "synthesize", 0)
    output = Workspace(root).tasks("synthesize")[0].output
    there = shards.read_shard(undisturbed / output).content_sha256
    assert shards.read_shard(root / output).content_sha256 == there
    assert names(root) <= names(undisturbed)


def test_no_file_is_open_to_others_while_it_is_written(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with files.atomic_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"patients")
            assert temporary.stat().st_mode & 0o077 == 0
    finally:
        os.umask(old)


def test_links_that_lead_out_of_the_workspace_are_not_written_through(undisturbed: Path, tmp_path: Path) -> None:
    root = before(undisturbed, tmp_path / "w", "synthesize")
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(root / "synthetic")
    (root / "synthetic").symlink_to(outside)
    with pytest.raises(BadInput, match="leads out of the workspace"):
        run_task(Workspace(root), "synthesize", 0)
    assert not list(outside.iterdir())
