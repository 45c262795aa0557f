"""Output on a full disk: lines are lost, results are not, and whose result is its output says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cmrhpc.validity import states
from cmrhpc.workspace import Workspace
from tests.whole.conftest import make_workspace

FULL = Path("/dev/full")


def on_full_disk(*words: str | Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", "cmrhpc", *map(str, words)]
    with FULL.open("w") as full:
        return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("python", [(), ("-u",)])
def test_output_that_is_not_complete_is_told(tmp_path: Path, study_text: str, python: tuple[str, ...]) -> None:
    (tmp_path / "study.toml").write_text(study_text)
    for verb in ("plan", "status"):
        done = on_full_disk(verb, tmp_path, python=python)
        assert done.returncode == 3
        assert done.stderr.splitlines() == [
            "cmrhpc: the output is not complete: No space left on device",
            "  mend:  free space where it goes",
        ]
    assert on_full_disk("plan", tmp_path / "nowhere").returncode == 3


def test_a_task_whose_output_is_lost_is_done(tmp_path: Path) -> None:
    root = make_workspace(tmp_path)
    done = on_full_disk("task", root, "--stage", "ingest")
    assert (done.returncode, done.stderr) == (0, "")
    assert states(Workspace(root), ("ingest",))["ingest"][0].done


def test_a_log_that_takes_no_more_stops_no_task(tmp_path: Path, study_text: str) -> None:
    """In a process that `run` starts: there each print goes to the log at once."""
    (tmp_path / "study.toml").write_text(study_text)
    code = (
        "import resource, sys\nfrom cmrhpc.launch.logs import all_to_log\nfrom cmrhpc.workspace import Workspace\n"
        "workspace = Workspace(sys.argv[1])\nresource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))\n"
        "with all_to_log(workspace, 'classify', 0):\n"
        "    for _ in range(9):\n        print('a line of progress', flush=True)\n"
        "    print('and a word', file=sys.stderr)\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert "a line of progress\n" in (tmp_path / "logs/classify_0.log").read_text()  # what fits is there
