"""What `make` does before there is an environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_an_older_python_makes_no_environment_and_one_half_made_is_begun_anew(tmp_path: Path) -> None:
    """A program stands in for Python: of some version, and it notes what else it is asked for."""
    (tmp_path / "cmrhpc" / "nets").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "cmrhpc/nets/convolution.c"):
        shutil.copy(ROOT / name, tmp_path / name)
    asked, ready, python = tmp_path / "asked", tmp_path / ".venv" / "ready", tmp_path / "python"

    def make(version: str) -> str:
        asked.write_text("")
        pretend = f'exec {sys.executable} -c "import sys; sys.version_info = {version}; $2"'
        python.write_text(f'#!/bin/bash\n[ "$1" != -c ] || {pretend}\necho "$@" > {asked}; exit 1\n')
        python.chmod(0o755)
        command = ["make", f"PYTHON={python}", ".venv/ready"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr

    assert "make PYTHON=python3.11" in make("(3, 10)")
    assert asked.read_text() == ""
    assert "make PYTHON" not in make("(3, 11)")
    assert asked.read_text() == "-m venv .venv\n"
    (ready.parent / "bin").mkdir()
    shutil.copy(python, ready.parent / "bin")
    make("(3, 11)")
    # Its Python is gone, and the mark is there should this time be interrupted too.
    assert (asked.read_text(), os.listdir(ready.parent)) == ("-m venv .venv\n", ["begun"])
    (ready.parent / "begun").rename(ready.parent / "own")
    make("(3, 11)")
    # Somebody's own is not cleared.
    assert (asked.read_text(), os.listdir(ready.parent)) == ("-m venv .venv\n", ["own"])
    ready.touch()
    os.utime(ready, (0, 0))
    (ready.parent / "bin").mkdir()
    shutil.copy(python, ready.parent / "bin")
    assert "make PYTHON" not in make("(3, 10)")
    # One that is whole is brought up to date, and keeps its Python.
    assert asked.read_text() == "-m pip install --quiet --upgrade pip\n"
