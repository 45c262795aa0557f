"""A study of all stages that takes seconds, run once undisturbed; every test disturbs a copy of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmrhpc import files, shards
from cmrhpc.verify import verify
from cmrhpc.workspace import Workspace
from tests.conftest import STUDY

_ARMS = """[[arms]]
name = "none"
[[arms]]
name = "dae-gan+simgan"
ratios = [1]
[primary]
classifier = "resnet50"
arm = "dae-gan+simgan"
ratio = 1
"""
_SHORTER = {
    "generations = 4": "generations = 3",
    "max_ratio = 2": "max_ratio = 1",
    "steps = 4\n": "steps = 2\n",
    "pretrain_refiner = 2": "pretrain_refiner = 1",
    "pretrain_discriminator = 2": "pretrain_discriminator = 1",
    "steps = 3": "steps = 2",
    "checkpoint_seconds = 600": "checkpoint_seconds = 0",
}


def _shorter(text: str) -> str:
    """The study of the other tests with fewer arms and steps, and a checkpoint after every step."""
    for old, new in _SHORTER.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text.partition("[[arms]]")[0] + _ARMS


TINY = _shorter(STUDY)
TIMEOUT = 1800  # a hang, on however busy a machine
LOG_FILES = {"logs", "index.json"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "cmrhpc.cli", *map(str, arguments)]


def cmrhpc(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}: {done.stdout}\n{done.stderr}")
    assert "Traceback" not in done.stderr, done.stderr
    return done


def digest(root: Path) -> str:
    """The digest of a workspace in which nothing is damaged, leaking or missing."""
    found = verify(Workspace(root))
    assert (found.damaged, found.leaks, found.missing) == ([], [], 0)
    return found.digest


def names(root: Path) -> set[str]:
    """Every file of a workspace but logs and the index; temporary ones everywhere."""
    found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    return {p.as_posix() for p in found if p.parts[0] not in LOG_FILES or files.is_temporary(p.name)}


def assert_no_half_file(root: Path) -> None:
    """Whatever is there under a final name is whole, and no temporary file is left."""
    for path in root.rglob("*"):
        assert not files.is_temporary(path.name), path
        if path.suffix == ".h5":
            assert shards.damage_of(path) == "", path


def copy_of(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with its raw folder and study, nothing run yet. Tests copy it."""
    from cmrhpc.data.phantom import write_phantom

    root = tmp_path_factory.mktemp("reliability") / "fresh"
    write_phantom(root / "raw", 8, 3)
    (root / "study.toml").write_text(TINY)
    return root


@pytest.fixture(scope="session")
def undisturbed(fresh: Path) -> Path:
    """The same workspace after a run that nothing disturbed. Tests copy it."""
    root = copy_of(fresh, fresh.with_name("undisturbed"))
    cmrhpc("run", root, "--jobs", "2", "--plain")
    return root


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    return copy_of(undisturbed, tmp_path / "copied")


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or not sys.platform.startswith("linux"),
    reason="needs root and unshare, to mount a file system of its own",
)
