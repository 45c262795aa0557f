"""What `pip install .` gives: everything that the package needs besides its Python files, and nothing of the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.whole.conftest import make_workspace

ELEMENT = """
import sys, cmrhpc
from cmrhpc.launch.element import run_element
print(cmrhpc.__file__, run_element(sys.argv[1], "ingest", [0], {}), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed package, made from a copy of the source: building leaves files in it."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(ROOT / "cmrhpc", source / "cmrhpc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    options = ["--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(source)], check=True, cwd=folder, timeout=300)
    shutil.rmtree(source)
    return folder / "site"


def test_every_file_of_the_package_is_installed(installed: Path) -> None:
    def listed(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in found if "__pycache__" not in path.parts}

    assert listed(ROOT / "cmrhpc") == listed(installed / "cmrhpc")


def test_an_installed_package_runs_the_task_of_a_job(installed: Path, tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "ws")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", ELEMENT, str(workspace)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "cmrhpc/__init__.py"), "ingest 0: exit code 0"]
    assert (workspace / "folds.h5").exists()


def test_a_folder_of_our_name_hides_nothing(tmp_path: Path) -> None:
    """As in the folder that the clone lies in. Workers of a run and of submitit start where the command was given."""
    (tmp_path / "cmrhpc").mkdir()
    workspace = make_workspace(tmp_path / "ws")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["-m", "cmrhpc.cli", "ingest", "ws"], ["-c", ELEMENT, "ws"]):
        (workspace / "folds.h5").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert (workspace / "folds.h5").exists()
